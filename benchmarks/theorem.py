"""Do trained orders bring samples nearer to the data? UPO's Theorem 2 (Hong et al. 2025, arXiv 2510.05725), by
enumeration over random joints: KL(p_data || p_pi) < KL(p_data || p_g).

    python benchmarks/theorem.py --threads 1 --out benchmarks/results/theorem.json

A joint of four letters of three symbols per seed; a denoiser that sees neighbours only, so that order matters; sampled
filling. Rewarded are the joint's likeliest words, and p_data is the joint on them. The divergences are exact
(unmask_env/exact.py): those of the reference g, of what UPO and policy iteration learn, and of the optimum of
J(pi) = E[r] - beta * KL.
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from common import over_seeds, report
from exact_optimum import Neighbours, Word, correlated
from rich.console import Console
from torch import Tensor

from agents import policy_iteration, upo
from agents.policy import PolicyConfig
from agents.policy_iteration import PolicyIterationConfig
from agents.upo import UPOConfig
from unmask_env import exact
from unmask_env.process import Unmasking
from unmask_env.reference import reference

LETTERS, SYMBOLS, REWARDED, TAU = 4, 3, 4, 0.2


def divergence(graph: exact.Graph, order: Any, data: Tensor) -> float:
    """KL(p_data || p_order) in nats, of (V,) * L probabilities ``data``."""
    with torch.no_grad():
        tokens, _, probability = exact.finished(graph, order)
    made = torch.zeros_like(data)
    made[tuple(tokens.T)] = probability.to(data)
    return float(torch.where(data > 0, data * (data / made).log(), 0.0).sum())


def one(seed: int, beta: float, runs: Path, threads: int | None) -> dict[str, Any]:
    """The divergences of one joint."""
    joint = correlated(SYMBOLS, LETTERS, seed)
    rewarded = joint >= joint.flatten().sort(descending=True).values[REWARDED - 1]
    data = joint * rewarded / (joint * rewarded).sum()
    task = Word(rewarded.float())
    process = Unmasking(task, Neighbours(joint, task), temperature=1.0)
    graph = exact.enumerate_boards(process, task.sample(1, torch.Generator().manual_seed(0)))
    g = reference(f"softmax_confidence:tau={TAU}")
    row = {
        "seed": seed,
        "reference": divergence(graph, g, data),
        "optimum": divergence(graph, exact.soft_optimal(graph, g, beta).policy, data),
    }
    shared = {"beta": beta, "lr": 3e-3, "seed": seed, "threads": threads, "reference": f"softmax_confidence:tau={TAU}"}
    shared |= {"policy": PolicyConfig(copy=False, dim=32, layers=2, defer_above=2.0, num_passes=1)}
    shared |= {"fill_temperature": 1.0, "validate_every": 0}
    learners = {
        "UPO": (upo.train, UPOConfig, {"anneal": True, "puzzles": 16, "group": 16, "iterations": 40, "imitation": 0}),
        "policy iteration": (
            policy_iteration.train,
            PolicyIterationConfig,
            {"labels": "values", "sampled": True, "iterations": 6, "puzzles": 128, "continuations": 16, "levels": 4},
        ),
    }
    for name, (train, config, settings) in learners.items():
        folder = runs / f"{name.replace(' ', '-')}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        started = time.process_time()
        policy = train(config(out=str(folder), **shared, **settings), process).eval()
        row[name] = divergence(graph, policy, data)
        row[f"{name}, CPU seconds"] = round(time.process_time() - started, 1)
    return row


def main(
    out: Path | None = None,
    seeds: int = 20,
    beta: float = 0.02,
    runs: Path = Path("runs/theorem"),
    threads: int | None = None,
) -> None:
    """Args: seeds: how many joints, each with a training of its own, from 0."""
    torch.set_num_threads(threads or torch.get_num_threads())
    console, rows = Console(width=140), []
    for seed in range(seeds):
        rows.append(one(seed, beta, runs, threads))
        console.print({name: round(value, 4) for name, value in rows[-1].items()})
        nearer = {}
        for name in ("optimum", "UPO", "policy iteration"):
            gains = [row["reference"] - row[name] for row in rows]
            nearer[name] = over_seeds(gains) | {"nearer": sum(gain > 0 for gain in gains)}
        measure = "KL(p_data || p), nats; nearer: in how many joints it is below the reference's"
        means = {name: statistics.fmean(row[name] for row in rows) for name in ("reference", *nearer)}
        report(out, beta=beta, measure=measure, means=means, gains=nearer, rows=rows)
    for name, gain in nearer.items():
        half = "" if gain["half_interval"] is None else f" ± {gain['half_interval']:.3f}"
        console.print(
            f"{name}: nearer than the reference in {gain['nearer']} of {seeds}, by {gain['mean']:.3f}{half} nats"
        )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
