"""The demonstration: train an order policy on 6x6 Sudoku and compare it with every heuristic, in minutes on a CPU.

Three stages in one folder, each of which a second call resumes or skips: imitation of the oracle, UPO from there, and
the table, the learning curve and the replay. The policy closes several cells per forward, and the table is the frontier
of solve rate against forwards; ``--actions single`` is the regime of one cell per forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import evaluate, frontier, imitation, upo
from agents.imitation import ImitationConfig
from agents.policy import OrderPolicy
from agents.upo import UPOConfig
from pretrain.checkpoint import write_atomically, write_json
from pretrain.run import require_seed, resolve_device
from tasks import Instances, Task
from unmask_env import core, registration, render
from unmask_env.core import Order, Rules, SetOrder
from unmask_env.denoiser import Denoiser

HEURISTICS = ("random", "left_to_right", "max_confidence", "margin", "entropy", "top_k")
SET_HEURISTICS = ("fixed_k margin", "threshold", "factor", "schedule linear")  # those on the frontier, or near it


# UPO over sets: rewards count forwards, and nothing holds the policy to a reference that is far behind it.
SETS: dict[str, Any] = {"rules": Rules("set", speed=1.0), "lr": 1e-4, "beta": 0.0}


@dataclass(frozen=True)
class DemoConfig:
    """Train with UPO against a frozen 6x6-Sudoku denoiser, then print one table for all orders."""

    out: str = "runs/demo"
    env: str = "Unmask/Sudoku6x6-v0"
    denoiser: str = "sudoku6-tiny"
    actions: Literal["set", "single"] = "set"
    """several cells per forward, or one"""
    limit: int = 1000
    """held-out puzzles in the table"""
    puzzles: int = 3000
    """training puzzles played to collect states"""
    steps: int = 800
    """of imitation"""
    iterations: int = 20
    """of UPO"""
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None


def train_stages(config: DemoConfig) -> OrderPolicy:
    """Imitation of the oracle, then UPO from it; both resumed if begun before."""
    out = Path(config.out)
    rules = Rules(config.actions)
    shared = {"env": config.env, "denoiser": config.denoiser, "seed": config.seed}
    machine = {"device": config.device, "threads": config.threads}
    first = ImitationConfig(
        out=str(out / "imitation"),
        puzzles=config.puzzles,
        steps=config.steps,
        rules=rules,
        resume=(out / "imitation" / "state.safetensors").exists(),
        **shared,
        **machine,
    )
    imitation.train(first)
    second = UPOConfig(
        out=str(out),
        init=str(out / "imitation"),
        iterations=config.iterations,
        **({} if config.actions == "single" else SETS),
        resume=(out / "state.safetensors").exists(),
        **shared,
        **machine,
    )
    return upo.train(second)


def run(config: DemoConfig) -> list[evaluate.Result]:
    """Train, then leave ``table.json``, ``curve.png``, ``replay.gif``, and of sets ``frontier.png``, beside the policy
    in ``config.out``."""
    out, console = Path(config.out), Console()
    require_seed(config.seed)
    device = resolve_device(config.device, config.threads)
    task, denoiser = registration.resolve(config.env, config.denoiser, device)
    instances = task.heldout(config.limit)
    policy = train_stages(config)
    title = f"{task.name}, denoiser {config.denoiser}, {len(instances)} held-out puzzles"
    orders: dict[str, Order | SetOrder]
    if config.actions == "single":
        orders = {name: evaluate.load_order(name, task) for name in HEURISTICS}
        orders["learned (UPO)"] = policy
        results = evaluate.evaluate(task, denoiser, orders, instances, config.seed, progress=True)
        console.print(evaluate.table(results, title))
    else:
        results, orders = frontier_of(config, task, denoiser, policy, instances, title)
    write_json(out / "table.json", [result.row() for result in results])
    curve(out)
    picture(task, denoiser, orders, results, instances, Rules(config.actions), out / "replay.gif")
    console.print(
        f"in {out}: table.json, {'' if config.actions == 'single' else 'frontier.png, frontier.json, '}curve.png, "
        "replay.gif, tb/ (TensorBoard), config.json + model.safetensors (policy)"
    )
    return results


def frontier_of(
    config: DemoConfig, task: Task, denoiser: Denoiser, policy: OrderPolicy, instances: Instances, title: str
) -> tuple[list[evaluate.Result], dict[str, Order | SetOrder]]:
    """Sweep all knobs, print the frontier and draw it; the rows of the table, and their orders, are random sets, the
    best heuristic of at most as many forwards as the policy's best needs and one more, and that policy."""
    out, rules = Path(config.out), Rules("set")
    found = frontier.methods(SET_HEURISTICS, task, denoiser, rules)
    found["learned (UPO)"] = frontier.methods([str(out)], task, denoiser, rules)[str(out)]
    points = frontier.sweep(task, denoiser, found, instances, rules, config.seed, progress=True)
    Console().print(frontier.table(points, title))
    frontier.write(points, title, out / "frontier.png")
    learned = frontier.best_of(points, True)[-1]
    rivals = [p for p in frontier.best_of(points, False) if p.result.nfe <= learned.result.nfe + 1]
    shown = [rivals[-1] if rivals else frontier.best_of(points, False)[0], learned]
    orders: dict[str, Order | SetOrder] = {}
    for point in shown:
        settings = [order for knob, order in found[point.method] if knob == point.knob]
        orders[point.method] = settings[0]
    return [point.result for point in shown], orders


def curve(out: Path) -> None:
    """The learning curve of both stages, from their TensorBoard logs."""

    def scalars(folder: Path, tag: str) -> tuple[list[int], list[float]]:
        events = EventAccumulator(str(folder / "tb"))
        events.Reload()
        if tag not in events.Tags()["scalars"]:
            return [], []
        points = events.Scalars(tag)
        return [p.step for p in points], [p.value for p in points]

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*scalars(out / "imitation", "loss"))
    left.set(title="imitation of the oracle", xlabel="step", ylabel="loss (nats)")
    for tag, label in (("reward/fresh", "fresh puzzles"), ("reward/mined", "puzzles that went wrong before")):
        right.plot(*scalars(out, tag), label=label)
    right.set(title="UPO", xlabel="iteration", ylabel="solved while sampling", ylim=(0, 1.02))
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend()
    write_atomically(out / "curve.png", lambda path: figure.savefig(path, dpi=120, format="png"))


def picture(
    task: Task,
    denoiser: Denoiser,
    orders: dict[str, Order | SetOrder],
    results: list[evaluate.Result],
    instances: Instances,
    rules: Rules,
    path: Path,
) -> None:
    """A replay of one puzzle by random (of single positions), the best heuristic and the learned order: where it can be
    had, one that the learned order solves and the heuristic does not."""
    best = max(results[:-1], key=lambda result: float(result.solved.mean()))
    telling = ((results[-1].solved == 1) & (best.solved == 0)).nonzero().flatten()
    index = int(telling[0]) if len(telling) else 0
    one = instances[index : index + 1].to(denoiser.device)
    trajectories = {}
    for name in (*(["random"] if "random" in orders else []), best.order, results[-1].order):
        generator = torch.Generator(denoiser.device).manual_seed(0) if name == "random" else None
        played = core.rollout(task, denoiser, orders[name], one, rules=rules, order_generator=generator, record=True)
        boards = [step.observation.tokens[0].cpu() for step in played.steps] + [played.state.tokens[0].cpu()]
        trajectories[name] = boards
    clue = (one.tokens[0] != task.mask_id).cpu()
    render.replay(task, clue, one.answers[0].cpu(), trajectories, path)
