"""Does an order that is learned in pretraining pay? On a joint whose best order is known, and on English text.

    python benchmarks/learned_order.py --out benchmarks/results/learned-order.json
    python benchmarks/learned_order.py --data text --out benchmarks/results/learned-order-text.json

The joint (chain): the first symbol chooses one of two hidden permutations of the other positions, and along it runs a
Markov chain. So the best order is known, and depends on the context: the first position, then the chain from one end to
the other, where every conditional is one row of one table. In another order a model has to learn powers of that table.
-log p(x) is exact, so *excess* is how far a model's bound is above it, in nats per sequence, on test sequences.

Text: windows of 32 byte-pair pieces of 512, State of the Union addresses; there *excess* is the bound itself, in nats
per window, on windows of the test years, evenly spread.

Rows: masked diffusion (mdm), with as many parameters as LoMDM (mdm-wider), with as many masks in a step as RLOO draws
(mdm-batch, twice the sequences) and for more steps (mdm-longer, mdm-longest); a learned schedule per position, and per
symbol (genmd4, and by RLOO's two masks a step); LoMDM with its order learned from the first step, after half and after
0.8 of the steps; the first of these by the paper's estimator (lomdm-0-rloo); autoregression and block diffusion; and
the best order given (best-order: autoregression on the sequence written along its chain).
And, on each LoMDM that was trained, the variance of the masking weights' gradient by both estimators (Hong et al. 2026,
arXiv 2602.02112, eq. 8, is RLOO).
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from common import in_parallel, once, over_seeds, report, without_settings
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tasks
from pretrain import likelihood
from pretrain.backbone import Backbone, parameter_count
from pretrain.objectives.learned_order import ESTIMATORS, learned_order_loss
from pretrain.train import (
    ARConfig,
    BlockConfig,
    GenMD4Config,
    LearnedScheduleConfig,
    LoMDMConfig,
    MDMConfig,
    PretrainConfig,
)
from tasks import Instances, Task

LENGTH, SYMBOLS, SHARPNESS = 13, 6, 2.0


class Chain(Task):
    """Sequences (N, L): a symbol that chooses the permutation, 0 or 1, then a Markov chain along it.

    Args:
        seed: of permutations and transitions. along: sequences are written along the chain.
    """

    def __init__(self, seed: int, along: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.name, self.symbols, self.shape = "chain", tuple("abcdefgh"[:SYMBOLS]), (1, LENGTH)
        logits = torch.randn(SYMBOLS, SYMBOLS, generator=generator, dtype=torch.float64)
        self.transitions, self.along = (SHARPNESS * logits).softmax(1), along
        self.permutations = torch.stack([torch.randperm(LENGTH - 1, generator=generator) + 1 for _ in range(2)])

    def clean(self, n: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(2, (n,), generator=generator)
        chain = torch.randint(SYMBOLS, (n, 1), generator=generator)
        for _ in range(LENGTH - 2):
            drawn = torch.multinomial(self.transitions[chain[:, -1]], 1, generator=generator)
            chain = torch.cat([chain, drawn], 1)
        written = torch.cat([which.unsqueeze(1), chain], 1)
        return written if self.along else torch.empty_like(written).scatter(1, self._places(which), written)

    def _places(self, which: Tensor) -> Tensor:
        """(N, L) where each symbol of the chain stands."""
        return torch.cat([torch.zeros(len(which), 1, dtype=torch.long), self.permutations[which]], 1)

    def log_prob(self, clean: Tensor) -> Tensor:
        """(N,) exact."""
        chain = (clean if self.along else clean.gather(1, self._places(clean[:, 0])))[:, 1:]
        steps = self.transitions[chain[:, :-1], chain[:, 1:]].log().sum(1)
        return steps - torch.tensor(2.0 * SYMBOLS).double().log()

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        answers = self.clean(n, generator)
        return Instances(torch.full_like(answers, self.mask_id), answers)

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return self.log_prob(tokens).float()


# ---------------------------------------------------------------------- the variance of the order's gradient
def gradient_noise(model: Backbone, task: Task, batch: int, repeats: int) -> dict[str, float]:
    """Per estimator: total variance of the masking network's gradient over its squared mean (of both estimators)."""
    generator = torch.Generator().manual_seed(2)
    weights = list(model.order.masking.parameters())
    drawn: dict[str, list[Tensor]] = {name: [] for name in ESTIMATORS}
    for _ in range(repeats):
        clean = task.clean(batch, generator)
        for name in ESTIMATORS:
            parts = torch.autograd.grad(learned_order_loss(model, clean, generator, name)[0], weights)
            drawn[name].append(torch.cat([part.flatten() for part in parts]))
    stacked = {name: torch.stack(each) for name, each in drawn.items()}
    mean = torch.cat(list(stacked.values())).mean(0).square().sum()
    return {name: round(float(each.var(0).sum() / mean), 2) for name, each in stacked.items()}


# ---------------------------------------------------------------------- runs
ROWS: dict[str, tuple[type[PretrainConfig], dict[str, Any]]] = {
    "mdm": (MDMConfig, {}),
    "mdm-wider": (MDMConfig, {}),
    "mdm-batch": (MDMConfig, {}),
    "mdm-longer": (MDMConfig, {}),
    "mdm-longest": (MDMConfig, {}),
    "learned-schedule": (LearnedScheduleConfig, {}),
    "genmd4": (GenMD4Config, {}),
    "genmd4-rloo": (GenMD4Config, {"estimator": "rloo"}),
    "lomdm-0": (LoMDMConfig, {"order_start": 0.0}),
    "lomdm-0-rloo": (LoMDMConfig, {"order_start": 0.0, "estimator": "rloo"}),
    "lomdm-0.5": (LoMDMConfig, {"order_start": 0.5}),
    "lomdm-0.8": (LoMDMConfig, {"order_start": 0.8}),
    "ar": (ARConfig, {}),
    "block": (BlockConfig, {}),
    "best-order": (ARConfig, {}),
}


@dataclass(frozen=True)
class Data:
    """What is learned, by which rows; how often a sequence is masked in measuring. ``longer`` are multiples of the
    steps, on text mdm-longer's for as many masks as RLOO draws and mdm-longest's for its seconds; ``wider`` are the
    channels for about as many parameters."""

    settings: dict[str, Any]
    samples: int
    rows: tuple[str, ...]
    longer: dict[str, float]
    wider: int

    def task(self, row: str) -> Task:
        name = self.settings["task"]
        return Chain(seed=0, along=row == "best-order") if name == "chain" else named(name)


@functools.cache
def named(task: str) -> Task:
    """Read once in a process: the corpus is cut into pieces in about ten seconds."""
    return tasks.get(task)


DATA = {
    "chain": Data(
        {"task": "chain", "batch": 64, "lr": 3e-3, "dim": 48, "layers": 2, "ema": 0.998},
        samples=4 * LENGTH,
        rows=(
            *("mdm", "mdm-wider", "mdm-longer", "mdm-longest", "learned-schedule"),
            *("lomdm-0", "lomdm-0-rloo", "lomdm-0.5", "lomdm-0.8", "best-order"),
        ),
        longer={"mdm-longer": 1.8, "mdm-longest": 3.1},
        wider=64,
    ),
    "text": Data(
        {"task": "text:level=bpe,pieces=512,length=32", "batch": 16, "lr": 3e-3, "dim": 64, "layers": 3, "ema": 0.998},
        samples=16,
        rows=(
            *("mdm", "mdm-wider", "mdm-batch", "mdm-longer", "mdm-longest", "lomdm-0-rloo", "lomdm-0.5"),
            *("learned-schedule", "genmd4", "genmd4-rloo", "ar", "block"),
        ),
        longer={"mdm-longer": 2.0, "mdm-longest": 2.8},
        wider=80,
    ),
}
PAIRS = [
    ("lomdm-0", "mdm-longer"),
    ("lomdm-0-rloo", "mdm-wider"),
    ("lomdm-0-rloo", "mdm-batch"),
    ("lomdm-0.5", "mdm-longest"),
    ("lomdm-0-rloo", "lomdm-0.5"),
    ("lomdm-0-rloo", "mdm-longest"),
    ("lomdm-0-rloo", "mdm-longer"),
    ("lomdm-0-rloo", "lomdm-0"),
    ("lomdm-0-rloo", "learned-schedule"),
    ("lomdm-0", "learned-schedule"),
    ("lomdm-0", "mdm-wider"),
    ("lomdm-0.5", "mdm-longer"),
    ("lomdm-0.5", "genmd4"),
    ("lomdm-0-rloo", "genmd4-rloo"),
    ("lomdm-0.5", "block"),
    ("lomdm-0-rloo", "block"),
    ("genmd4-rloo", "mdm-batch"),
    ("lomdm-0", "lomdm-0.5"),
]


@dataclass(frozen=True)
class Job:
    data: str
    row: str
    seed: int
    steps: int
    sequences: int
    repeats: int
    out: str


def run(job: Job) -> dict[str, Any]:
    data, (kind, options) = DATA[job.data], ROWS[job.row]
    task, settings = data.task(job.row), data.settings | options
    if job.row == "mdm-wider":
        settings["dim"] = data.wider
    if job.row == "mdm-batch":
        settings["batch"] *= 2
    config = kind(**settings, steps=round(data.longer.get(job.row, 1) * job.steps), seed=job.seed, out=job.out)

    def measure(model: Backbone) -> dict[str, Any]:
        if isinstance(task, Chain):
            clean = task.clean(job.sequences, torch.Generator().manual_seed(1))
            entropy = -task.log_prob(clean)
        else:
            clean = task.heldout_answers(job.sequences, "test")
            entropy = torch.zeros(len(clean))
        found = likelihood.bound(model, clean, torch.Generator().manual_seed(1), samples=data.samples)
        result: dict[str, Any] = {"row": job.row, "parameters": parameter_count(model)}
        result["entropy"] = round(float(entropy.mean()), 4)
        for name, values in (("excess", found.path), ("excess in order", found.order)):
            result[name], result[f"{name}, error"] = (round(x, 4) for x in likelihood.mean_and_error(values - entropy))
        if issubclass(kind, LoMDMConfig):
            result["gradient noise"] = gradient_noise(model, task, settings["batch"], job.repeats)
        return result

    return once(config, measure, task=task, sequences=job.sequences, repeats=job.repeats)


def main(
    out: Path | None = None,
    data: Literal["chain", "text"] = "chain",
    steps: int = 3000,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    sequences: int = 2000,
    repeats: int = 200,
    jobs: int = 1,
    runs: Path = Path("runs/learned-order"),
) -> None:
    """Args: sequences: of the test. repeats: gradients of each estimator. jobs: runs at a time."""
    rows = DATA[data].rows
    every = [
        Job(data, row, seed, steps, sequences, repeats, f"{runs}/{data}/{row}-{seed}") for seed in seeds for row in rows
    ]
    results = in_parallel(run, every, jobs)
    shown = summary(results, rows)
    table = Table("", "parameters", "CPU s", "excess", "minus mdm", title="nats per sequence above -log p(x)")
    for row in shown["rows"]:
        numbers = [f"{v['mean']:+.3f} ± {v['half_interval'] or 0:.3f}" for v in (row["excess"], row["minus mdm"])]
        table.add_row(row["row"], f"{row['parameters']:,}", f"{row['seconds'] or 0:.0f}", *numbers)
    Console().print(table)
    report(out, settings=DATA[data].settings, steps=steps, **shown, runs=without_settings(results))


def summary(results: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Per row the excess over seeds; differences in pairs of the same seed; and the noise of this package's gradient
    over RLOO's, per model."""
    runs = {row: [result for result in results if result["row"] == row] for row in names}

    def minus(row: str, other: str) -> dict[str, Any]:
        return over_seeds([a["excess"] - b["excess"] for a, b in zip(runs[row], runs[other], strict=True)])

    rows = []
    for row, own in runs.items():
        seconds = [run["cpu_seconds"] for run in own if run["cpu_seconds"] is not None]
        rows.append({"row": row, "parameters": own[0]["parameters"], "excess": over_seeds([r["excess"] for r in own])})
        rows[-1] |= {"minus mdm": minus(row, "mdm"), "seconds": statistics.fmean(seconds) if seconds else None}
    noise = {row: [run.get("gradient noise") for run in own] for row, own in runs.items()}
    ratios = {row: [n["control_variate"] / n["rloo"] for n in each] for row, each in noise.items() if None not in each}
    pairs = {f"{row} minus {other}": minus(row, other) for row, other in PAIRS if {row, other} <= runs.keys()}
    return {"rows": rows, "differences": pairs, "noise of ours over rloo": ratios}


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
