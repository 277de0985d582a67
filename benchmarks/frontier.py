r"""Solve rate against forwards: policies over sets beside every reference, several training seeds, one JSON and a PNG.

    python benchmarks/frontier.py --threads 1 --out benchmarks/results/frontier-sudoku6-tiny.json

trains per seed the recipe of policies over sets (imitation on boards played by thresholds, then UPO with rewards that
count forwards), sweeps thresholds and the knobs of all references on the same held-out puzzles, and compares each
learned point with the best heuristic that takes as many forwards or more: up to ``--until`` of them, and any number.
Differences are paired by puzzle. A run that was cut off goes on where it stopped. A policy sees the denoiser's
distributions and not the denoiser, so one that a small denoiser trained may start the training for a larger one:

    python benchmarks/frontier.py --denoiser sudoku6 --init runs/frontier/sudoku6-tiny-set-seed{seed}/imitation \
        --train-puzzles 5000 --steps 1000 --iterations 0 --threads 1 --out benchmarks/results/frontier-sudoku6.json
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
from torch import Tensor

from agents import evaluate, frontier, imitation, upo
from agents.frontier import Point
from agents.imitation import ImitationConfig
from agents.upo import UPOConfig
from pretrain.checkpoint import write_json
from unmask_env import exact, parallel, registration
from unmask_env.core import Rules


def train(args: argparse.Namespace, seed: int) -> Path:
    """The folder of the trained policy; a run that was begun goes on, a finished one is not repeated."""
    out = args.runs / f"{args.denoiser.replace('/', '-')}-{args.actions.replace('+', '-')}-seed{seed}"
    shared = {"env": args.env, "denoiser": args.denoiser, "seed": seed, "threads": args.threads}
    first, second = out / "imitation", out / "upo"
    rules = Rules(args.actions)
    imitation.train(
        ImitationConfig(
            out=str(first),
            init=None if args.init is None else args.init.format(seed=seed),
            rules=rules,
            puzzles=args.train_puzzles,
            steps=args.steps,
            resume=(first / "state.safetensors").exists(),
            **shared,
        )
    )
    if args.iterations > 0:
        upo.train(
            UPOConfig(
                out=str(second),
                init=str(first),
                rules=dataclasses.replace(rules, speed=args.speed),
                iterations=args.iterations,
                lr=args.lr,
                beta=0.0,
                resume=(second / "state.safetensors").exists(),
                **shared,
            )
        )
    return second if args.iterations > 0 else first


def against(point: Point, heuristics: list[Point], until: float) -> dict[str, Any] | None:
    """``point`` beside the best heuristic of as many forwards or more, and at most ``until``."""
    rivals = [p for p in heuristics if point.result.nfe <= p.result.nfe <= until]
    if not rivals:
        return None
    best = max(rivals, key=lambda p: float(p.result.solved.mean()))
    ours, theirs = (float((1 - p.result.solved).sum()) for p in (point, best))
    return {
        "rival": best.method,
        "knob": best.knob,
        "nfe": best.result.nfe,
        "failures": [ours, theirs],
        "failure_ratio": ours / theirs if theirs else None,
        "difference": evaluate.paired_difference(point.result.solved, best.result.solved),
    }


def bound(fewest: Tensor) -> list[dict[str, float]]:
    """The frontier that no order without positions opened again can pass, from the fewest forwards (N,) that each
    instance needs: it gives up, in one forward, whatever takes more than n."""
    points = []
    for n in fewest[fewest.isfinite()].unique().tolist():
        solved = fewest <= n
        points.append({"nfe": float(fewest.where(solved, 1.0).mean()), "solved": float(solved.double().mean())})
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoiser", default="sudoku6-tiny")
    parser.add_argument("--env", default="Unmask/Sudoku6x6-v0")
    parser.add_argument("--actions", choices=["set", "set+remask"], default="set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--init", default=None, help="a policy over sets to start from; {seed} in it is the seed")
    parser.add_argument("--train-puzzles", type=int, default=10000)
    parser.add_argument("--steps", type=int, default=3000, help="of imitation")
    parser.add_argument("--iterations", type=int, default=20, help="of UPO; 0: imitation alone")
    parser.add_argument("--lr", type=float, default=1e-4, help="of UPO")
    parser.add_argument("--speed", type=float, default=1.0, help="exponent of the forwards in UPO's reward")
    parser.add_argument("--puzzles", type=int, default=2000, help="held-out puzzles")
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    parser.add_argument(
        "--exact", type=int, default=200, help="first ones of them for the exact bound, where it can be had"
    )
    parser.add_argument("--until", type=float, default=6.0, help="forwards")
    parser.add_argument("--runs", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    task, denoiser = registration.resolve(args.env, args.denoiser)
    instances = task.heldout(args.puzzles, args.split)
    policies = {seed: train(args, seed) for seed in args.seeds}
    rules = Rules(args.actions)
    found = frontier.methods(["heuristics"], task, denoiser, rules)
    for seed, folder in policies.items():
        found[f"learned, seed {seed}"] = frontier.methods([str(folder)], task, denoiser, rules)[str(folder)]
    points = frontier.sweep(task, denoiser, found, instances, rules, progress=True)
    heuristics = [point for point in points if not point.learned]
    ceiling = evaluate.evaluate(task, denoiser, {"oracle": parallel.OracleSets()}, instances, rules=rules)[0]
    holes = (instances.tokens == task.mask_id).sum(1)
    listable = args.actions == "set" and task.one_answer and int(holes.max()) <= exact.MAX_HOLES_OF_SETS
    listed = instances[: args.exact] if listable and next(iter(ceiling.metrics)) == "solved" else None
    report = {
        "command": "python benchmarks/frontier.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "points": [point.row() for point in points],
        "best_heuristics": [point.row() for point in frontier.best_of(points, False)],
        "oracle": ceiling.row(),
        "exact_bound": None if listed is None else bound(exact.fewest_forwards(task, denoiser, listed)),
        "exact_bound_instances": None if listed is None else len(listed),
        "learned": [
            {"method": point.method, **point.knob, "nfe": point.result.nfe, "solved": float(point.result.solved.mean())}
            | {f"up to {args.until:g} forwards": against(point, heuristics, args.until)}
            | {"any number": against(point, heuristics, float("inf"))}
            for point in points
            if point.learned
        ],
    }
    write_json(args.out, report)
    title = f"{task.name}, denoiser {args.denoiser}, {len(instances)} held-out instances"
    shown = [*frontier.best_of(points, False), *(point for point in points if point.learned)]
    heuristics_line = [dataclasses.replace(p, method="best of the heuristics") for p in shown if not p.learned]
    frontier.draw([*heuristics_line, *(p for p in shown if p.learned)], title, args.out.with_suffix(".png"))
    Console().print(frontier.table(points, title))


if __name__ == "__main__":
    main()
