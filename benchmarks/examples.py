"""What the examples of the documentation learn: UPO's setting (4x4 Sudoku, 8 blanks, cell accuracy, a denoiser stopped
after 100 steps), from an order at random, 1,000 test puzzles.

    python benchmarks/examples.py --out benchmarks/results/examples.json

Runs that are in ``runs`` already are not repeated; with ``--gather`` none is started.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from common import over_seeds, report

WEAK = "--steps 100 --batch 128 --dim 48 --layers 3 --lr 3e-3 --warmup 50 --ema 0.95 --seed 0 --threads 1"
EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@dataclass(frozen=True)
class Examples:
    """Train every example with every seed."""

    runs: Path = Path("runs/examples")
    seeds: tuple[int, ...] = (0, 1, 2)
    gather: bool = False
    """report the runs that are there"""
    out: Path | None = None
    """JSON"""


def cells(result: dict[str, Any]) -> dict[str, float]:
    """Share of the cells that are right, by order."""
    if "rows" in result:
        return {row["order"]: row["cell_accuracy"] for row in result["rows"]}
    return {"random": result["reference"], "max_confidence": result["max_confidence"], "learned": result["policy"]}


def main(command: Examples) -> None:
    denoiser, found = command.runs / "weak", {}
    pretrain = [sys.executable, "-m", "agents.cli", "pretrain", "mdm", "--task", "sudoku4", *WEAK.split()]
    if not command.gather:
        subprocess.run([*pretrain, "--resume", "auto", "--out", str(denoiser)], check=True)
    for example in sorted(EXAMPLES.glob("*.py")):
        runs = []
        for seed in command.seeds:
            file = command.runs / f"{example.stem}-{seed}.json"
            if not file.exists() and command.gather:
                continue
            if not file.exists():
                options = ["--denoiser", str(denoiser), "--seed", str(seed), "--out", str(file)]
                subprocess.run([sys.executable, str(example), *options], check=True)
            result = json.loads(file.read_text())
            kept = {key: result[key] for key in ("iterations", "cpu_seconds", "rows", "curve") if key in result}
            runs.append({"seed": seed, "cells": cells(result)} | kept)
        if runs:
            found[example.stem] = {"runs": runs, "learned": over_seeds([run["cells"]["learned"] for run in runs])}
    report(command.out, pretrain=f"unmask pretrain mdm --task sudoku4 {WEAK}", examples=found)
    for name, of in found.items():
        print(name, *(f"{run['cells']['learned']:.3f}" for run in of["runs"]))


if __name__ == "__main__":
    main(tyro.cli(Examples, config=(tyro.conf.OmitArgPrefixes,)))
