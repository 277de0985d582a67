"""Learned orders against every heuristic: several training seeds, paired intervals, one JSON of results.

    python benchmarks/orders.py --out benchmarks/results/sudoku6-tiny.json

trains the demonstration's recipe (imitation on stuck states, then UPO) for each seed, and evaluates on the test
puzzles: the heuristics, the oracle, and per seed the policy after imitation and after UPO. Differences are paired by
puzzle. A run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from agents import demo, evaluate
from agents.policy import load_policy
from pretrain.backbone import parameter_count
from pretrain.checkpoint import write_json
from unmask_env import registration


def failure_ratio(learned: evaluate.Result, best: evaluate.Result) -> dict[str, Any]:
    """How often ``learned`` fails as a share of how often ``best`` does, and the paired difference of solve rates."""
    failures = float((1 - best.solved).sum())
    difference, low, high = evaluate.paired_difference(learned.solved, best.solved)
    return {
        "failures": int((1 - learned.solved).sum()),
        "failures_best_heuristic": int(failures),
        "failure_ratio": float((1 - learned.solved).sum()) / failures if failures else None,
        "solve_rate_minus_best_heuristic": [difference, low, high],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoiser", default="sudoku6-tiny")
    parser.add_argument("--env", default="Unmask/Sudoku6x6-v0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--puzzles", type=int, default=2000, help="test puzzles")
    recipe = demo.DemoConfig(actions="single")
    parser.add_argument("--train-puzzles", type=int, default=recipe.puzzles, help="played to collect states")
    parser.add_argument("--steps", type=int, default=recipe.steps, help="of imitation")
    parser.add_argument("--iterations", type=int, default=recipe.iterations, help="of UPO")
    parser.add_argument("--runs", type=Path, default=Path("runs/orders"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    task, denoiser = registration.resolve(args.env, args.denoiser)
    instances = task.heldout(args.puzzles)
    orders = {name: evaluate.load_order(name, task) for name in (*demo.HEURISTICS, "oracle")}
    recipe = dataclasses.replace(
        recipe,
        env=args.env,
        denoiser=args.denoiser,
        threads=args.threads,
        puzzles=args.train_puzzles,
        steps=args.steps,
        iterations=args.iterations,
    )
    for seed in args.seeds:
        out = args.runs / f"{args.denoiser.replace('/', '-')}-seed{seed}"
        policy = demo.train_stages(dataclasses.replace(recipe, out=str(out), seed=seed))
        orders[f"imitation, seed {seed}"] = load_policy(out / "imitation", task)
        orders[f"UPO, seed {seed}"] = policy
    results = evaluate.evaluate(task, denoiser, orders, instances, progress=True)
    best = max(results[: len(demo.HEURISTICS)], key=lambda result: float(result.solved.mean()))
    report: dict[str, Any] = {
        "command": "python benchmarks/orders.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "recipe": dataclasses.asdict(recipe),
        "parameters": {"denoiser": parameter_count(denoiser.model), "policy": parameter_count(policy)},
        "best_heuristic": best.order,
        "rows": [result.row() for result in results],
        "learned": {r.order: failure_ratio(r, best) for r in results if "seed" in r.order},
    }
    write_json(args.out, report)
    console = Console()
    console.print(evaluate.table(results, f"{task.name}, denoiser {args.denoiser}, {len(instances)} test puzzles"))
    for name, entry in report["learned"].items():
        console.print(f"{name}: {entry}", highlight=False)


if __name__ == "__main__":
    main()
