"""What a vocabulary of 126,464 symbols costs: bytes kept per recorded step and board, and the peak of a rollout.

    python benchmarks/memory.py --out benchmarks/results/memory.json

Each peak is of a fresh process, above its loaded model; the bare forward takes all 32 masked positions at once.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import torch
import tyro
from common import report
from overhead import Letters
from torch import Tensor

from tasks import Instances
from unmask_env.process import Unmasking
from unmask_env.reference import reference
from unmask_env.state import Denoised

VOCABULARY, LENGTH, MASKED, BOARDS = 126_464, 96, 32, 4


class Words(Letters):
    symbols, shape = tuple(map(str, range(VOCABULARY))), (1, LENGTH)


class Large:
    hidden_dim, device, calls = None, torch.device("cpu"), 0
    words, places = torch.randn(VOCABULARY, 64), torch.randn(LENGTH, 64)

    def log_probs(self, tokens: Tensor, rows: Tensor, at: Tensor) -> Tensor:
        return ((self.places[at] + self.words[tokens % VOCABULARY].mean(1)[rows]) @ self.words.T).log_softmax(-1)

    def __call__(self, tokens: Tensor, where: Tensor) -> Denoised:
        return Denoised.at(where, VOCABULARY, lambda rows, at: self.log_probs(tokens, rows, at))


def storages(value: object) -> dict[int, int]:
    """Bytes by address of every storage that ``value`` keeps alive."""
    if isinstance(value, Tensor):
        return {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()}
    parts = vars(value).values() if is_dataclass(value) else value if isinstance(value, list | tuple) else ()
    return {address: size for part in parts for address, size in storages(part).items()}


def measure(what: str) -> float:
    """Mebibytes of resident memory at most that ``bare`` or ``rollout`` adds, or kibibytes that ``recorded`` keeps."""
    process, draws = Unmasking(Words(), Large()), torch.Generator().manual_seed(0)
    answers = torch.randint(VOCABULARY, (BOARDS, LENGTH), generator=draws)
    tokens = torch.where(torch.arange(LENGTH) >= LENGTH - MASKED, VOCABULARY, answers)
    played = (reference("softmax_confidence"), Instances(tokens, answers), draws)
    if what == "recorded":
        return sum(storages(process.rollout(*played, record=True).steps).values()) / 2**10 / MASKED / BOARDS
    # A child's ru_maxrss begins at its parent's size, so the level before is read elsewhere.
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    for _ in range(MASKED if what == "bare" else 0):
        process.denoiser.log_probs(tokens, *(tokens == VOCABULARY).nonzero(as_tuple=True)).topk(16, -1)
    if what == "rollout":
        process.rollout(*played)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before


def main(measured: str = "", out: Path | None = None) -> None:
    if measured:  # one of them, in this process
        return print(measure(measured))
    command, parts = [sys.executable, __file__, "--measured"], ("bare", "rollout", "recorded")
    bare, rollout, kept = (round(float(subprocess.check_output([*command, part])), 1) for part in parts)
    print(f"{kept} KiB per board and step (at most 64); bare forward {bare} MiB, rollout {rollout} MiB (at most 1.3 x)")
    report(out, bare_mib=bare, rollout_mib=rollout, kib_per_board_and_step=kept, peak_ratio=round(rollout / bare, 3))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
