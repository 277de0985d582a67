"""UPO's setting (4x4 Sudoku, 8 blanks, cell accuracy) on denoisers made weak on purpose by stopping training early.

    python benchmarks/denoiser_strength.py --out benchmarks/results/denoiser-strength.json

For each number of pretraining steps: the heuristics, the oracle order, UPO from the max-confidence reference alone (the
paper's realisation with cross-entropy), imitation of the oracle, and UPO from there. A small denoiser
trained to the end leaves an order no room at all.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from agents import demo, evaluate, imitation, upo
from agents.policy import PolicyShape
from pretrain.checkpoint import write_json
from pretrain.train import PretrainConfig, pretrain
from tasks import Sudoku
from unmask_env.denoiser import load_denoiser


def train_all(steps: int, seed: int, runs: Path, console: Console) -> tuple[Sudoku, list[evaluate.Result]]:
    """Denoiser and policies for one number of pretraining steps, evaluated on 1,000 test puzzles."""
    task = Sudoku(2, 2, blanks=8, reward="cell_accuracy")

    def folder(name: str) -> dict[str, Any]:
        out = runs / f"{steps}-{seed}-{name}"
        return {"out": str(out), "resume": (out / "state.safetensors").exists(), "seed": seed}

    config = PretrainConfig(
        task="sudoku4", steps=steps, batch=128, dim=48, layers=3, lr=3e-3, warmup=50, ema=0.95, **folder("denoiser")
    )
    denoiser = load_denoiser(pretrain(config), task)
    orders = {name: evaluate.load_order(name, task) for name in (*demo.HEURISTICS, "oracle")}
    alone = upo.UPOConfig(
        reference="max_confidence",
        iterations=60,
        lr=1e-3,
        shape=PolicyShape(sure=2.0, readings=1),
        **folder("upo-alone"),
    )
    orders["UPO from max_confidence"] = upo.train(alone, task, denoiser)
    shape = PolicyShape(sure=2.0)
    reader = imitation.ImitationConfig(puzzles=1500, steps=500, shape=shape, **folder("imitation"))
    orders["imitation"] = imitation.train(reader, task, denoiser)
    both = upo.UPOConfig(init=reader.out, iterations=20, **folder("upo"))
    orders["imitation, then UPO"] = upo.train(both, task, denoiser)
    results = evaluate.evaluate(task, denoiser, orders, task.heldout(1000))
    console.print(evaluate.table(results, f"{task.name}, 8 blanks, denoiser of {steps} steps, seed {seed}"))
    return task, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 140, 180])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/strength"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    report: dict[str, Any] = {
        "command": "python benchmarks/denoiser_strength.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "metric": "cell accuracy over 8 blanks, 1,000 test puzzles; differences in points, paired, 95 % interval",
        "strengths": [],
    }
    console = Console()
    for steps in args.steps:
        _, results = train_all(steps, args.seed, args.runs, console)
        by_name = {result.order: result for result in results}
        gains = {}
        for learned in ("UPO from max_confidence", "imitation", "imitation, then UPO"):
            for other in ("random", "max_confidence", "margin"):
                own, theirs = by_name[learned].metrics["cell_accuracy"], by_name[other].metrics["cell_accuracy"]
                gains[f"{learned} minus {other}"] = [round(100 * x, 2) for x in evaluate.paired_difference(own, theirs)]
        report["strengths"].append({"steps": steps, "rows": [r.row() for r in results], "gains": gains})
        write_json(args.out, report)


if __name__ == "__main__":
    main()
