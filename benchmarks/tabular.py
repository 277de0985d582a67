"""Learned against fixed schedules on discretised tables: validation loss, and how good generated rows are.

    python benchmarks/tabular.py --jobs 2 --out benchmarks/results/tabular.json

The setting of Garg et al. 2025 (arXiv 2511.19152): small models, every column by masked diffusion, one schedule for all
columns (mdm) or a learned one for each (learned-schedule), the same hyperparameters. Losses are path bounds in nats per
row; Shape and Trend are of as many generated rows as there are test rows, column by column in the model's own order.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import half_interval, in_parallel, once, report
from rich.console import Console
from rich.table import Table

from pretrain import likelihood, samplers
from pretrain.backbone import Backbone, parameter_count
from pretrain.train import OBJECTIVES
from tasks import Tabular

SETTINGS = {"batch": 256, "dim": 48, "layers": 2, "lr": 3e-3, "ema": 0.998, "weight_decay": 0.03}
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
        weights = model.order.order_weights(rows[:1], None)[0].detach()
        return found | {"weights": [round(float(w), 3) for w in weights]}

    return once(config, measure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", default=["magic", "letter"])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/tabular"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    jobs = [
        Job(source, kind, seed, args.steps, args.runs / f"{source}-{kind}-{seed}")
        for source in args.sources
        for seed in args.seeds
        for kind in ("mdm", "learned-schedule")
    ]
    results = in_parallel(run, jobs, args.jobs)
    rows = []
    table = Table("", "", *MEASURES, title="mean over seeds, half of the 95 % interval")
    for source in args.sources:
        by_kind = {
            kind: [result for result in results if (result["source"], result["kind"]) == (source, kind)]
            for kind in ("mdm", "learned-schedule")
        }
        for kind, own in by_kind.items():
            columns = {name: [result[name] for result in own] for name in MEASURES}
            row = {"source": source, "kind": kind}
            row |= {name: [sum(v) / len(v), half_interval(v)] for name, v in columns.items()}
            rows.append(row)
            table.add_row(source, kind, *(f"{m:.4f}" + (f" ± {h:.4f}" if h else "") for m, h in list(row.values())[2:]))
        for name in MEASURES:  # the same seeds, so in pairs
            paired = [b[name] - a[name] for a, b in zip(*by_kind.values(), strict=True)]
            rows.append({"source": source, "learned minus fixed": name, "mean": sum(paired) / len(paired)})
            rows[-1] |= {"half_interval": half_interval(paired), "each": [round(x, 4) for x in paired]}
    Console().print(table)
    report(
        args.out,
        settings=SETTINGS,
        rows=rows,
        runs=[{key: value for key, value in result.items() if key != "settings"} for result in results],
    )


if __name__ == "__main__":
    main()
