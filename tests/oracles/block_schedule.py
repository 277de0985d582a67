"""The schedule whose objective block diffusion's is: a proof in tests, since training draws a time for each block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockSchedule:
    """Blocks are revealed one after another, each within its own window of time: block 0 first.

    1 - alpha^i(t) = clip(B t - (B - 1 - b(i)), 0, 1) for B blocks. One position per block is the autoregressive order;
    one block is masked diffusion; in between is block diffusion (Arriola et al. 2025, arXiv 2503.09573).

    Args:
        block: (L,) int64, the block of each position, 0 .. B - 1.
    """

    block: Tensor

    @property
    def blocks(self) -> int:
        return int(self.block.max()) + 1

    def _local(self, t: Tensor) -> Tensor:
        return self.blocks * t.unsqueeze(1) - (self.blocks - 1 - self.block)

    def masked_probability(self, t: Tensor) -> Tensor:
        return self._local(t).clamp(0.0, 1.0)

    def velocity(self, t: Tensor) -> Tensor:
        local = self._local(t)
        inside = (local > 0) & (local <= 1)
        return torch.where(inside, self.blocks / torch.where(inside, local, 1.0), 0.0)
