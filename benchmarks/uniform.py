"""Uniform against masked diffusion on 6x6 Sudoku and on characters: scores by number of forwards, over seeds.

    python benchmarks/uniform.py --out benchmarks/results/uniform-sudoku6.json
    python benchmarks/uniform.py --data text --seeds 0 1 2 --nfe 16 64 --instances 300 --steps 3000 \
        --out benchmarks/results/uniform-text.json

One network and one training recipe for every model, all by cross-entropy, and samplers that follow no order but chance:
the masked model reveals one random position per forward where there are forwards enough. Every way of sampling has
fixed settings, so that nothing is chosen. ``udm-loo, bound`` goes on by the plug-in bound from the network that
cross-entropy trained.

On Sudoku puzzles are completed, and the score is whether they are solved. On text windows are drawn from nothing, and
the score is that of the task free_text: exp of the mean log-probability of a symbol under an autoregressive model,
which repetition loses; nothing is given in training either.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from common import in_parallel, once, over_seeds, report, without_settings
from rich.console import Console
from rich.table import Table

import tasks
from pretrain.backbone import Backbone, parameter_count
from pretrain.checkpoint import PACKAGED_DENOISERS, load_model
from pretrain.samplers import Remasking, Samples, sample
from pretrain.train import OBJECTIVES
from pretrain.uniform_samplers import Corrector, sample_uniform


@dataclass(frozen=True)
class Data:
    """What is learned, with the share of sequences of which a part is given; what is completed; the metrics of that,
    the score first; and the ways that are left out."""

    settings: dict[str, Any]
    prompt_fraction: float
    task: str
    metrics: tuple[str, str]
    without: tuple[str, ...] = ()


DATA = {
    # Puzzles give cells, so all that uniform models see gives some.
    "sudoku6": Data(
        {"task": "sudoku6", "batch": 128, "dim": 48, "layers": 3, "lr": 3e-3},
        1.0,
        "sudoku6",
        ("solved", "cell_accuracy"),
    ),
    "text": Data(
        {"task": "text", "batch": 16, "dim": 64, "layers": 3, "lr": 3e-3},
        0.0,
        "free_text",
        ("reward", "entropy"),
        without=("T = 0", "T = 0 on the denoiser"),
    ),
}
UNIFORM = {"loss": "cross_entropy"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mdm": ("mdm", {}),
    "udm-denoiser": ("udm", UNIFORM | {"predicts": "denoiser"}),
    "udm-loo": ("udm", UNIFORM | {"predicts": "loo"}),
    "audm": ("audm", UNIFORM),
    "udm-loo, bound": ("udm", {"loss": "bound", "predicts": "loo"}),
}
STARTS = {"udm-loo, bound": "udm-loo"}  # model: the one that it goes on from

PLAIN: dict[str, dict[str, Any]] = {"T = 1": {}}
TEMPERED = {f"T = {t:g}": {"temperature": t} for t in (0.5, 0.0)}
OF_DENOISER = {f"{name} on the denoiser": how | {"tempers": "denoiser"} for name, how in TEMPERED.items()}
BLIND = {f"1 x {n} random": {"corrector": Corrector(1, "random", n)} for n in (4, 12)}
INFORMED = {"1 x 4 margin": {"corrector": Corrector(1, "margin", 4)}}
EVERY = PLAIN | TEMPERED | OF_DENOISER | BLIND | INFORMED
WAYS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {  # row of the table: its model, and how it is sampled
    "mdm": ("mdm", PLAIN | TEMPERED | {"remasked": {"remasking": Remasking("rescale", 0.5)}}),
    "udm-denoiser": ("udm-denoiser", EVERY),
    "udm-denoiser by coupling": ("udm-denoiser", {"T = 1": {"method": "coupling"}}),
    "udm-loo": ("udm-loo", EVERY),
    "audm": ("audm", PLAIN | TEMPERED | BLIND),
    "reaudm": ("audm", {name: how | {"method": "reaudm"} for name, how in (PLAIN | TEMPERED | BLIND).items()}),
    "udm-loo, bound": ("udm-loo, bound", PLAIN),
}
# Differences between rows, paired by seed: (row, way) against (row, way).
SAME_WAY = [("udm-loo", "udm-denoiser"), ("audm", "mdm"), ("reaudm", "mdm"), ("audm", "udm-denoiser by coupling")]
SAME_ROW = [
    ("1 x 4 margin", "1 x 4 random"),
    ("1 x 4 margin", "1 x 12 random"),
    ("1 x 4 margin", "T = 1"),
    ("1 x 4 random", "T = 1"),
    ("1 x 12 random", "T = 1"),
    ("remasked", "T = 1"),
    ("T = 0.5", "T = 0.5 on the denoiser"),
    ("T = 0", "T = 0 on the denoiser"),
    ("T = 0.5", "T = 1"),
    ("T = 0", "T = 1"),
    ("T = 0.5 on the denoiser", "T = 1"),
    ("T = 0 on the denoiser", "T = 1"),
]
OTHERS = [
    (("udm-denoiser", "T = 1"), ("mdm", "T = 1")),
    (("udm-loo, bound", "T = 1"), ("udm-loo", "T = 1")),
    (("udm-loo, bound", "T = 1"), ("udm-denoiser", "T = 1")),
    (("reaudm", "T = 1"), ("mdm", "remasked")),
]
Key = tuple[str, str]


@dataclass(frozen=True)
class Training:
    data: str
    model: str
    seed: int
    steps: int
    runs: Path

    @property
    def out(self) -> str:
        return str(self.runs / self.data / f"{self.model.replace(', ', '-')}-{self.seed}")

    def start(self) -> str | None:
        return None if self.model not in STARTS else replace(self, model=STARTS[self.model]).out


def train(job: Training) -> dict[str, Any]:
    (kind, options), data = MODELS[job.model], DATA[job.data]
    shared = data.settings | options | {"steps": job.steps, "seed": job.seed, "out": job.out, "init": job.start()}
    if kind != "mdm":
        shared["prompt_fraction"] = data.prompt_fraction
    return once(OBJECTIVES[kind](**shared), lambda model: {"model": job.model, "parameters": parameter_count(model)})


@dataclass(frozen=True)
class Completion:
    """How one model completes test instances: a row and a way of sampling, in ``nfe`` forwards."""

    row: str
    way: str
    nfe: int
    training: Training
    instances: int
    blanks: int | None


def complete(job: Completion) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = load_model(Backbone, job.training.out, PACKAGED_DENOISERS, "denoiser").eval()
    data = DATA[job.training.data]
    task = tasks.get(data.task, **({"blanks": job.blanks} if job.blanks and data.task == "sudoku6" else {}))
    instances = task.heldout(job.instances, "test")
    generator = torch.Generator().manual_seed(1000 + job.training.seed)
    started, how = time.process_time(), WAYS[job.row][1][job.way]
    if model.noise == "mask":
        samples = _unmask(model, instances.tokens, generator, job.nfe, how)
    else:
        samples = sample_uniform(model, instances.tokens, generator, job.nfe, **how)
    metrics = task.metrics(samples.tokens, instances)
    found = {"seconds": round(time.process_time() - started, 2), "nfe": samples.nfe}
    return found | {name: round(float(metrics[name].mean()), 4) for name in data.metrics}


def _unmask(
    model: Backbone, prompts: torch.Tensor, generator: torch.Generator, nfe: int, how: dict[str, Any]
) -> Samples:
    if "remasking" not in how and int((prompts == model.mask_id).sum(1).max()) <= nfe:
        return sample(model, prompts, generator, "event", **how)  # one position per forward
    return sample(model, prompts, generator, "ancestral", steps=nfe, **how)


def ways_of(data: Data) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Per row its model and its ways of sampling."""
    return {row: (model, tuple(w for w in ways if w not in data.without)) for row, (model, ways) in WAYS.items()}


def differences(ways: dict[str, tuple[str, tuple[str, ...]]]) -> list[tuple[Key, Key]]:
    """What the table compares."""
    models = [((a, way), (b, way)) for a, b in SAME_WAY for way in ways[a][1] if way in ways[b][1]]
    rows = [((row, a), (row, b)) for row, (_, has) in ways.items() for a, b in SAME_ROW if a in has and b in has]
    return models + rows + OTHERS


def percent(value: dict[str, Any], sign: str = "") -> str:
    half = "" if value["half_interval"] is None else f" ± {100 * value['half_interval']:.1f}"
    return f"{100 * value['mean']:{sign}.1f}{half}"


def main(
    out: Path,
    data: Literal["sudoku6", "text"] = "sudoku6",
    steps: int = 2500,
    warm_steps: int = 1000,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    nfe: tuple[int, ...] = (8, 16, 32),
    blanks: int | None = 18,
    instances: int = 1000,
    jobs: int = 1,
    runs: Path = Path("runs/uniform"),
) -> None:
    """Args:
    warm_steps: of a training that goes on from another. blanks: fill minimal puzzles up until so many are left.
        instances: of the test split. jobs: runs at a time.
    """
    score, *others = metrics = DATA[data].metrics
    every = ways_of(DATA[data])
    training = {(m, s): Training(data, m, s, warm_steps if m in STARTS else steps, runs) for s in seeds for m in MODELS}
    trained = in_parallel(train, list(training.values()), jobs)
    tests = {
        (row, way, n, seed): Completion(row, way, n, training[model, seed], instances, blanks)
        for row, (model, ways) in every.items()
        for way, n, seed in itertools.product(ways, nfe, seeds)
    }
    results = dict(zip(tests, in_parallel(complete, list(tests.values()), jobs), strict=True))

    def each(key: Key, n: int, metric: str) -> list[float]:
        return [results[(*key, n, seed)][metric] for seed in seeds]

    rows, compared = [], []
    table = Table("", "", *(f"{n} forwards" for n in nfe), title=f"{score} %, half of the 95 % interval over seeds")
    for key in [(row, way) for row, (_, ways) in every.items() for way in ways]:
        for n in nfe:
            found = {metric: over_seeds(each(key, n, metric)) for metric in metrics}
            rows.append({"row": key[0], "way": key[1], "nfe": n, "made": each(key, n, "nfe")[0]} | found)
        table.add_row(*key, *(percent(row[score]) for row in rows[-len(nfe) :]))
    table.add_section()
    for ours, theirs in differences(every):
        for n in nfe:
            pairs = zip(each(ours, n, score), each(theirs, n, score), strict=True)
            found = over_seeds([a - b for a, b in pairs])
            compared.append({"ours": ours, "theirs": theirs, "nfe": n, score: found})
        table.add_row(
            ", ".join(ours), f"minus {', '.join(theirs)}", *(percent(c[score], "+") for c in compared[-len(nfe) :])
        )
    Console(width=150).print(table)
    metric = f"{score} (compared) and {', '.join(others)} of test instances; intervals over seeds (Student's t)"
    shown = {"settings": DATA[data].settings, "steps": steps, "warm_steps": warm_steps, "instances": instances}
    if data == "sudoku6":
        shown["blanks"] = blanks
    report(out, **shown, metric=metric, rows=rows, differences=compared, runs=without_settings(trained))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
