"""Does an order that is learned in pretraining find the best order of a joint where that is known?

    python benchmarks/learned_order.py --out benchmarks/results/learned-order.json

The joint: the first symbol chooses one of two hidden permutations of the other positions, and along it runs a Markov
chain. So the best order is known, and depends on the context: the first position, then the chain from one end to the
other, where every conditional is one row of one table. In another order a model has to learn powers of that table.
-log p(x) is exact, so *excess* is how far a model's bound is above it, in nats per sequence, on test sequences.

Rows: masked diffusion (mdm), with as many parameters as LoMDM (mdm-wider) and for more steps (mdm-longer, mdm-longest);
a learned schedule per position; LoMDM with its order learned from the first step, after half and after 0.8 of the
steps; the first of these by the paper's estimator (lomdm-0-rloo); and the best order given (best-order: autoregression
on the sequence written along its chain). And, on each LoMDM that was trained, the variance of the masking weights'
gradient: this package's estimator beside two-sample RLOO of the whole loss (Hong et al. 2026, arXiv 2602.02112, eq. 8)
at the same times.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from common import in_parallel, once, over_seeds, report, without_settings
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pretrain import likelihood
from pretrain.backbone import Backbone, parameter_count
from pretrain.objectives.learned_order import at_even_shares, learned_order_loss
from pretrain.objectives.masked import integrand
from pretrain.train import ARConfig, LearnedScheduleConfig, LoMDMConfig, MDMConfig, PretrainConfig
from tasks import Instances, Task

LENGTH, SYMBOLS, SHARPNESS = 13, 6, 2.0
SETTINGS = {"task": "chain", "batch": 64, "lr": 3e-3, "heads": 4, "layers": 2, "ema": 0.998}
LONGER = {"mdm-longer": 1.8, "mdm-longest": 3.1}  # times the steps: the latter for the seconds of lomdm-0-rloo


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
def rloo(model: Backbone, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The paper's surrogate, (l_1 + l_2) / 2 + (log q(z_1) - log q(z_2)) stopgrad(l_1 - l_2) / 2, at this package's
    times, and the estimate of the bound; as :func:`pretrain.objectives.learned_order.learned_order_loss`."""
    at, losses, chances = at_even_shares(model, clean, generator), [], []
    for _ in range(2):
        masked, cross_entropy, reverse = at.draw()
        losses.append(integrand(cross_entropy, at.velocity, reverse, masked))
        chances.append(at.schedule.log_probability(masked, at.log_t))
    score = (chances[0] - chances[1]) * (losses[0] - losses[1]).detach() / 2
    mean = (losses[0] + losses[1]) / 2
    return (mean + score).mean() / clean.shape[1], mean.detach().mean() / clean.shape[1]


class RLOOConfig(LoMDMConfig):
    """LoMDM by the paper's estimator."""

    def objective(
        self, model: Backbone, clean: Tensor, generator: torch.Generator, done: float
    ) -> tuple[Tensor, Tensor]:
        return rloo(model, clean, generator)


def gradient_noise(model: Backbone, task: Chain, repeats: int) -> dict[str, float]:
    """Per estimator: total variance of the masking network's gradient over its squared mean (of both estimators)."""
    generator = torch.Generator().manual_seed(2)
    weights = list(model.order.masking.parameters())
    estimators = {"rloo": rloo, "ours": learned_order_loss}
    drawn: dict[str, list[Tensor]] = {name: [] for name in estimators}
    for _ in range(repeats):
        clean = task.clean(SETTINGS["batch"], generator)
        for name, estimator in estimators.items():
            parts = torch.autograd.grad(estimator(model, clean, generator)[0], weights)
            drawn[name].append(torch.cat([part.flatten() for part in parts]))
    stacked = {name: torch.stack(each) for name, each in drawn.items()}
    mean = torch.cat(list(stacked.values())).mean(0).square().sum()
    return {name: round(float(each.var(0).sum() / mean), 2) for name, each in stacked.items()}


# ---------------------------------------------------------------------- runs
ROWS: dict[str, tuple[type[PretrainConfig], dict[str, Any]]] = {
    "mdm": (MDMConfig, {}),
    "mdm-wider": (MDMConfig, {"dim": 64}),
    "mdm-longer": (MDMConfig, {}),
    "mdm-longest": (MDMConfig, {}),
    "learned-schedule": (LearnedScheduleConfig, {}),
    "lomdm-0": (LoMDMConfig, {"order_start": 0.0}),
    "lomdm-0-rloo": (RLOOConfig, {"order_start": 0.0}),
    "lomdm-0.5": (LoMDMConfig, {"order_start": 0.5}),
    "lomdm-0.8": (LoMDMConfig, {"order_start": 0.8}),
    "best-order": (ARConfig, {}),
}


PAIRS = [
    ("lomdm-0", "mdm-longer"),
    ("lomdm-0-rloo", "mdm-longest"),
    ("lomdm-0-rloo", "mdm-longer"),
    ("lomdm-0-rloo", "lomdm-0"),
    ("lomdm-0-rloo", "learned-schedule"),
    ("lomdm-0", "learned-schedule"),
    ("lomdm-0", "mdm-wider"),
    ("lomdm-0.5", "mdm-longer"),
    ("lomdm-0", "lomdm-0.5"),
]


@dataclass(frozen=True)
class Job:
    row: str
    seed: int
    steps: int
    dim: int
    sequences: int
    repeats: int
    out: str


def run(job: Job) -> dict[str, Any]:
    kind, options = ROWS[job.row]
    task = Chain(seed=0, along=job.row == "best-order")
    config = kind(**SETTINGS | {"dim": job.dim} | options, steps=job.steps, seed=job.seed, out=job.out)

    def measure(model: Backbone) -> dict[str, Any]:
        clean = task.clean(job.sequences, torch.Generator().manual_seed(1))
        found = likelihood.bound(model, clean, torch.Generator().manual_seed(1), samples=4 * LENGTH)
        exact = -task.log_prob(clean)
        result: dict[str, Any] = {"row": job.row, "parameters": parameter_count(model)}
        result["entropy"] = round(float(exact.mean()), 4)
        for name, values in (("excess", found.path), ("excess in order", found.order)):
            result[name], result[f"{name}, error"] = (round(x, 4) for x in likelihood.mean_and_error(values - exact))
        if issubclass(kind, LoMDMConfig):
            result["gradient noise"] = gradient_noise(model, task, job.repeats)
        return result

    return once(config, measure, task=task, sequences=job.sequences, repeats=job.repeats)


def main(
    out: Path | None = None,
    steps: int = 3000,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    dim: int = 48,
    sequences: int = 2000,
    repeats: int = 200,
    jobs: int = 1,
    runs: Path = Path("runs/learned-order"),
) -> None:
    """Args: sequences: of the test. repeats: gradients of each estimator. jobs: runs at a time."""
    lasts = {row: round(LONGER.get(row, 1) * steps) for row in ROWS}
    measured = (dim, sequences, repeats)
    every = [Job(row, seed, lasts[row], *measured, f"{runs}/{row}-{seed}") for seed in seeds for row in ROWS]
    results = in_parallel(run, every, jobs)
    shown = summary(results)
    table = Table("", "parameters", "CPU s", "excess", "minus mdm", title="nats per sequence above -log p(x)")
    for row in shown["rows"]:
        numbers = [f"{v['mean']:+.3f} ± {v['half_interval'] or 0:.3f}" for v in (row["excess"], row["minus mdm"])]
        table.add_row(row["row"], f"{row['parameters']:,}", f"{row['seconds'] or 0:.0f}", *numbers)
    Console().print(table)
    report(out, settings=SETTINGS | {"dim": dim}, steps=steps, **shown, runs=without_settings(results))


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per row the excess over seeds; differences in pairs of the same seed; and the noise of this package's gradient
    over RLOO's, per model."""
    runs = {row: [result for result in results if result["row"] == row] for row in ROWS}

    def minus(row: str, other: str) -> dict[str, Any]:
        return over_seeds([a["excess"] - b["excess"] for a, b in zip(runs[row], runs[other], strict=True)])

    rows = []
    for row, own in runs.items():
        seconds = [run["cpu_seconds"] for run in own if run["cpu_seconds"] is not None]
        rows.append({"row": row, "parameters": own[0]["parameters"], "excess": over_seeds([r["excess"] for r in own])})
        rows[-1] |= {"minus mdm": minus(row, "mdm"), "seconds": statistics.fmean(seconds) if seconds else None}
    noise = {row: [run.get("gradient noise") for run in own] for row, own in runs.items()}
    ratios = {row: [n["ours"] / n["rloo"] for n in each] for row, each in noise.items() if None not in each}
    pairs = {f"{row} minus {other}": minus(row, other) for row, other in PAIRS}
    return {"rows": rows, "differences": pairs, "noise of ours over rloo": ratios}


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
