"""Uniform against masked diffusion on 6x6 Sudoku: solve rates by number of forwards, with and without corrections.

    python benchmarks/uniform.py --jobs 2 --out benchmarks/results/uniform-sudoku6.json

One network and one training recipe for every model, and samplers that follow no order but chance: the masked model
reveals one random position per forward where there are forwards enough. A corrector's settings (10 for mdm, 8 for
udm, 6 for audm and reaudm) and the temperature are chosen on validation puzzles by the first
seed's model, by cell accuracy; test puzzles are then completed by every seed's.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import half_interval, in_parallel, once, report
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


def complete(job: Completion) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = load_model(Backbone, job.denoiser, PACKAGED_DENOISERS, "denoiser").eval()
    task = tasks.get(SETTINGS["task"], **({} if job.blanks is None else {"blanks": job.blanks}))
    puzzles = task.heldout(job.puzzles, job.split)
    generator = torch.Generator().manual_seed(1000 + job.seed)
    started = time.process_time()
    found = _sample(model, puzzles.tokens, generator, job)
    metrics = task.metrics(found.tokens, puzzles)
    return {
        "seconds": round(time.process_time() - started, 2),
        "nfe": found.nfe,
        "solved": round(float(metrics["solved"].mean()), 4),
        "cell_accuracy": round(float(metrics["cell_accuracy"].mean()), 4),
    }


def _sample(model: Backbone, prompts: Tensor, generator: torch.Generator, job: Completion) -> Samples:
    if model.noise == "mask" and job.correction is None and int((prompts == model.mask_id).sum(1).max()) <= job.nfe:
        return sample(model, prompts, generator, "event", temperature=job.temperature)
    if model.noise == "mask":
        shaped = {"temperature": job.temperature, "remasking": job.correction}
        return sample(model, prompts, generator, "ancestral", steps=job.nfe, **shaped)
    method = job.row if ROWS[job.row] == "audm" else "ancestral"
    shaped = {"temperature": job.temperature, "corrector": job.correction}
    return sample_uniform(model, prompts, generator, job.nfe, method, **shaped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nfe", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--blanks", type=int, help="fill minimal puzzles up until so many are left")
    parser.add_argument("--puzzles", type=int, default=1000, help="test puzzles")
    parser.add_argument("--validation", type=int, default=200, help="puzzles to choose settings by")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--denoiser", help="complete with this absorbing model alone, instead of training any")
    parser.add_argument("--runs", type=Path, default=Path("runs/uniform"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    def folder(model: str, seed: int) -> str:
        return args.denoiser or str(args.runs / f"{model}-{seed}")

    names = [row for row, model in ROWS.items() if model == "audm" or not args.denoiser]
    training = [Training(m, seed, args.steps, folder(m, seed)) for seed in args.seeds for m in MODELS]
    trained = [] if args.denoiser else in_parallel(train, training, args.jobs)

    # What to choose from: every temperature for itself, then every corrector at every temperature.
    first = args.seeds[0]
    choices: dict[tuple[str, int, str], list[Completion]] = {}
    for row, nfe in itertools.product(names, args.nfe):
        plain = Completion(row, folder(ROWS[row], first), nfe, "validation", args.validation, blanks=args.blanks)
        corrected = [replace(plain, correction=each) for each in corrections(row)]
        choices[row, nfe, "temperature 1"] = [plain]
        choices[row, nfe, "temperature 1, corrected"] = corrected
        choices[row, nfe, "tuned"] = [replace(plain, temperature=t) for t in TEMPERATURES]
        choices[row, nfe, "tuned, corrected"] = [replace(job, temperature=t) for t in TEMPERATURES for job in corrected]
    every = list(dict.fromkeys(itertools.chain(*choices.values())))
    validated = dict(zip(every, in_parallel(complete, every, args.jobs), strict=True))

    def better(job: Completion) -> float:
        return validated[job]["cell_accuracy"]

    chosen = {key: max(jobs, key=better) for key, jobs in choices.items()}
    tests = [
        replace(job, denoiser=folder(ROWS[job.row], seed), split="test", puzzles=args.puzzles, seed=seed)
        for job in dict.fromkeys(chosen.values())
        for seed in args.seeds
    ]
    results = dict(zip(tests, in_parallel(complete, tests, args.jobs), strict=True))

    def tested(key: tuple[str, int, str], seed: int) -> dict[str, Any]:
        job = chosen[key]
        found = replace(job, denoiser=folder(ROWS[job.row], seed), split="test", puzzles=args.puzzles, seed=seed)
        return results[found]

    rows = []
    title = "solved % (cell accuracy %), half of the 95 % interval"
    table = Table("", "", *(f"{nfe} forwards" for nfe in args.nfe), title=title)
    for row, way in itertools.product(names, dict.fromkeys(key[2] for key in choices)):
        cells = []
        for nfe in args.nfe:
            own = [tested((row, nfe, way), seed) for seed in args.seeds]
            solved, cell = ([result[name] for result in own] for name in ("solved", "cell_accuracy"))
            job = chosen[row, nfe, way]
            rows.append(
                {"row": row, "way": way, "nfe": nfe, "made": own[0]["nfe"], "temperature": job.temperature}
                | {"correction": job.label(), "solved": sum(solved) / len(solved), "each": solved}
                | {"half_interval": half_interval(solved), "cell_accuracy": sum(cell) / len(cell)}
                | {"cell_accuracy_half_interval": half_interval(cell)}
            )
            half = rows[-1]["half_interval"]
            solved = f"{100 * rows[-1]['solved']:.1f}" + ("" if half is None else f" ± {100 * half:.1f}")
            cells.append(f"{solved} ({100 * rows[-1]['cell_accuracy']:.1f})")
        table.add_row(row, way, *cells)
    differences = []
    pairs = [] if args.denoiser else PAIRS
    for (ours, theirs), nfe, way in itertools.product(pairs, args.nfe, dict.fromkeys(key[2] for key in choices)):
        differences.append({"ours": ours, "theirs": theirs, "nfe": nfe, "way": way})
        for metric in ("solved", "cell_accuracy"):
            a, b = ([tested((row, nfe, way), seed)[metric] for seed in args.seeds] for row in (ours, theirs))
            paired = [x - y for x, y in zip(a, b, strict=True)]
            found = {"mean": sum(paired) / len(paired), "half_interval": half_interval(paired), "each": paired}
            differences[-1][metric] = found
    Console().print(table)
    report(
        args.out,
        settings=SETTINGS,
        metric="share of test puzzles solved, share of their blanks right; intervals over seeds (Student's t)",
        rows=rows,
        differences=differences,
        validation=[
            {"row": job.row, "nfe": job.nfe, "temperature": job.temperature, "correction": job.label()}
            | {name: result[name] for name in ("solved", "cell_accuracy", "seconds")}
            for job, result in validated.items()
        ],
        runs=[{key: value for key, value in result.items() if key != "settings"} for result in trained],
    )


if __name__ == "__main__":
    main()
