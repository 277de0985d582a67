"""Learned against fixed schedules on discretised tables: validation loss, and how good generated rows are.

    python benchmarks/tabular.py --jobs 2 --out benchmarks/results/tabular.json

The setting of Garg et al. 2025 (arXiv 2511.19152): small models, every column by masked diffusion, one schedule for all
columns (mdm) or a learned one for each (learned-schedule), the same hyperparameters. *Places* tell the order that a
learned schedule means: how many columns are unmasked before each one, on average. Losses are path bounds in nats per
row; Shape and Trend are of as many generated rows as there are test rows, column by column in the model's own order.
Beside the JSON a PNG shows the places, each seed a point.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from common import in_parallel, once, over_seeds, report, without_settings
from rich.console import Console
from rich.table import Table

from agents import frontier
from pretrain import likelihood, samplers
from pretrain.backbone import Backbone, parameter_count
from pretrain.orders import PositionOrder
from pretrain.train import OBJECTIVES
from tasks import Tabular

SETTINGS = {"batch": 256, "dim": 48, "layers": 2, "lr": 3e-3, "ema": 0.998, "weight_decay": 0.03}
KINDS = ("mdm", "learned-schedule")
MEASURES = ("validation", "test", "shape", "trend")


@dataclass(frozen=True)
class Job:
    source: str
    kind: str
    seed: int
    steps: int
    out: Path


def run(job: Job) -> dict[str, Any]:
    config = OBJECTIVES[job.kind](
        **SETTINGS, task=f"tabular:{job.source}", steps=job.steps, seed=job.seed, out=str(job.out)
    )
    task = Tabular(job.source)

    def measure(model: Backbone) -> dict[str, Any]:
        found: dict[str, Any] = {"source": job.source, "kind": job.kind, "parameters": parameter_count(model)}
        for split in ("validation", "test"):
            rows = task.heldout(len(task.rows[split]), split).answers
            bound = likelihood.bound(model, rows, torch.Generator().manual_seed(1), samples=2 * task.length)
            found[split], found[f"{split}_error"] = (round(x, 4) for x in likelihood.mean_and_error(bound.path))
        draw = torch.Generator().manual_seed(job.seed)
        empty = torch.full((len(task.rows["test"]), task.length), task.mask_id)
        found |= {k: round(v, 4) for k, v in task.quality(samplers.sample(model, empty, draw).tokens, draw).items()}
        if isinstance(model.order, PositionOrder):
            places = model.order.expected_places().tolist()
            found["places"] = {name: round(place, 2) for name, place in zip(task.table.names, places, strict=True)}
        return found

    return once(config, measure)


def draw(results: list[dict[str, Any]], sources: tuple[str, ...], file: Path) -> None:
    """The place of every column in the orders that learned schedules mean, one panel per table, one point per seed."""
    figure = frontier.matplotlib().figure.Figure(figsize=(3.6 * len(sources), 4), layout="constrained")
    for axes, source in zip(figure.subplots(1, len(sources), squeeze=False)[0], sources, strict=True):
        places = [result["places"] for result in results if result["source"] == source and "places" in result]
        mean = {name: sum(seed[name] for seed in places) / len(places) for name in places[0]}
        names = sorted(mean, key=mean.__getitem__, reverse=True)
        for seed in places:
            axes.plot([seed[name] for name in names], names, ".", color="C0", alpha=0.5)
        axes.plot([mean[name] for name in names], names, "|", color="black")
        axes.axvline((len(names) - 1) / 2, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=source, xlabel="columns unmasked before")
    figure.savefig(file, dpi=120)


def main(
    out: Path,
    sources: tuple[str, ...] = ("magic", "letter", "adult"),
    steps: int = 1500,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    jobs: int = 1,
    runs: Path = Path("runs/tabular"),
) -> None:
    """Args: jobs: runs at a time."""
    every = [
        Job(source, kind, seed, steps, runs / f"{source}-{kind}-{seed}")
        for source, seed, kind in itertools.product(sources, seeds, KINDS)
    ]
    results = dict(zip(every, in_parallel(run, every, jobs), strict=True))
    rows: list[dict[str, Any]] = []
    table = Table("", "", *MEASURES, title="mean over seeds, half of the 95 % interval")
    for source in sources:
        own = {kind: [r for job, r in results.items() if (job.source, job.kind) == (source, kind)] for kind in KINDS}
        for kind in KINDS:
            found = {name: over_seeds([result[name] for result in own[kind]]) for name in MEASURES}
            rows.append({"source": source, "kind": kind})
            rows[-1] |= {name: [v["mean"], v["half_interval"]] for name, v in found.items()}
            cells = ((v["mean"], v["half_interval"]) for v in found.values())
            table.add_row(source, kind, *(f"{m:.4f}" + (f" ± {h:.4f}" if h else "") for m, h in cells))
        for name in MEASURES:  # the same seeds, so in pairs
            paired = [round(b[name] - a[name], 4) for a, b in zip(*own.values(), strict=True)]
            rows.append({"source": source, "learned minus fixed": name, **over_seeds(paired)})
    Console().print(table)
    draw(list(results.values()), sources, out.with_suffix(".png"))
    report(out, settings=SETTINGS, rows=rows, runs=without_settings(list(results.values())))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
