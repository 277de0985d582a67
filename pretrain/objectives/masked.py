"""The masked-diffusion objective."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain import processes


def masked_diffusion_loss(model: nn.Module, clean: Tensor, mask_id: int, generator: torch.Generator) -> Tensor:
    """One-sample estimate, per position, of the bound on -log p(x) in nats.

    E_t (1/t) * sum over masked l of -log p(x_l | x_t), with t uniform: the negative ELBO of masked diffusion with
    the linear schedule (Sahoo et al. 2024, arXiv 2406.07524, eq. 11; Shi et al. 2024, arXiv 2406.04329, eq. 4).

    Args:
        model: maps (N, L) tokens to an output with ``logits`` (N, L, V).
        clean: (N, L) int64 complete sequences.

    Returns:
        Scalar float32: the bound divided by L, averaged over the batch.
    """
    t = processes.low_discrepancy_times(clean.shape[0], generator)
    noisy = processes.mask(clean, t, mask_id, generator)
    logits = model(noisy).logits.float()
    cross_entropy = F.cross_entropy(logits.transpose(1, 2), clean, reduction="none")  # (N, L)
    return torch.where(noisy == mask_id, cross_entropy / t.unsqueeze(1), 0.0).mean()
