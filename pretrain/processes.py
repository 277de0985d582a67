"""Noise processes: how complete sequences lose their symbols."""

from __future__ import annotations

import torch
from torch import Tensor


def low_discrepancy_times(n: int, generator: torch.Generator) -> Tensor:
    """(n,) times in (0, 1], one in each of n equal intervals: t_i = (i + 1 - u) / n with one shared u in [0, 1).

    The variance-reduced sampler of variational diffusion models (Kingma et al. 2021, arXiv 2107.00630, appendix I.1).
    """
    u = torch.rand((), generator=generator, device=generator.device)
    return (torch.arange(1, n + 1, device=generator.device) - u) / n


def mask(clean: Tensor, t: Tensor, mask_id: int, generator: torch.Generator) -> Tensor:
    """Masked diffusion with the linear schedule: each symbol of row i becomes ``mask_id`` with probability t_i.

    Args:
        clean: (N, L) int64. t: (N,) in [0, 1].

    Returns:
        (N, L) int64.
    """
    hide = torch.rand(clean.shape, generator=generator, device=clean.device) < t.unsqueeze(1)
    return torch.where(hide, mask_id, clean)
