"""The objective of the whole masking family, and its plainest instance, masked diffusion.

Every member is a choice of two velocities: A of the process that masks, and Â of the model that reveals. Its bound on
-log p(x) is the time integral of the expected

    sum over masked i of  A^i CE^i + A^i log(A^i / Â^i) - A^i + Â^i,     CE^i = -log p(x^i | x_t)

(Hong et al. 2026, arXiv 2602.02112, proposition 3.2; the second part is 0 where A = Â).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain import masking


def integrand(cross_entropy: Tensor, velocity: Tensor, reverse: Tensor, masked: Tensor) -> Tensor:
    """(N,) the bound's integrand at one time, in nats.

    Args:
        cross_entropy: (N, L) -log p(x^i | x_t). velocity, reverse: (N, L) A and Â, at least 0, Â above 0 where A is.
        masked: (N, L) bool.
    """
    flows = masked & (velocity > 0)
    ratio = torch.where(flows, velocity, 1.0) / torch.where(flows, reverse, 1.0)
    terms = velocity * (cross_entropy + ratio.log()) + (reverse - velocity)
    return torch.where(masked, terms, 0.0).sum(1)


def cross_entropies(log_probs: Tensor, clean: Tensor) -> Tensor:
    """(N, L) -log p(x^i | x_t) of the clean symbols, from (N, L, V) log-probabilities."""
    return F.nll_loss(log_probs.transpose(1, 2), clean, reduction="none")


def masked_diffusion_loss(
    model: nn.Module, clean: Tensor, mask_id: int, generator: torch.Generator, prompt_length: int = 0
) -> Tensor:
    """One-sample estimate, per position behind the prompt, of the bound on -log p(x) in nats, given the prompt.

    E_t (1/t) * sum over masked l of -log p(x_l | x_t), with t uniform: the negative ELBO of masked diffusion with
    the linear schedule (Sahoo et al. 2024, arXiv 2406.07524, eq. 11; Shi et al. 2024, arXiv 2406.04329, eq. 4), which
    is :func:`integrand` with A = Â = 1/t.

    Args:
        model: maps (N, L) tokens to an output with ``logits`` (N, L, V).
        clean: (N, L) int64 complete sequences. prompt_length: first positions that are given and never masked.

    Returns:
        Scalar float32: the bound divided by the number of positions behind the prompt, averaged over the batch.
    """

    def beliefs(noisy: Tensor) -> list[Tensor]:
        return [model(noisy).logits.float().log_softmax(-1)]

    return losses_of_passes(beliefs, clean, mask_id, generator, prompt_length)[0]


def losses_of_passes(
    beliefs: Callable[[Tensor], Sequence[Tensor]],
    clean: Tensor,
    mask_id: int,
    generator: torch.Generator,
    prompt_length: int = 0,
) -> Tensor:
    """(P,) the same estimate for each pass over the same noisy sequences.

    Args:
        beliefs: maps (N, L) tokens to (N, L, V) log-probabilities per pass, as :meth:`Backbone.passes` does.
    """
    t = masking.low_discrepancy_times(clean.shape[0], generator).unsqueeze(1)
    behind = torch.arange(clean.shape[1], device=clean.device) >= prompt_length
    noisy = masking.mask(clean, t * behind, mask_id, generator)
    masked, positions = noisy == mask_id, clean.shape[1] - prompt_length
    losses = [integrand(cross_entropies(belief.float(), clean), 1 / t, 1 / t, masked) for belief in beliefs(noisy)]
    return torch.stack([loss.mean() / positions for loss in losses])
