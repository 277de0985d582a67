"""Watch one instance being filled, step by step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

import tasks
from agents.evaluate import BoardCommand, generators, load_order, played_by, require_suited
from pretrain.checkpoint import check_writable
from tasks import Instances, UnmaskError
from tasks.settings import InnerShare, NotNegative, validate
from unmask_env import render
from unmask_env.denoiser import load_denoiser
from unmask_env.process import Unmasking
from unmask_env.registration import resolve
from unmask_env.state import Rollout, Rules, Step


@dataclass(frozen=True)
class ShowCommand(BoardCommand):
    """Watch one instance being filled, with the order and the denoiser's confidence."""

    order: str = "margin"
    """reference policy, with options as in threshold:theta=0.8, or order policy by packaged name, folder or hub id; it
    plays the kind of action that it is made for"""
    index: int = 0
    """which held-out instance"""
    threshold: InnerShare | None = None
    """decoding threshold of a learned policy over sets"""
    gif: Path | None = None
    """write a replay here"""
    delay: NotNegative = 0.15
    """seconds between steps"""


def boards_of(played: Rollout) -> list[Tensor]:
    """The boards (L,) of a one-row rollout, first to last."""
    return [step.observation.tokens[0].cpu() for step in played.steps] + [played.tokens[0].cpu()]


def run(command: ShowCommand) -> None:
    """``unmask show``."""
    validate(command)
    check_writable(command.gif, "--gif")
    task, source = resolve(command.task, command.denoiser)
    heldout = task.heldout()
    if not 0 <= command.index < len(heldout):
        raise UnmaskError(f"index must be between 0 and {len(heldout) - 1}, not {command.index}")
    instance = heldout[command.index : command.index + 1]
    denoiser = load_denoiser(source, task)
    policy = load_order(command.order, task, denoiser)
    require_suited(command.order, policy, command.actions)
    if command.threshold is not None:
        if policy.sampled or policy.actions == "single":
            raise UnmaskError(
                "--threshold is for learned policies over sets; references carry theirs: threshold:theta=0.8"
            )
        policy = policy.at(command.threshold)
    process = Unmasking(task, denoiser, Rules(command.actions or policy.actions), command.temperature)
    draws = generators(process, policy, command.seed)
    played = played_by(process, policy).rollout(policy, instance, *draws, record=True)
    boards = boards_of(played)
    captions = ["the puzzle"]
    captions += [describe(task, instance, step, *boards[k - 1 : k + 1], k) for k, step in enumerate(played.steps, 1)]
    console = Console(highlight=False)
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for board, caption in zip(boards, captions, strict=True):
                live.update(Text(f"{task.draw(board)}\n\n{caption}"), refresh=True)
                time.sleep(command.delay)
    else:  # a pipe or a file gets the moves and the last board
        for line in (*captions, "", task.draw(boards[-1])):
            console.print(line, markup=False)
    if command.gif is not None:
        clue = instance.tokens[0] != task.mask_id
        render.replay(task, clue, instance.answers[0], {command.order: boards}, command.gif)


def describe(task: tasks.Task, instance: Instances, step: Step, before: Tensor, after: Tensor, k: int) -> str:
    """One line on what step ``k`` of a one-row rollout did, from the board ``before`` to ``after`` (L,)."""
    parts = []
    for at in (before != after).nonzero().flatten().tolist():
        row, column = divmod(at, task.shape[1])
        place = f"row {row + 1}, column {column + 1}" if task.shape[0] > 1 else f"position {at + 1}"
        symbol = int(after[at])
        if symbol == task.mask_id:
            parts.append(f"{place} is masked again")
            continue
        written = after.where(after != task.mask_id, 0).unsqueeze(0)
        confidence = float(step.observation.denoised.log_prob_of(written)[0, at].exp())
        verdict = ", right" if symbol == int(instance.answers[0, at]) else ", WRONG"
        said = f"confidence {confidence:.3f}{verdict if task.one_answer else ''}"
        parts.append(f"{place} becomes {task.symbol(symbol)} ({said})")
    return f"step {k} (order {float(step.log_prob[0].exp()):.2f}): {'; '.join(parts) or 'nothing changes'}"
