"""Uniform against masked diffusion on 6x6 Sudoku: solve rates by number of forwards, with and without corrections.

    python benchmarks/uniform.py --jobs 2 --out benchmarks/results/uniform-sudoku6.json

One network and one training recipe for every model, and samplers that follow no order but chance: the masked model
reveals one random position per forward where there are forwards enough. A corrector's settings (10 for mdm, 8 for udm,
6 for audm and reaudm) and the temperature are chosen on validation puzzles by the first seed's model, by cell accuracy;
test puzzles are then completed by every seed's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from common import in_parallel, once, over_seeds, report, without_settings
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tasks
from pretrain.backbone import Backbone, parameter_count
from pretrain.checkpoint import PACKAGED_DENOISERS, load_model
from pretrain.samplers import Remasking, Samples, sample
from pretrain.train import OBJECTIVES
from pretrain.uniform_samplers import Corrector, sample_uniform

SETTINGS = {"task": "sudoku6", "batch": 128, "dim": 48, "layers": 3, "lr": 3e-3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # puzzles give cells, so all that uniform models see gives some
    "mdm": ("mdm", {}),
    "udm-denoiser": ("udm", {"predicts": "denoiser", "prompt_fraction": 1.0}),
    "udm-loo": ("udm", {"predicts": "loo", "prompt_fraction": 1.0}),
    "udm-denoiser-ce": ("udm", {"predicts": "denoiser", "loss": "cross_entropy", "prompt_fraction": 1.0}),
    "udm-loo-ce": ("udm", {"predicts": "loo", "loss": "cross_entropy", "prompt_fraction": 1.0}),
    "audm": ("audm", {"prompt_fraction": 1.0}),
}
ROWS = {model: model for model in MODELS} | {"reaudm": "audm"}
PAIRS = [("udm-loo", "udm-denoiser"), ("udm-loo-ce", "udm-denoiser-ce"), ("audm", "mdm"), ("reaudm", "mdm")]
TEMPERATURES = (1.0, 0.0)
WAYS = ("temperature 1", "temperature 1, corrected", "tuned", "tuned, corrected")
METRICS = ("solved", "cell_accuracy")


@dataclass(frozen=True)
class Training:
    model: str
    seed: int
    steps: int
    out: str


def train(job: Training) -> dict[str, Any]:
    kind, options = MODELS[job.model]
    config = OBJECTIVES[kind](**SETTINGS, **options, steps=job.steps, seed=job.seed, out=job.out)
    return once(config, lambda model: {"model": job.model, "parameters": parameter_count(model)})


@dataclass(frozen=True)
class Completion:
    """How one model completes puzzles: ``row`` of the table, by ``nfe`` forwards."""

    row: str
    denoiser: str
    nfe: int
    split: str
    puzzles: int
    seed: int = 0
    temperature: float = 1.0
    correction: Corrector | Remasking | None = None
    blanks: int | None = None

    def label(self) -> str:
        made = self.correction
        if made is None:
            return "none"
        if isinstance(made, Remasking):
            return f"remasking {made.strategy}" + ("" if made.strategy == "conf" else f" {made.eta}")
        return f"{made.steps} x {made.positions} {made.selection}"


def corrections(row: str) -> Iterator[Corrector | Remasking]:
    """What the corrected version of a row chooses from."""
    if row == "mdm":
        yield from (Remasking("cap", eta) for eta in (0.02, 0.04, 0.1, 0.2))
        yield from (Remasking("rescale", eta) for eta in (0.05, 0.2, 0.5))
        yield from (Remasking("loop", eta) for eta in (0.02, 0.1))
        yield Remasking("conf")
        return
    for steps, positions in itertools.product((1, 2), (1, 4, 12)):
        yield Corrector(steps, "random", positions)
    if ROWS[row] != "audm":  # whose corrector is blind
        yield from (Corrector(1, "margin", positions) for positions in (1, 4))


def ways_of(plain: Completion) -> list[list[Completion]]:
    """By way, what to choose from: every temperature for itself, then every corrector at every temperature."""
    corrected = [replace(plain, correction=each) for each in corrections(plain.row)]
    warm = [[replace(job, temperature=t) for t in TEMPERATURES for job in jobs] for jobs in ([plain], corrected)]
    return [[plain], corrected, *warm]


def complete(job: Completion) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = load_model(Backbone, job.denoiser, PACKAGED_DENOISERS, "denoiser").eval()
    task = tasks.get(SETTINGS["task"], **({} if job.blanks is None else {"blanks": job.blanks}))
    puzzles = task.heldout(job.puzzles, job.split)
    generator = torch.Generator().manual_seed(1000 + job.seed)
    started = time.process_time()
    samples = _sample(model, puzzles.tokens, generator, job)
    metrics = task.metrics(samples.tokens, puzzles)
    found = {"seconds": round(time.process_time() - started, 2), "nfe": samples.nfe}
    return found | {name: round(float(metrics[name].mean()), 4) for name in METRICS}


def _sample(model: Backbone, prompts: Tensor, generator: torch.Generator, job: Completion) -> Samples:
    if model.noise == "mask" and job.correction is None and int((prompts == model.mask_id).sum(1).max()) <= job.nfe:
        return sample(model, prompts, generator, "event", temperature=job.temperature)
    if model.noise == "mask":
        shaped = {"temperature": job.temperature, "remasking": job.correction}
        return sample(model, prompts, generator, "ancestral", steps=job.nfe, **shaped)
    method = job.row if ROWS[job.row] == "audm" else "ancestral"
    shaped = {"temperature": job.temperature, "corrector": job.correction}
    return sample_uniform(model, prompts, generator, job.nfe, method, **shaped)


Tested = Callable[[str, int, str, str], list[Any]]  # of a row, a number of forwards, a way and a metric, by seed


def show(chosen: dict[tuple[str, int, str], Completion], tested: Tested) -> list[dict[str, Any]]:
    """Print the table; its rows."""
    rows, title = [], "solved % (cell accuracy %), half of the 95 % interval"
    nfe = list(dict.fromkeys(n for _, n, _ in chosen))
    table = Table("", "", *(f"{n} forwards" for n in nfe), title=title)
    for row, way in dict.fromkeys((row, way) for row, _, way in chosen):
        cells = []
        for n in nfe:
            solved, cell = (over_seeds(tested(row, n, way, metric)) for metric in METRICS)
            job = chosen[row, n, way]
            rows.append(
                {"row": row, "way": way, "nfe": n, "made": tested(row, n, way, "nfe")[0]}
                | {"temperature": job.temperature, "correction": job.label()}
                | {"solved": solved["mean"], "each": solved["each"], "half_interval": solved["half_interval"]}
                | {"cell_accuracy": cell["mean"], "cell_accuracy_half_interval": cell["half_interval"]}
            )
            half = "" if solved["half_interval"] is None else f" ± {100 * solved['half_interval']:.1f}"
            cells.append(f"{100 * solved['mean']:.1f}{half} ({100 * cell['mean']:.1f})")
        table.add_row(row, way, *cells)
    Console().print(table)
    return rows


def difference(pair: tuple[str, str], n: int, way: str, tested: Tested) -> dict[str, Any]:
    """Of the first of a pair of rows minus the second, seed by seed."""
    ours, theirs = pair
    found: dict[str, Any] = {"ours": ours, "theirs": theirs, "nfe": n, "way": way}
    for metric in METRICS:
        pairs = zip(tested(ours, n, way, metric), tested(theirs, n, way, metric), strict=True)
        found[metric] = over_seeds([a - b for a, b in pairs])
    return found


def main(
    out: Path,
    steps: int = 4000,
    seeds: tuple[int, ...] = (0, 1, 2),
    nfe: tuple[int, ...] = (8, 16, 32),
    blanks: int | None = None,
    puzzles: int = 1000,
    validation: int = 200,
    jobs: int = 1,
    denoiser: str | None = None,
    runs: Path = Path("runs/uniform"),
) -> None:
    """Args:
    blanks: fill minimal puzzles up until so many are left. puzzles: of the test split. validation: puzzles to choose
        settings by. jobs: runs at a time. denoiser: complete with this absorbing model alone, instead of training any.
    """

    def folder(model: str, seed: int) -> str:
        return denoiser or str(runs / f"{model}-{seed}")

    names = [row for row, model in ROWS.items() if model == "audm" or not denoiser]
    training = [Training(m, seed, steps, folder(m, seed)) for seed in seeds for m in MODELS]
    trained = [] if denoiser else in_parallel(train, training, jobs)

    choices: dict[tuple[str, int, str], list[Completion]] = {}
    for row, n in itertools.product(names, nfe):
        plain = Completion(row, folder(ROWS[row], seeds[0]), n, "validation", validation, blanks=blanks)
        choices |= {(row, n, way): own for way, own in zip(WAYS, ways_of(plain), strict=True)}
    every = list(dict.fromkeys(itertools.chain(*choices.values())))
    validated = dict(zip(every, in_parallel(complete, every, jobs), strict=True))
    chosen = {key: max(own, key=lambda job: validated[job]["cell_accuracy"]) for key, own in choices.items()}

    def test(job: Completion, seed: int) -> Completion:
        return replace(job, denoiser=folder(ROWS[job.row], seed), split="test", puzzles=puzzles, seed=seed)

    tests = [test(job, seed) for job in dict.fromkeys(chosen.values()) for seed in seeds]
    results = dict(zip(tests, in_parallel(complete, tests, jobs), strict=True))

    def tested(row: str, n: int, way: str, metric: str) -> list[Any]:
        return [results[test(chosen[row, n, way], seed)][metric] for seed in seeds]

    compared = [] if denoiser else itertools.product(PAIRS, nfe, WAYS)
    report(
        out,
        settings=SETTINGS,
        metric="share of test puzzles solved, share of their blanks right; intervals over seeds (Student's t)",
        rows=show(chosen, tested),
        differences=[difference(pair, n, way, tested) for pair, n, way in compared],
        validation=[
            {"row": job.row, "nfe": job.nfe, "temperature": job.temperature, "correction": job.label()}
            | {name: result[name] for name in (*METRICS, "seconds")}
            for job, result in validated.items()
        ],
        runs=without_settings(trained),
    )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
