"""Masked diffusion against its relatives on English text: the unbiased bound on held-out years, in nats per character.

    python benchmarks/text.py --jobs 2 --out benchmarks/results/text.json

One network, one corpus (State of the Union addresses: trained on until 1995, tested from 2008 on), one optimiser. Plain
masked diffusion is trained twice: for as many steps as the others, and for as much longer as LoMDM's run costs. Every
run uses one thread; what it cost is its CPU time. Beside the table (JSON), the training curves are drawn (PNG).
"""

from __future__ import annotations

import argparse
import datetime
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trained import half_interval, in_parallel, once

import tasks
from pretrain import likelihood
from pretrain.backbone import Backbone, parameter_count
from pretrain.checkpoint import write_json
from pretrain.train import OBJECTIVES

SETTINGS = {"task": "text", "batch": 16, "dim": 64, "layers": 3, "lr": 3e-3, "ema": 0.998, "log_every": 25}
OPTIONS = {"udm": {"given": 0.0}, "audm": {"given": 0.0}}  # nothing is given here, so none of the steps go to prompts


@dataclass(frozen=True)
class Job:
    """One run: ``name`` is its row in the table."""

    name: str
    seed: int
    steps: int
    windows: int
    out: Path


def run(job: Job) -> dict[str, Any]:
    kind = job.name.partition(",")[0]
    config = OBJECTIVES[kind](**SETTINGS, **OPTIONS.get(kind, {}), steps=job.steps, seed=job.seed, out=str(job.out))
    task = tasks.get(config.task)

    def measure(model: Backbone) -> dict[str, Any]:
        found: dict[str, Any] = {"name": job.name, "parameters": parameter_count(model)}
        for split in ("validation", "test"):
            clean = task.heldout(job.windows, split).answers
            bound = likelihood.bound(model, clean, torch.Generator().manual_seed(1))
            for form in ("path", "order"):
                mean, error = likelihood.mean_and_error(getattr(bound, form) / task.length)
                found[f"{split}_{form}"], found[f"{split}_{form}_error"] = round(mean, 4), round(error, 4)
        each = [round(float(value), 4) for value in bound.path / task.length]  # of test windows, for differences
        return found | {"exact": bound.exact, "each": each}

    return once(config, measure, windows=job.windows)


def curve(folder: Path) -> list[tuple[int, float]]:
    """(step, training estimate of the bound in nats per character, over 100 steps) of a run."""
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0}).Reload().Scalars("loss")
    values = torch.tensor([event.value for event in events])
    return [(events[i + 3].step, round(float(values[i : i + 4].mean()), 4)) for i in range(0, len(events) - 3, 4)]


def draw(results: list[dict[str, Any]], curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    names = list(dict.fromkeys(result["name"] for result in results))
    shown = set()
    for result in results:
        steps, values = zip(*curves[f"{result['name']}, seed {result['seed']}"], strict=True)
        look = {"color": f"C{names.index(result['name'])}", "linewidth": 1.0, "alpha": 0.8}
        look["label"] = None if result["name"] in shown else result["name"]
        shown.add(result["name"])
        axes[0].plot(steps, values, **look)
        if result["cpu_seconds"] is not None:
            axes[1].plot([s * result["cpu_seconds"] / result["steps"] / 60 for s in steps], values, **look)
    axes[0].set(xlabel="optimiser steps", ylabel="training bound, nats per character", ylim=(None, 3.0))
    axes[1].set(xlabel="minutes of one CPU core")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--longer", type=float, default=1.6, help="times LoMDM's run costs masked diffusion's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    others = ["genmd4", "learned-schedule", "ar", "block", "udm", "audm"]
    parser.add_argument("--others", nargs="*", default=others, help="one seed each")
    parser.add_argument("--windows", type=int, default=2000, help="held-out windows of 64 characters")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/text"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plan = [(name, seed) for seed in args.seeds for name in ("lomdm", "mdm, longer", "mdm")]
    plan += [(name, args.seeds[0]) for name in args.others]
    jobs = []
    for name, seed in plan:
        steps = round(args.steps * args.longer) if name == "mdm, longer" else args.steps
        folder = f"{name}-{seed}".replace(", ", "-")
        jobs.append(Job(name, seed, steps, args.windows, args.runs / folder))
    results = in_parallel(run, jobs, args.jobs)

    table = Table("", "steps", "CPU s", "nats per character", "95 % over seeds", title="test years")
    rows, differences = [], {}
    for name in dict.fromkeys(job.name for job in jobs):
        own = [result for result in results if result["name"] == name]
        values, seconds = ([result[key] for result in own] for key in ("test_path", "cpu_seconds"))
        row = {"name": name, "steps": own[0]["steps"], "seeds": len(own), "nats": round(sum(values) / len(values), 4)}
        row |= {"half_interval": half_interval(values), "cpu_seconds": None if None in seconds else max(seconds)}
        rows.append(row)
        half = "" if row["half_interval"] is None else f"± {row['half_interval']:.4f}"
        table.add_row(name, str(row["steps"]), str(row["cpu_seconds"]), f"{row['nats']:.4f}", half)
    by_run = {(result["name"], result["seed"]): result for result in results}
    for other in ("mdm", "mdm, longer"):
        for seed in args.seeds:
            ours, theirs = (torch.tensor(by_run[name, seed]["each"]) for name in ("lomdm", other))
            mean, error = likelihood.mean_and_error(ours - theirs)
            differences[f"lomdm minus {other}, seed {seed}"] = [round(mean, 4), round(error, 4)]
    Console().print(table)
    curves = {f"{job.name}, seed {job.seed}": curve(job.out) for job in jobs}
    report = {
        "command": "python benchmarks/text.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "settings": SETTINGS,
        "metric": "path bound in nats per character (ar: -log p itself); errors over windows, intervals over seeds",
        "rows": rows,
        "runs": [
            {key: value for key, value in result.items() if key not in ("each", "settings")} for result in results
        ],
        "paired differences over test windows (mean, standard error)": differences,
        "curves": curves,
    }
    write_json(args.out, report)
    draw(results, curves, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
