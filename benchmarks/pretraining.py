"""What a training step costs beside one forward and backward of the same backbone: time per clean token, as ratios.

    python benchmarks/pretraining.py --threads 1 --out benchmarks/results/pretraining.json

*Plain* is the backbone's forward and backward with a cross-entropy at every position. Repeats are interleaved; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import report

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
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if repeat:  # the first round warms up
                spent[name].append(time.perf_counter() - started)
    pairs = {name: zip(spent[name], spent["plain"], strict=True) for name in OBJECTIVES}
    return {name: statistics.median(a / b for a, b in pair) for name, pair in pairs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=84)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ratios = measure(args.batch, args.length, args.vocab_size, args.dim, args.layers, args.repeats)
    for name, ratio in ratios.items():
        print(f"{name:20s}{ratio:8.2f} of a plain step" + (f" (at most {TARGETS[name]})" if name in TARGETS else ""))
    report(args.out, ratios=ratios)


if __name__ == "__main__":
    main()
