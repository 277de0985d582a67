"""The command line: ``unmask``."""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.live import Live
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor

import tasks
from agents import demo, evaluate, frontier, imitation, upo
from agents.learner import ReferenceName, SB3PPOConfig, TorchRLGRPOConfig, TorchRLPPOConfig
from agents.policy import PACKAGED_POLICIES
from pretrain import bounds
from pretrain.backbone import Backbone
from pretrain.checkpoint import PACKAGED_DENOISERS, load_model, packaged, write_json
from pretrain.run import Interrupted, require_at_least, require_seed, resolve_device
from pretrain.train import OBJECTIVES, PretrainConfig, pretrain
from tasks import Instances, Sudoku, UnmaskError
from unmask_env import core, exact, ids, parallel, reference, render
from unmask_env.denoiser import check_fits, load_denoiser

SET_ORDERS = ("fixed_k", "threshold", "factor", "entropy_bounded", "kl_stability", "schedule")


@dataclass(frozen=True)
class ListCommand:
    """Tasks, environment ids, packaged denoisers, reference policies, packaged order policies."""


@dataclass(frozen=True)
class EvaluateCommand:
    """Compare orders on the same held-out instances and denoiser: one table, with 95 % confidence intervals."""

    task: str
    """for example sudoku6"""
    denoiser: str
    """packaged name, folder or hub id"""
    orders: tuple[str, ...] | None = None
    """reference policies, and order policies by packaged name, folder or hub id; the default is all customary ones"""
    puzzles: Path | None = None
    """your own CSV with header Puzzle,Solution: a digit string per board, 0 or . for a blank; Solution may be absent"""
    json: Path | None = None
    """write the rows here"""
    limit: int | None = None
    """use LIMIT held-out instances only: the first ones of a fixed list or file, or as many spread over a text"""
    grade: Literal["all", "singles", "beyond"] = "all"
    """packaged Sudoku puzzles that naked and hidden singles alone solve, or those that need more"""
    blanks: int | None = None
    """reveal clues at random until this many blanks are left"""
    actions: Literal["single", "set", "set+remask"] = "single"
    """choose one position per forward, a set of them, or also positions to open again; the orders of sets are
    references such as threshold:theta=0.8 and policies trained over sets"""
    nfe_budget: int | None = None
    """cut episodes off after this many forwards"""
    remask_budget: int | None = None
    """positions that an episode may open again"""
    frontier: Path | None = None
    """over sets: sweep the knob of every order (``heuristics`` stands for all references, one of which is for example
    "fixed_k margin"), and write the solve rate against the number of forwards here (PNG), with the numbers beside it
    (JSON)"""
    block_length: int | None = None
    """fill block by block, each of this many positions, behind the prompt (semi-autoregressive)"""
    temperature: float = 0.0
    """of the filling; 0 takes the denoiser's most likely symbol, 1 samples its distribution"""
    exact: bool = False
    """on boards of at most 16 blanks: also the exact expected reward of each order, the best that any order could reach
    with this denoiser, and the exact divergences from ``reference``"""
    reference: ReferenceName = "softmax_confidence"
    """what ``exact`` measures divergences from"""
    seed: int = 0
    """of the stochastic orders"""
    batch: int = 500
    device: str = "cpu"


@dataclass(frozen=True)
class LikelihoodCommand:
    """How likely a denoiser finds held-out sequences: unbiased bounds on -log p(x), with standard errors."""

    task: str
    """for example text"""
    denoiser: str
    """packaged name, folder or hub id"""
    split: Literal["validation", "test"] = "test"
    limit: int = 1000
    """how many sequences"""
    samples: int = 8
    """masks per sequence"""
    truncated: bool = False
    """also the time integral cut off at t = 0.001, as often reported: no bound"""
    json: Path | None = None
    """write the numbers here"""
    seed: int = 0
    """of the masks"""
    batch: int = 250
    device: str = "cpu"


@dataclass(frozen=True)
class ShowCommand:
    """Watch one instance being filled, with the order and the denoiser's confidence."""

    task: str
    denoiser: str
    order: str = "margin"
    """reference policy, or order policy by packaged name, folder or hub id"""
    index: int = 0
    """which held-out instance"""
    gif: Path | None = None
    """write a replay here"""
    delay: float = 0.15
    """seconds between steps"""
    temperature: float = 0.0
    """of the filling; 0 takes the denoiser's most likely symbol, 1 samples its distribution"""
    seed: int = 0


def list_everything() -> None:
    console = Console()
    for title, names in {
        "tasks": tasks.names(),
        "environments": ids(),
        "packaged denoisers": packaged(PACKAGED_DENOISERS),
        "reference policies": list(reference.REFERENCES),
        "reference policies over sets": list(parallel.SET_REFERENCES),
        "packaged order policies": packaged(PACKAGED_POLICIES),
    }.items():
        console.print(f"[bold]{title}[/bold]: {', '.join(names) or '(none)'}", highlight=False)


def instances_of(task: tasks.Task, puzzles: Path | None, limit: int | None, grade: str) -> Instances:
    """A user's file or the held-out split of one grade, cut to ``limit``."""
    if limit is not None and limit < 1:
        raise UnmaskError(f"limit must be at least 1, not {limit}")
    if not isinstance(task, Sudoku):
        if puzzles is not None or grade != "all":
            raise UnmaskError(f"--puzzles and --grade are for Sudoku tasks; {task.name} is not one")
        return task.heldout(limit)
    if puzzles is None:
        return task.heldout(limit, singles={"all": None, "singles": True, "beyond": False}[grade])
    if grade != "all":
        raise UnmaskError("--grade is for the packaged puzzles; your own file is taken whole")
    instances = task.from_csv(puzzles)
    return instances if limit is None else instances[:limit]


def require_file(path: Path | None, option: str = "--json") -> None:
    if path is not None and path.is_dir():
        raise UnmaskError(f"{option} {path} is a folder; name a file")


def run_evaluate(command: EvaluateCommand) -> None:
    device = resolve_device(command.device)
    require_seed(command.seed)
    require_file(command.json)
    if command.blanks is not None and command.puzzles is not None:
        raise UnmaskError("--blanks is for the packaged puzzles; your own file says where its blanks are")
    task = tasks.get(command.task, **({"blanks": command.blanks} if command.blanks is not None else {}))
    instances = instances_of(task, command.puzzles, command.limit, command.grade)
    denoiser = load_denoiser(command.denoiser, task, device)
    rules = core.Rules(
        command.actions,
        nfe_budget=command.nfe_budget,
        block_length=command.block_length,
        remask_budget=command.remask_budget,
    )
    names = command.orders
    if names is None:
        names = demo.HEURISTICS if command.actions == "single" else ("heuristics",) if command.frontier else SET_ORDERS
    if not names:
        raise UnmaskError("--orders needs at least one order")
    title = f"{task.name}, denoiser {command.denoiser}, {len(instances)} instances"
    if command.frontier is not None:
        if command.frontier.suffix != ".png":
            raise UnmaskError(f"--frontier writes a picture; {command.frontier} must end in .png")
        require_file(command.frontier, "--frontier")
        if command.exact or command.json is not None:
            raise UnmaskError("--frontier writes its own JSON beside the picture; leave --json and --exact out")
        found = frontier.methods(names, task, denoiser, rules)
        points = frontier.sweep(
            task, denoiser, found, instances, rules, command.seed, command.batch, True, command.temperature
        )
        frontier.write(points, title, command.frontier)
        Console().print(frontier.table(points, title))
        return
    orders = {name: evaluate.load_order(name, task, denoiser, command.actions) for name in names}
    for order in orders.values():
        if isinstance(order, torch.nn.Module):
            order.to(device)
    if command.exact:
        if rules != core.SINGLE or command.temperature > 0:
            raise UnmaskError("--exact is for greedy filling, one position at a time, without blocks or budgets")
        exact.check_holes(task, instances)
        reference.require_full_support(reference.get(command.reference))
        if command.reference == "learned":
            reference.require_learned(denoiser, task)
    results = evaluate.evaluate(
        task,
        denoiser,
        orders,
        instances,
        command.seed,
        command.batch,
        progress=True,
        rules=rules,
        temperature=command.temperature,
    )
    Console().print(evaluate.table(results, title))
    if command.json is not None:
        write_json(command.json, [result.row() for result in results])
    if command.exact:
        results = evaluate.add_exact(
            results, task, denoiser, orders, instances, reference.get(command.reference), progress=True
        )
        Console().print(evaluate.exact_table(results, command.reference))
        if command.json is not None:
            write_json(command.json, [result.row() for result in results])


def run_likelihood(command: LikelihoodCommand) -> None:
    device = resolve_device(command.device)
    require_seed(command.seed)
    require_at_least(1, limit=command.limit, samples=command.samples, batch=command.batch)
    require_file(command.json)
    task = tasks.get(command.task)
    model = load_model(Backbone, command.denoiser, PACKAGED_DENOISERS, "denoiser").to(device).eval()
    check_fits(model.vocab_size, model.length, task, model.fingerprint)
    clean = task.heldout(command.limit, command.split).answers.to(device)
    generator = torch.Generator(device).manual_seed(command.seed)
    found = [
        bounds.bound(model, rows, generator, command.samples, command.truncated)
        for rows in track(clean.split(command.batch), "likelihood", transient=True)
    ]
    forms = {"exact": "path"} if found[0].exact else {"path bound": "path", "order bound": "order"}
    if command.truncated:
        forms["cut off at t = 0.001 (no bound)"] = "truncated"
    table = Table(
        "",
        "nats per sequence",
        "nats per position",
        "perplexity",
        title=f"{task.name}, {command.denoiser}, {len(clean)}",
    )
    rows = []
    for title, form in forms.items():
        values = torch.cat([getattr(part, form) for part in found])
        mean, error = bounds.mean_and_error(values)
        each, its_error = mean / task.length, error / task.length
        table.add_row(
            title, f"{mean:.3f} ± {error:.3f}", f"{each:.4f} ± {its_error:.4f}", f"{math.exp(each):.3f}"
        )  # standard errors over sequences
        rows.append({"form": title, "nats": mean, "standard_error": error, "length": task.length, "n": len(clean)})
        rows[-1] |= {"task": task.name, "denoiser": command.denoiser, "split": command.split, "seed": command.seed}
    Console().print(table)
    if command.json is not None:
        write_json(command.json, rows)


def run_show(command: ShowCommand) -> None:
    task = tasks.get(command.task)
    available = len(task.heldout())
    if not 0 <= command.index < available:
        raise UnmaskError(f"index must be between 0 and {available - 1}, not {command.index}")
    require_seed(command.seed)
    require_at_least(0, delay=command.delay, temperature=command.temperature)
    instances = task.heldout()[command.index : command.index + 1]
    denoiser = load_denoiser(command.denoiser, task)
    order = evaluate.load_order(command.order, task, denoiser)
    generator = torch.Generator().manual_seed(command.seed) if isinstance(order, reference.Reference) else None
    played = core.rollout(
        task,
        denoiser,
        order,
        instances,
        order_generator=generator,
        temperature=command.temperature,
        fill_generator=torch.Generator().manual_seed(command.seed + 1) if command.temperature > 0 else None,
        record=True,
    )
    boards = [step.observation.tokens[0] for step in played.steps] + [played.state.tokens[0]]
    captions = ["the puzzle"]
    captions += [describe(task, instances, step, boards[k], k) for k, step in enumerate(played.steps, 1)]
    console = Console(highlight=False)
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for board, caption in zip(boards, captions, strict=True):
                live.update(Text(f"{task.draw(board)}\n\n{caption}"), refresh=True)
                time.sleep(command.delay)
    else:  # a pipe or a file gets the moves and the last board
        for line in (*captions, "", task.draw(boards[-1])):
            console.print(line)
    if command.gif is not None:
        clue = instances.tokens[0] != task.mask_id
        render.replay(task, clue, instances.answers[0], {command.order: boards}, command.gif)


def describe(task: tasks.Task, instances: Instances, step: core.Step, board: Tensor, k: int) -> str:
    """One line on what step ``k`` of a one-row rollout did, which led to ``board``."""
    at = int(step.action[0])
    symbol = int(board[at])
    sure = float(step.observation.denoised.log_probs[0, at, symbol].exp())
    row, column = divmod(at, task.shape[1])
    place = f"row {row + 1}, column {column + 1}" if task.shape[0] > 1 else f"position {at + 1}"
    verdict = ", right" if symbol == int(instances.answers[0, at]) else ", WRONG"
    return (
        f"step {k}: {place} becomes {task.symbol(symbol)} "
        f"(confidence {sure:.3f}, order {float(step.log_prob[0].exp()):.2f}){verdict if task.one_answer else ''}"
    )


def application() -> tyro.extras.SubcommandApp:
    app = tyro.extras.SubcommandApp()
    app.command(ListCommand, name="list")
    pretraining = tyro.extras.SubcommandApp()
    for name, config in OBJECTIVES.items():
        pretraining.command(config, name=name)
    app.command(pretraining, name="pretrain", help="Train a denoiser from scratch.")
    training = tyro.extras.SubcommandApp()
    training.command(upo.UPOConfig, name="upo")
    training.command(imitation.ImitationConfig, name="imitation")
    training.command(SB3PPOConfig, name="ppo-sb3")
    training.command(TorchRLPPOConfig, name="ppo-torchrl")
    training.command(TorchRLGRPOConfig, name="grpo-torchrl")
    app.command(training, name="train", help="Train an order policy on top of a frozen denoiser.")
    app.command(EvaluateCommand, name="evaluate")
    app.command(LikelihoodCommand, name="likelihood")
    app.command(ShowCommand, name="show")
    app.command(demo.DemoConfig, name="demo")
    return app


def parse(args: Sequence[str] | None) -> Any:
    """The settings that ``args`` mean; tyro's framed complaint becomes one line on stderr and exit code 2."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return application().cli(args=args, prog="unmask", config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        if stop.code not in (0, None):
            text = re.sub(r"\x1b\[[0-9;]*m|[─-╿]", " ", captured.getvalue())
            print("unmask: " + re.sub(r"\s+", " ", text).strip(), file=sys.stderr)
        raise


def dispatch(command: Any) -> None:
    match command:
        case ListCommand():
            list_everything()
        case PretrainConfig():
            pretrain(command)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        case upo.UPOConfig():
            upo.train(command)
        case imitation.ImitationConfig():
            imitation.train(command)
        case SB3PPOConfig():
            from agents import sb3_ppo  # the RL libraries take seconds to import

            sb3_ppo.train(command)
        case TorchRLPPOConfig() | TorchRLGRPOConfig():
            from agents import torchrl_ppo

            torchrl_ppo.train(command)
        case EvaluateCommand():
            run_evaluate(command)
        case LikelihoodCommand():
            run_likelihood(command)
        case ShowCommand():
            run_show(command)
        case demo.DemoConfig():
            demo.run(command)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point: exit code 0, 2 after a user's mistake (one line on stderr), 130 after Ctrl-C."""
    try:
        dispatch(parse(args))
    except UnmaskError as error:
        print(f"unmask: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a place that cannot be read or written
        print(f"unmask: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(f"unmask: {stop}", file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        print("unmask: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
