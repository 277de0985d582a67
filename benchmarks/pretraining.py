"""What a training step costs beside one forward and backward of the same backbone: time per clean token, as ratios.

    python benchmarks/pretraining.py --threads 1 --out benchmarks/results/pretraining.json

*Plain* is the backbone's forward and backward with a cross-entropy at every position. Repeats are interleaved; medians.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from common import interleaved, median_ratio, report

from pretrain.backbone import Backbone
from pretrain.train import OBJECTIVES, Objective

TARGETS = {"mdm": 1.1, "lomdm": 2.2}


def measure(batch: int, length: int, vocab_size: int, dim: int, layers: int, repeats: int) -> dict[str, float]:
    """Seconds per step over seconds per plain step, per objective."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(vocab_size, (batch, length), generator=generator)

    def backbone(**order: object) -> Backbone:
        torch.manual_seed(0)
        return Backbone(vocab_size, [[i] for i in range(length)], dim, layers, 4, **order)

    plain_model = backbone()

    def plain() -> None:
        F.cross_entropy(plain_model(clean).logits.transpose(1, 2), clean).backward()

    steps: dict[str, Callable[[], None]] = {"plain": plain}
    for name, config in OBJECTIVES.items():
        settings = config(task="", out="")
        objective = Objective(backbone(**settings.architecture()), settings)
        steps[name] = lambda objective=objective: objective(clean, generator)[0].backward()
    spent = interleaved(steps, repeats)
    return {name: median_ratio(spent[name], spent["plain"]) for name in OBJECTIVES}


def main(
    batch: int = 32,
    length: int = 128,
    vocab_size: int = 84,
    dim: int = 128,
    layers: int = 5,
    repeats: int = 9,
    threads: int | None = None,
    out: Path | None = None,
) -> None:
    torch.set_num_threads(threads or torch.get_num_threads())
    ratios = measure(batch, length, vocab_size, dim, layers, repeats)
    for name, ratio in ratios.items():
        print(f"{name:20s}{ratio:8.2f} of a plain step" + (f" (at most {TARGETS[name]})" if name in TARGETS else ""))
    report(out, ratios=ratios)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
