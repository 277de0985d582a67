"""Watch one instance being filled, step by step: in the terminal, as a GIF, or as a page of several orders."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

from agents.evaluate import BoardCommand, generators, load_order, played_by, require_suited
from agents.page import fill_page
from tasks import Instances, Task, UnmaskError
from tasks.files import check_writable
from tasks.settings import NotNegative, validate
from tasks.task import check_instances
from unmask_env import render
from unmask_env.denoiser import Denoiser, load_denoiser
from unmask_env.distributions import Distribution
from unmask_env.process import Unmasking
from unmask_env.reference import Policy
from unmask_env.registration import resolve
from unmask_env.state import Observation, Rollout, Rules, Step

PAGE = Path(__file__).parent / "show.html"
KINDS = {"clue": "c", "masked": "m", "noise": "n", "filled": "f", "new": "a", "remasked": "r"}
"""What a position can be, and its letter in a frame; noise stands where a canvas has accepted nothing."""
STYLES = {"c": "bold", "m": "", "n": "dim", "f": "green", "a": "black on green", "r": "black on yellow"}
WRONG, WRONG_NOW = "red", "white on red"
BETWEEN = " ,|\n"
"""What may stand between the symbols that a task draws."""
TOP_CELLS = 50_000  # positions times steps up to which a page has three symbols of each, and one beyond


@dataclass(frozen=True)
class ShowCommand(BoardCommand):
    """Watch one instance being filled, with the order and the denoiser's confidence."""

    order: str = "margin"
    """reference policy, with options as in threshold:theta=0.8, or order policy by packaged name, folder or hub id; it
    plays the kind of action that it is made for"""
    orders: tuple[str, ...] = ()
    """several, in place of ``order``: one after the other in the terminal, side by side in a GIF and on a page"""
    index: int = 0
    """which held-out instance"""
    html: Path | None = None
    """write a page here that replays the orders side by side; it needs no server and no network"""
    gif: Path | None = None
    """write a replay here"""
    delay: NotNegative = 0.15
    """seconds between steps"""


# ---------------------------------------------------------------------- play
class Recorded(Policy):
    """A policy, and the probability (A,) that it gave each entry of the action at every step of the first row."""

    def __init__(self, policy: Policy, given: list[Tensor] | None = None) -> None:
        self.policy, self.given = policy, [] if given is None else given
        for name in ("actions", "sampled", "deterministic", "sees_answers", "reads_hidden", "looks_back"):
            setattr(self, name, getattr(policy, name))

    def __call__(self, seen: Observation) -> Distribution:
        distribution = self.policy(seen)
        self.given.append(distribution.entry_log_probs()[0].exp().cpu())
        return distribution

    def for_instances(self, task: Task, instances: Instances) -> Policy:
        return Recorded(self.policy.for_instances(task, instances), self.given)


class Frame(NamedTuple):
    """The board after a step: ``tokens`` (L,); a letter of :data:`KINDS` and the step that filled it (0: none) for each
    position; and the positions that hold a wrong symbol."""

    tokens: Tensor
    kinds: str
    order: list[int]
    wrong: list[int]


def boards_of(played: Rollout) -> list[Tensor]:
    """The boards (L,) of a one-row rollout, first to last."""
    return [step.observation.tokens[0].cpu() for step in played.steps] + [played.tokens[0].cpu()]


def frames_of(task: Task, instance: Instances, played: Rollout) -> list[Frame]:
    """The boards of a recorded one-row rollout, first to last, whatever the kind of action."""
    boards = boards_of(played)
    free = [step.observation.masked[0].tolist() for step in played.steps] + [played.state.masked[0].tolist()]
    clues = (instance.tokens[0] != task.mask_id).tolist()
    answers = instance.answers[0].tolist() if task.one_answer else None
    frames: list[Frame] = []
    order = [0] * len(clues)
    for k, board in enumerate(boards):
        tokens, before = board.tolist(), boards[max(0, k - 1)].tolist()
        acted = played.steps[k - 1].action[0].tolist() if k else [False] * len(tokens)
        kinds = ""
        for i, token in enumerate(tokens):
            if clues[i]:
                kinds += KINDS["clue"]
            elif token == task.mask_id:
                kinds += KINDS["masked" if before[i] == token else "remasked"]
            elif free[k][i] and not acted[i]:
                kinds += KINDS["noise"]
            else:  # on a canvas what was accepted is free all the same
                now = k > 0 and (free[k][i] or free[k - 1][i] or before[i] != token)
                kinds += KINDS["new" if now else "filled"]
        order = [k if kind == "a" else 0 if kind in "mnr" else at for kind, at in zip(kinds, order, strict=True)]
        stands = [i for i, kind in enumerate(kinds) if kind in "fa"]
        wrong = [i for i in stands if answers is not None and tokens[i] != answers[i]]
        frames.append(Frame(board, kinds, order, wrong))
    return frames


def describe(task: Task, instance: Instances, step: Step, before: Frame, after: Frame, k: int) -> str:
    """One line on what step ``k`` of a one-row rollout did, from the frame ``before`` to ``after``."""
    parts = []
    written = after.tokens.where(after.tokens != task.mask_id, 0).unsqueeze(0)
    confidences = step.observation.denoised.log_prob_of(written.to(step.observation.tokens.device))[0].exp()
    for at in (before.tokens != after.tokens).nonzero().flatten().tolist():
        row, column = divmod(at, task.shape[1])
        place = f"row {row + 1}, column {column + 1}" if task.shape[0] > 1 else f"position {at + 1}"
        if after.kinds[at] == KINDS["remasked"]:
            parts.append(f"{place} is masked again")
        elif after.kinds[at] == KINDS["new"]:
            verdict = ", right" if after.tokens[at] == instance.answers[0, at] else ", WRONG"
            said = f"confidence {float(confidences[at]):.3f}{verdict if task.one_answer else ''}"
            parts.append(f"{place} becomes {task.symbol(int(after.tokens[at]))} ({said})")
    return f"step {k} (order {float(step.log_prob[0].exp()):.2f}): {'; '.join(parts) or 'nothing changes'}"


class Show(NamedTuple):
    """One order's play of one instance: its frames, a line on each, and the probabilities that its policy gave."""

    name: str
    played: Rollout
    frames: list[Frame]
    captions: list[str]
    given: list[Tensor]


def play(process: Unmasking, name: str, policy: Policy, instance: Instances, seed: int) -> Show:
    """Play ``instance``, one row, by ``policy``."""
    recorded = Recorded(policy)
    draws = generators(process, policy, seed)
    played = played_by(process, policy).rollout(recorded, instance, *draws, record=True)
    task, frames = process.task, frames_of(process.task, instance, played)
    captions = ["the puzzle"]
    for k, step in enumerate(played.steps, 1):
        captions.append(describe(task, instance, step, frames[k - 1], frames[k], k))
    return Show(name, played, frames, captions, recorded.given)


# ---------------------------------------------------------------------- in colour
def places(task: Task, tokens: Sequence[int], drawn: str) -> list[tuple[int, int] | None] | None:
    """Where each position's symbol stands in what the task has ``drawn``: its start and end, or None for one that it
    leaves out. None altogether where the drawing is of another kind than symbols one after the other."""
    spans: list[tuple[int, int] | None] = []
    cursor = 0
    for token in tokens:
        spans.append(None)
        for symbol in (".", "_") if token == task.mask_id else (task.symbol(token),):
            start = cursor
            while start < len(drawn) and not drawn.startswith(symbol, start) and drawn[start] in BETWEEN:
                start += 1
            if symbol and drawn.startswith(symbol, start):
                spans[-1], cursor = (start, start + len(symbol)), start + len(symbol)
                break
    return spans if not drawn[cursor:].strip(BETWEEN) else None


def shaded(confidence: float) -> str:
    """The background of a masked position: the bluer, the surer the denoiser is of it."""
    return f"white on rgb({int(60 - 40 * confidence)},{int(60 + 30 * confidence)},{int(60 + 140 * confidence)})"


def coloured(task: Task, frame: Frame, confidence: Tensor | None) -> Text:
    """The board in colour: clues, what is new, wrong or masked again, and at masked positions the denoiser's
    ``confidence`` (L,), where a forward follows."""
    tokens, drawn = frame.tokens.tolist(), task.draw(frame.tokens)
    text, begin = Text(drawn), 0
    spans = places(task, tokens, drawn)
    if spans is None and task.prompt_length:  # a prompt in words, and what is behind it
        begin, cut = task.prompt_length, drawn.rfind("\n\n") + 2
        behind = places(task, tokens[begin:], drawn[cut:]) or []
        spans = [None if span is None else (span[0] + cut, span[1] + cut) for span in behind]
    for i, span in enumerate(spans or [], begin):
        kind = frame.kinds[i]
        style = STYLES[kind]
        if i in frame.wrong:
            style = WRONG_NOW if kind == KINDS["new"] else WRONG
        elif kind in "mn" and confidence is not None:
            style = shaded(float(confidence[i]))
        if span is not None and style:
            text.stylize(style, *span)
    return text


def legend(task: Task) -> Text:
    """What the colours mean."""
    parts = [("clue", STYLES["c"]), ("new", STYLES["a"])]
    parts += [("wrong", WRONG_NOW)] * task.one_answer + [("masked again", STYLES["r"])]
    parts += [("unsure", shaded(0.0)), ("sure", shaded(1.0))]
    return Text("  ").join(Text(f" {word} ", style) for word, style in parts)


def replay(console: Console, task: Task, show: Show, delay: float) -> None:
    """The boards one after the other in the same place."""
    confidences = [step.observation.confidence[0].cpu() for step in show.played.steps]
    with Live(console=console, auto_refresh=False) as live:
        for frame, caption, confidence in zip(show.frames, show.captions, [*confidences, None], strict=True):
            board = coloured(task, frame, confidence)
            live.update(Text.assemble(board, "\n\n", legend(task), "\n\n", caption), refresh=True)
            time.sleep(delay)


# ---------------------------------------------------------------------- as a page
def per_mille(values: Tensor, where: Tensor) -> list[int]:
    """(L,) in thousandths; -1 elsewhere than ``where`` (L,) bool."""
    return [round(1000 * value) if there else -1 for value, there in zip(values.tolist(), where.tolist(), strict=True)]


def frame_data(task: Task, show: Show, k: int, top: int) -> dict[str, Any]:
    """What the page is told of frame ``k``: the board, and of the forward that follows the confidence, the ``top``
    symbols, and what the policy gives each position."""
    frame, steps = show.frames[k], show.played.steps
    symbols = ["" if token == task.mask_id else task.symbol(token) for token in frame.tokens.tolist()]
    data: dict[str, Any] = {
        "symbols": symbols,
        "kinds": frame.kinds,
        "order": frame.order,
        "wrong": frame.wrong,
        "said": show.captions[k],
    }
    if k == len(steps):
        return data
    seen, length = steps[k].observation, len(frame.tokens)
    may = seen.action_mask[0].cpu()
    given, filled = show.given[k], seen.fillable[0].cpu()
    policy = given[:length]
    if len(given) > length:  # what may be masked again
        policy, may = policy.where(filled, given[length:]), may[:length] | may[length:]
    likely, shares = seen.top_symbols[0, :, :top].tolist(), seen.top_log_probs[0, :, :top].exp().tolist()
    data["free"] = [int(free) for free in filled.tolist()]
    data["confidence"] = per_mille(seen.confidence[0].cpu(), filled)
    data["policy"] = per_mille(policy, may)
    data["top"] = [
        [[task.symbol(s), round(1000 * p)] for s, p in zip(*row, strict=True)] if free else None
        for *row, free in zip(likely, shares, filled.tolist(), strict=True)
    ]
    return data


def write_page(task: Task, instance: Instances, shows: Sequence[Show], title: str, path: Path) -> None:
    """One page that holds all that it needs, and replays the ``shows`` of ``instance`` side by side."""
    cells = task.length * sum(len(show.frames) for show in shows)
    top = 3 if cells <= TOP_CELLS else 1
    data = {
        "title": title,
        "shape": task.shape,
        "box": task.box or task.shape,
        "answers": [task.symbol(token) for token in instance.answers[0].tolist()] if task.one_answer else None,
        "orders": [
            {"name": show.name, "frames": [frame_data(task, show, k, top) for k in range(len(show.frames))]}
            for show in shows
        ],
    }
    fill_page(PAGE, data, path)


# ---------------------------------------------------------------------- the command
def load_policies(command: ShowCommand, task: Task, denoiser: Denoiser) -> dict[str, Policy]:
    """By name. Raises :class:`tasks.UnmaskError`."""
    policies = {}
    for name in command.orders or (command.order,):
        policy = load_order(name, task, denoiser)
        require_suited(name, policy, command.actions)
        policies[name] = policy
    return policies


def run(command: ShowCommand) -> None:
    """``unmask show``."""
    validate(command)
    check_writable(command.html, "--html")
    check_writable(command.gif, "--gif")
    if command.gif is not None and command.gif == command.html:
        raise UnmaskError(f"--gif and --html both name {command.gif}; name two files")
    task, source = resolve(command.task, command.denoiser)
    heldout = check_instances(task, task.heldout())
    if not 0 <= command.index < len(heldout):
        raise UnmaskError(f"index must be between 0 and {len(heldout) - 1}, not {command.index}")
    instance = heldout[command.index : command.index + 1]
    denoiser, shows = load_denoiser(source, task), []
    for name, policy in load_policies(command, task, denoiser).items():
        process = Unmasking(task, denoiser, Rules(command.actions or policy.actions), command.temperature)
        shows.append(play(process, name, policy, instance, command.seed))
    console = Console(highlight=False)
    for show in shows:
        if len(shows) > 1:
            console.print(f"{show.name}:", markup=False)
        if console.is_terminal:
            replay(console, task, show, command.delay)
        else:  # a pipe or a file gets the moves and the last board
            first, *moves = show.captions
            for line in (first, task.draw(show.frames[0].tokens), "", *moves, "", task.draw(show.frames[-1].tokens)):
                console.print(line, markup=False)
    if command.gif is not None:
        clue = instance.tokens[0] != task.mask_id
        render.replay(task, clue, instance.answers[0], {s.name: boards_of(s.played) for s in shows}, command.gif)
    if command.html is not None:
        write_page(task, instance, shows, f"{task.name}, denoiser {source}, instance {command.index}", command.html)
