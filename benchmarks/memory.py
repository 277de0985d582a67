"""What a vocabulary of 126,464 symbols costs: bytes kept per recorded step and board, and the peak of a rollout.

    python benchmarks/memory.py --out benchmarks/results/memory.json

Boards of 96 positions, of which 32 are masked, and a denoiser whose logits are a real matrix product. The bare forward
makes the logits of the masked positions and takes their log-softmax and most likely symbols, as any decoder does.
Peaks are of the resident memory above that of the loaded model, each measured in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from common import report
from torch import Tensor

from tasks import Instances, Task
from unmask_env.process import Unmasking
from unmask_env.reference import reference
from unmask_env.state import Denoised

VOCABULARY, LENGTH, MASKED, DIM, BOARDS = 126_464, 96, 32, 64, 4
TARGETS = {"kib_per_board_and_step": 64.0, "peak_ratio": 1.3}


class Words(Task):
    """The last 32 of 96 words are hidden."""

    name, symbols, shape = "words", tuple(map(str, range(VOCABULARY))), (1, LENGTH)

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        answers = torch.randint(VOCABULARY, (n, LENGTH), generator=generator)
        return Instances(torch.where(torch.arange(LENGTH) >= LENGTH - MASKED, self.mask_id, answers), answers)

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return (tokens == instances.answers).float().mean(1)


class Large:
    """Logits are a function of the position and of the words on the board."""

    hidden_dim, device, calls = None, torch.device("cpu"), 0

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.words, self.places = (torch.randn(n, DIM, generator=generator) for n in (VOCABULARY + 1, LENGTH))

    def states(self, tokens: Tensor) -> Tensor:
        return self.places + self.words[tokens].mean(1, keepdim=True)  # (N, L, D)

    def __call__(self, tokens: Tensor, where: Tensor) -> Denoised:
        states = self.states(tokens)
        return Denoised.at(where, VOCABULARY, lambda rows, at: (states[rows, at] @ self.words[:-1].T).log_softmax(-1))

    def bare(self, tokens: Tensor) -> None:
        states = self.states(tokens)[tokens == VOCABULARY]
        (states @ self.words[:-1].T).log_softmax(-1).topk(16, -1)


def storages(value: Any, seen: dict[int, int]) -> dict[int, int]:
    """Bytes by address of every storage that ``value`` keeps alive."""
    if isinstance(value, Tensor):
        seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif is_dataclass(value) or isinstance(value, list | tuple):
        for part in vars(value).values() if is_dataclass(value) else value:
            storages(part, seen)
    return seen


def measure(what: str) -> float:
    """Mebibytes of resident memory that one of the two adds, or kibibytes that recording keeps."""
    torch.set_num_threads(1)
    task, denoiser = Words(), Large()
    process, generator = Unmasking(task, denoiser), torch.Generator().manual_seed(0)
    instances = task.sample(BOARDS, generator)
    denoiser.states(instances.tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if what == "bare":
        for _ in range(MASKED):
            denoiser.bare(instances.tokens)
    else:
        played = process.rollout(reference("softmax_confidence"), instances, generator, record=what == "recorded")
        if what == "recorded":
            return sum(storages(played.steps, {}).values()) / 2**10 / len(played.steps) / BOARDS
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=["bare", "rollout", "recorded"], help="one of them, in this process")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.measure:
        print(measure(args.measure))
        return
    bare, rollout, kept = (
        float(subprocess.run([sys.executable, __file__, "--measure", what], capture_output=True, check=True).stdout)
        for what in ("bare", "rollout", "recorded")
    )
    found = {"kib_per_board_and_step": round(kept, 1), "peak_ratio": round(rollout / bare, 3)}
    print(f"bare forward {bare:.0f} MiB, rollout {rollout:.0f} MiB")
    for name, value in found.items():
        print(f"{name:28s}{value:8.2f} (at most {TARGETS[name]})")
    report(args.out, bare_mib=round(bare, 1), rollout_mib=round(rollout, 1), **found)


if __name__ == "__main__":
    main()
