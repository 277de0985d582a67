"""What each part of the order policy buys, on 6x6 Sudoku: one short imitation run per variant, all else equal.

    python benchmarks/ablations.py --out benchmarks/results/ablations.json

Evaluated on the validation puzzles, so that choices made here do not leak into the test results, and on hard training
puzzles (not solvable by singles) under new symmetries, where differences show sooner.
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

from agents import evaluate, imitation, upo
from agents.imitation import ImitationConfig
from agents.policy import PolicyShape
from pretrain.backbone import parameter_count
from pretrain.checkpoint import write_json
from tasks import Sudoku
from unmask_env.denoiser import load_denoiser

VARIANTS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "one reading": {"readings": 1},
    "not copied from the denoiser": {"copy": False},
    "without the symbols on the board": {"tokens": False},
    "without the denoiser's top symbols": {"top_tokens": False},
    "with the denoiser's hidden states": {"hidden": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoiser", default="sudoku6-tiny")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--puzzles", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    task = Sudoku(2, 3)
    denoiser = load_denoiser(args.denoiser, task)
    generator = torch.Generator().manual_seed(0)
    hard = task.heldout(500, split="train", difficulty="hard")
    sets = {"validation": task.heldout(2000, "validation"), "hard": task.augment(hard, generator)}
    console = Console()
    rows: list[dict[str, Any]] = []

    def measure(name: str, order: Any, parameters: int | None) -> None:
        row: dict[str, Any] = {"variant": name, "parameters": parameters}
        for split, instances in sets.items():
            (result,) = evaluate.evaluate(task, denoiser, {name: order}, instances)
            failed = int((1 - result.solved).sum())
            row[split] = {
                "n": len(instances),
                "failures": failed,
                "failure_ci95": evaluate.wilson(failed, len(instances)),
            }
        rows.append(row)
        console.print(row, highlight=False)
        report = {
            "command": "python benchmarks/ablations.py " + " ".join(sys.argv[1:]),
            "date": datetime.date.today().isoformat(),
            "rows": rows,
        }
        write_json(args.out, report)

    measure("margin (no policy)", evaluate.load_order("margin", task), None)
    for name, changes in VARIANTS.items():
        out = args.runs / name.replace(" ", "-")
        config = ImitationConfig(
            out=str(out),
            puzzles=args.puzzles,
            steps=args.steps,
            seed=args.seed,
            shape=dataclasses.replace(PolicyShape(), **changes),
            resume=(out / "state.safetensors").exists(),
        )
        policy = imitation.train(config, task, denoiser)
        measure(name, policy, parameter_count(policy))
    out = args.runs / "upo-alone"
    alone = upo.UPOConfig(
        out=str(out),
        reference="softmax_margin",
        iterations=30,
        seed=args.seed,
        resume=(out / "state.safetensors").exists(),
    )
    policy = upo.train(alone, task, denoiser)
    measure("UPO alone, from softmax_margin", policy, parameter_count(policy))


if __name__ == "__main__":
    main()
