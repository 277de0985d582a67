"""Masked diffusion against its relatives on English text: the unbiased bound on held-out years, in nats per character.

    python benchmarks/text.py --jobs 2 --out benchmarks/results/text.json

One network (about 1 million parameters), one corpus (State of the Union addresses: trained on until 1995, tested from
2008 on), one optimiser. Plain masked diffusion is trained twice: for as many steps as the others, and for as much
longer as LoMDM's step costs. Every run uses one thread; what it cost is its CPU time. Beside the table (JSON), the
training curves are drawn (PNG).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tasks
from pretrain import bounds
from pretrain.backbone import parameter_count
from pretrain.checkpoint import write_json
from pretrain.train import OBJECTIVES, pretrain

SETTINGS = {"task": "text", "batch": 32, "dim": 128, "layers": 5, "lr": 3e-3, "ema": 0.995, "log_every": 25}
CONTROLS = {"lomdm, c2 = 0": ("lomdm", {"c2": 0.0})}  # LoMDM's exponents without an order: 0.7 everywhere


@dataclass(frozen=True)
class Job:
    """One run: ``name`` is its row in the table."""

    name: str
    seed: int
    steps: int
    windows: int
    out: Path


def run(job: Job) -> dict[str, Any]:
    """Train and evaluate, unless that was done before; one thread, all messages to a file."""
    finished = job.out / "result.json"
    if finished.exists():
        return json.loads(finished.read_text())
    torch.set_num_threads(1)
    kind, changes = CONTROLS.get(job.name, (job.name.partition(",")[0], {}))
    config = OBJECTIVES[kind](
        **SETTINGS | changes,
        steps=job.steps,
        seed=job.seed,
        threads=1,
        out=str(job.out),
        resume=(job.out / "state.safetensors").exists(),
    )
    job.out.mkdir(parents=True, exist_ok=True)
    with (job.out / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        started = time.process_time()
        model = pretrain(config)
        seconds = time.process_time() - started
    task = tasks.get(config.task)
    result: dict[str, Any] = {
        "name": job.name,
        "seed": job.seed,
        "steps": job.steps,
        "parameters": parameter_count(model),
        "cpu_seconds": None if config.resume else round(seconds, 1),
    }
    for split in ("validation", "test"):
        found = bounds.bound(model, task.heldout(job.windows, split).answers, torch.Generator().manual_seed(1))
        for form in ("path", "order"):
            mean, error = bounds.mean_and_error(getattr(found, form) / task.length)
            result[f"{split}_{form}"], result[f"{split}_{form}_error"] = round(mean, 4), round(error, 4)
    result["exact"] = found.exact
    result["each"] = [round(float(value), 4) for value in found.path / task.length]  # of test windows, for differences
    write_json(finished, result)
    return result


def curve(folder: Path) -> list[tuple[int, float]]:
    """(step, training estimate of the bound in nats per character) of a run."""
    events = EventAccumulator(str(folder / "tb")).Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars("loss")]


def draw(results: list[dict[str, Any]], curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for result in results:
        steps, values = zip(*curves[f"{result['name']}/{result['seed']}"], strict=True)
        smooth = torch.tensor(values).unfold(0, 8, 1).mean(1).tolist()  # one-sample estimates are noisy
        first = result["seed"] == 0
        look = {"label": result["name"] if first else None, "alpha": 1.0 if first else 0.4, "linewidth": 1.2}
        names = list(dict.fromkeys(r["name"] for r in results))
        look["color"] = f"C{names.index(result['name'])}"
        axes[0].plot(steps[7:], smooth, **look)
        if result["cpu_seconds"] is not None:
            axes[1].plot([s * result["cpu_seconds"] / result["steps"] / 60 for s in steps[7:]], smooth, **look)
    axes[0].set(xlabel="optimiser steps", ylabel="training bound, nats per character", ylim=(1.4, 3.0))
    axes[1].set(xlabel="minutes of one CPU core")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def interval(values: list[float]) -> float | None:
    """Half the 95 % interval of a mean over seeds (Student's t), None for fewer than 3."""
    quantile = {3: 4.303, 4: 3.182, 5: 2.776}.get(len(values))
    return None if quantile is None else quantile * float(torch.tensor(values).std()) / len(values) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--longer", type=float, default=2.17, help="times LoMDM's step costs masked diffusion's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=2000, help="held-out windows of 64 characters")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/text"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    longer = round(args.steps * args.longer)
    plan = [(name, seed) for seed in args.seeds for name in ("lomdm", "mdm, equal time", "mdm")]
    plan += [(name, args.seeds[0]) for name in ("genmd4", "learned-schedule", *CONTROLS, "ar", "block")]
    jobs = [
        Job(
            name,
            seed,
            longer if name == "mdm, equal time" else args.steps,
            args.windows,
            args.runs / f"{name.replace(', ', '-').replace(' = ', '')}-{seed}".replace(" ", "-"),
        )
        for name, seed in plan
    ]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(run, jobs))

    table = Table("", "steps", "CPU s", "nats per character", "95 % over seeds", title="test years, path bound")
    rows = []
    for name in dict.fromkeys(job.name for job in jobs):
        own = [result for result in results if result["name"] == name]
        values = [result["test_path"] for result in own]
        half = interval(values)
        seconds = [result["cpu_seconds"] for result in own if result["cpu_seconds"] is not None]
        row = {"name": name, "steps": own[0]["steps"], "seeds": len(own), "nats": sum(values) / len(values)}
        row |= {"half_interval": half, "cpu_seconds": sum(seconds) / len(seconds) if seconds else None}
        rows.append(row)
        cost = "" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.0f}"
        table.add_row(name, str(row["steps"]), cost, f"{row['nats']:.4f}", "" if half is None else f"± {half:.4f}")
    differences = {}
    for name in ("mdm", "mdm, equal time"):
        for seed in args.seeds:
            ours, theirs = (
                torch.tensor(next(r["each"] for r in results if (r["name"], r["seed"]) == (n, seed)))
                for n in ("lomdm", name)
            )
            mean, error = bounds.mean_and_error(ours - theirs)
            differences[f"lomdm minus {name}, seed {seed}"] = [round(mean, 4), round(error, 4)]
    Console().print(table)
    curves = {f"{job.name}/{job.seed}": curve(job.out) for job in jobs}
    report = {
        "command": "python benchmarks/text.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "settings": SETTINGS,
        "metric": "path bound in nats per character; of ar the exact -log p; errors over windows",
        "rows": rows,
        "runs": [{key: value for key, value in result.items() if key != "each"} for result in results],
        "paired differences over windows (mean, standard error)": differences,
        "curves": curves,
    }
    write_json(args.out, report)
    draw(results, curves, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
