"""The demonstration: train an order policy on 6x6 Sudoku from rewards alone and compare it with every heuristic, in
minutes on a CPU.

Two stages in one folder, each of which a second call resumes or skips: policy iteration, and the table, the learning
curve and the replay. The policy fills several cells per forward, and the table is the frontier of solve rate against
forwards; ``--actions single`` is the regime of one cell per forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.markup import escape

from agents import evaluate, frontier, policy_iteration
from agents.policy import OrderPolicy, PolicyConfig
from agents.policy_iteration import PolicyIterationConfig
from agents.remask_policy import RemaskPolicy
from agents.show import boards_of
from pretrain.run import resolve_device
from tasks import Instances
from tasks.errors import optional
from tasks.files import write_atomically, write_json
from tasks.settings import AtLeast1, Seed, Threads, validate
from unmask_env import make_process, render
from unmask_env.process import Unmasking
from unmask_env.reference import Policy, customary, reference
from unmask_env.state import Rules

SET_HEURISTICS = ("fixed_k margin", "threshold", "factor", "schedule linear")  # those on the frontier, or near it


@dataclass(frozen=True)
class DemoConfig:
    """Train by policy iteration against a frozen 6x6-Sudoku denoiser, then print one table for all orders."""

    out: str = "runs/demo"
    env: str = "Unmask/Sudoku6x6-v0"
    denoiser: str = "sudoku6-tiny"
    actions: Literal["set", "single"] = "set"
    """several cells per forward, or one"""
    limit: AtLeast1 = 1000
    """held-out puzzles in the table"""
    iterations: AtLeast1 = 4
    """of policy iteration"""
    puzzles: AtLeast1 = 1000
    """training puzzles played in each"""
    steps: AtLeast1 = 200
    """of AdamW in each"""
    seed: Seed = 0
    device: str = "cpu"
    threads: Threads | None = None


def train(config: DemoConfig) -> OrderPolicy | RemaskPolicy:
    """Policy iteration, resumed if begun before. Policies over sets read the board three times: that halves what they
    still get wrong, and they decide in every forward."""
    named = ("out", "env", "denoiser", "iterations", "puzzles", "steps", "seed", "device", "threads")
    shared = {name: getattr(config, name) for name in named}
    shape = PolicyConfig(num_passes=3) if config.actions == "set" else PolicyConfig()
    return policy_iteration.train(
        PolicyIterationConfig(rules=Rules(config.actions), policy=shape, resume="auto", **shared)
    )


def run(config: DemoConfig) -> list[evaluate.Result]:
    """Train, then leave ``table.json``, ``curve.png``, ``replay.gif``, and of sets ``frontier.png``, beside the policy
    in ``config.out``."""
    out, console = Path(config.out), Console()
    validate(config)
    with optional("the demonstration", "unmask[train,plot]"):  # before the work
        import matplotlib.figure  # noqa: F401
        import tensorboard  # noqa: F401
    device = resolve_device(config.device, config.threads)
    process = make_process(config.env, config.denoiser, device=device, actions=config.actions)
    instances = process.task.heldout(config.limit)
    policy = train(config)
    title = f"{process.task.name}, denoiser {config.denoiser}, {len(instances)} held-out puzzles"
    if config.actions == "single":
        policies: dict[str, Policy] = {name: reference(name) for name in customary("single")}
        policies["learned"] = policy
        results = evaluate.compare(process, policies, instances, config.seed, progress=True)
        console.print(evaluate.table(results, title))
    else:
        results, policies = frontier_of(config, process, instances, title)
    write_json(out / "table.json", [result.row() for result in results])
    curve(out)
    picture(process, policies, results, instances, out / "replay.gif")
    console.print(
        f"in {escape(str(out))}: table.json, {'' if config.actions == 'single' else 'frontier.png, frontier.json, '}"
        "curve.png, replay.gif, tb/ (TensorBoard), config.json + model.safetensors (policy)"
    )
    return results


def frontier_of(
    config: DemoConfig, process: Unmasking, instances: Instances, title: str
) -> tuple[list[evaluate.Result], dict[str, Policy]]:
    """Sweep all settings, print the frontier and draw it. The rows of the table, and their policies, are the best
    heuristic of at most as many forwards as the policy's best needs and one more, and that policy."""
    out = Path(config.out)
    chosen = frontier.methods(SET_HEURISTICS, process)
    own = frontier.methods([str(out)], process)
    chosen |= {name.replace(str(out), "learned"): settings for name, settings in own.items()}
    points = frontier.sweep(process, chosen, instances, config.seed, progress=True)
    Console().print(frontier.table(points, title))
    frontier.write(points, title, out / "frontier.png")
    learned = frontier.best_of(points, True)[-1]
    rivals = [p for p in frontier.best_of(points, False) if p.result.nfe <= learned.result.nfe + 1]
    shown = [rivals[-1] if rivals else frontier.best_of(points, False)[0], learned]
    policies = {p.method: next(q for setting, q in chosen[p.method] if setting == p.setting) for p in shown}
    return [point.result for point in shown], policies


def curve(out: Path) -> None:
    """The learning curve, from its TensorBoard logs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tb"))
    events.Reload()

    def scalars(tag: str) -> tuple[list[int], list[float]]:
        if tag not in events.Tags()["scalars"]:
            return [], []
        points = events.Scalars(tag)
        return [p.step for p in points], [p.value for p in points]

    figure = frontier.matplotlib().figure.Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*scalars("loss"))
    left.set(title="fit to what play was rewarded", xlabel="step", ylabel="loss (nats)")
    for tag, label in (("validation/policy", "policy"), ("validation/reference", "reference policy")):
        right.plot(*scalars(tag), "o-", label=label)
    right.set(title="validation puzzles, greedy", xlabel="step", ylabel="solved")
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
        _, fill_generator = evaluate.generators(process, policies[name], 0)
        trajectories[name] = boards_of(process.rollout(policies[name], one, generator, fill_generator, record=True))
    clue = (one.tokens[0] != task.mask_id).cpu()
    render.replay(task, clue, one.answers[0].cpu(), trajectories, path)
