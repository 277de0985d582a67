"""The demonstration: train an order policy on 6x6 Sudoku and compare it with every heuristic, in minutes on a CPU.

Three stages in one folder, each of which a second call resumes or skips: imitation of the oracle, UPO from there, and
the table, the learning curve and the replay. The policy fills several cells per forward, and the table is the frontier
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
from agents.remask_policy import RemaskPolicy
from agents.show import boards_of
from agents.upo import UPOConfig
from pretrain.checkpoint import write_atomically, write_json
from pretrain.run import resolve_device
from tasks import Instances
from tasks.settings import AtLeast1, Seed, validate
from unmask_env import make_process, render
from unmask_env.process import Unmasking
from unmask_env.reference import Policy, customary, reference
from unmask_env.state import Rules

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
    limit: AtLeast1 = 1000
    """held-out puzzles in the table"""
    puzzles: AtLeast1 = 3000
    """training puzzles played to collect states"""
    steps: AtLeast1 = 800
    """of imitation"""
    iterations: AtLeast1 = 20
    """of UPO"""
    seed: Seed = 0
    device: str = "cpu"
    threads: AtLeast1 | None = None


def train_stages(config: DemoConfig) -> OrderPolicy | RemaskPolicy:
    """Imitation of the oracle, then UPO from it; both resumed if begun before."""
    out = Path(config.out)
    named = ("env", "denoiser", "seed", "device", "threads")
    shared = {name: getattr(config, name) for name in named} | {"resume": "auto"}
    played = {"rules": Rules(config.actions), "puzzles": config.puzzles, "steps": config.steps}
    imitation.train(ImitationConfig(out=str(out / "imitation"), **played, **shared))
    regime = {} if config.actions == "single" else SETS
    start = str(out / "imitation")
    return upo.train(UPOConfig(out=str(out), init=start, iterations=config.iterations, **regime, **shared))


def run(config: DemoConfig) -> list[evaluate.Result]:
    """Train, then leave ``table.json``, ``curve.png``, ``replay.gif``, and of sets ``frontier.png``, beside the policy
    in ``config.out``."""
    out, console = Path(config.out), Console()
    validate(config)
    device = resolve_device(config.device, config.threads)
    process = make_process(config.env, config.denoiser, device=device, actions=config.actions)
    instances = process.task.heldout(config.limit)
    policy = train_stages(config)
    title = f"{process.task.name}, denoiser {config.denoiser}, {len(instances)} held-out puzzles"
    if config.actions == "single":
        policies: dict[str, Policy] = {name: reference(name) for name in customary("single")}
        policies["learned (UPO)"] = policy
        results = evaluate.compare(process, policies, instances, config.seed, progress=True)
        console.print(evaluate.table(results, title))
    else:
        results, policies = frontier_of(config, process, instances, title)
    write_json(out / "table.json", [result.row() for result in results])
    curve(out)
    picture(process, policies, results, instances, out / "replay.gif")
    console.print(
        f"in {out}: table.json, {'' if config.actions == 'single' else 'frontier.png, frontier.json, '}curve.png, "
        "replay.gif, tb/ (TensorBoard), config.json + model.safetensors (policy)"
    )
    return results


def frontier_of(
    config: DemoConfig, process: Unmasking, instances: Instances, title: str
) -> tuple[list[evaluate.Result], dict[str, Policy]]:
    """Sweep all settings, print the frontier and draw it. The rows of the table, and their policies, are the best
    heuristic of at most as many forwards as the policy's best needs and one more, and that policy."""
    out = Path(config.out)
    chosen = frontier.methods(SET_HEURISTICS, process)
    chosen["learned (UPO)"] = frontier.methods([str(out)], process)[str(out)]
    points = frontier.sweep(process, chosen, instances, config.seed, progress=True)
    Console().print(frontier.table(points, title))
    frontier.write(points, title, out / "frontier.png")
    learned = frontier.best_of(points, True)[-1]
    rivals = [p for p in frontier.best_of(points, False) if p.result.nfe <= learned.result.nfe + 1]
    shown = [rivals[-1] if rivals else frontier.best_of(points, False)[0], learned]
    policies = {p.method: next(q for setting, q in chosen[p.method] if setting == p.setting) for p in shown}
    return [point.result for point in shown], policies


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
    for tag, label in (("reward/fresh", "fresh puzzles"), ("reward/replayed", "puzzles that failed before")):
        right.plot(*scalars(out, tag), label=label)
    right.set(title="UPO", xlabel="iteration", ylabel="solved while sampling", ylim=(0, 1.02))
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend()
    write_atomically(out / "curve.png", lambda path: figure.savefig(path, dpi=120, format="png"))


def picture(
    process: Unmasking, policies: dict[str, Policy], results: list[evaluate.Result], instances: Instances, path: Path
) -> None:
    """A replay of one puzzle by random (of single positions), the best heuristic and the learned order: where it can be
    had, one that the learned order solves and the heuristic does not."""
    best = max(results[:-1], key=lambda result: float(result.solved.mean()))
    telling = ((results[-1].solved == 1) & (best.solved == 0)).nonzero().flatten()
    index = int(telling[0]) if len(telling) else 0
    task, one = process.task, instances[index : index + 1].to(process.device)
    trajectories = {}
    for name in (*(["random"] if "random" in policies else []), best.order, results[-1].order):
        generator = torch.Generator(process.device).manual_seed(0) if name == "random" else None
        trajectories[name] = boards_of(process.rollout(policies[name], one, generator, record=True))
    clue = (one.tokens[0] != task.mask_id).cpu()
    render.replay(task, clue, one.answers[0].cpu(), trajectories, path)
