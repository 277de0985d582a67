"""Losses of the models that are more than plain masked diffusion: learned orders, block diffusion, autoregression.

Shapes: N sequences, L positions, V symbols.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain import processes
from pretrain.backbone import Backbone
from pretrain.objectives.masked import cross_entropies, integrand
from pretrain.processes import Powers


def learned_order_loss(model: Backbone, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(surrogate to differentiate, one-sample estimate of the bound in nats per position), scalars.

    The estimate's gradient in the trunk and in the revealing exponents is the bound's; the masking exponents also
    decide which masks are drawn. So a second mask z_2 is drawn at the same time, and the surrogate adds the
    score-function term with its loss as the baseline,

        log q(z_1 | x) stopgrad(l(z_1) - l(z_2)),

    unbiased because z_2 is independent of z_1. It is one half of the symmetric two-sample estimator (RLOO; Hong et al.
    2026, arXiv 2602.02112, eq. 8; GenMD4), whose halves have the same expectation, and needs no gradients of z_2: a
    step is one forward and backward of z_1 and one forward each of z_2 and, where the order reads it, of x.

    Args:
        clean: (N, L) int64 complete sequences.
    """
    t = processes.low_discrepancy_times(clean.shape[0], generator)
    hidden = None
    if model.order.reads_clean:
        with torch.no_grad():
            hidden = model.trunk(clean)
    # The bound does not depend on the exponents' common scale, its variance does: times are drawn for a mean of 1, where
    # every share of masked positions is as frequent. At LoMDM's 0.7 nearly clean sequences, from which a model learns
    # first, would be rare and weigh much.
    scale = 1 / model.order.mean
    schedule = Powers(scale * model.order.exponents(clean, hidden))
    probability, velocity = schedule.masked_probability(t).detach(), schedule.velocity(t).float()

    def draw() -> tuple[Tensor, Tensor]:
        """A mask (N, L) and the loss (N,) of the sequences under it."""
        noisy = processes.mask(clean, probability, model.mask_id, generator)
        log_probs, exponents = model.order.reverse(*model(noisy))
        cross_entropy = cross_entropies(log_probs.float(), clean)
        masked = noisy == model.mask_id
        return masked, integrand(cross_entropy, velocity, scale * exponents.float() / t.unsqueeze(1), masked)

    masked, first = draw()
    bound = first.mean() / clean.shape[1]  # of the first alone: with c1 = 1, c2 = 0 masked diffusion's to the bit
    if not model.order.learned:
        return bound, bound.detach()
    with torch.no_grad():
        _, second = draw()
    score = schedule.log_probability(masked, t) * (first - second).detach()
    return bound + score.mean() / clean.shape[1], bound.detach()


def block_loss(model: Backbone, clean: Tensor, generator: torch.Generator) -> Tensor:
    """One-sample estimate of block diffusion's bound on -log p(x), in nats per position; exact for blocks of one.

    Each block has its own time: sum over blocks of E_t (1/t) sum over its masked positions of -log p(x^i | the blocks
    before, the rest of its own) (Arriola et al. 2025, arXiv 2503.09573, eq. 8). With one position per block the mask is
    certain and t cancels: the autoregressive cross-entropy.

    Args:
        model: with a ``block_length``. clean: (N, L) int64.
    """
    n, length = clean.shape
    block = processes.blocks_of(length, model.block_length or length).to(clean.device)
    if model.block_length == 1:
        logits = model.predict_blocks(torch.full_like(clean, model.mask_id), clean).float()
        return cross_entropies(logits.log_softmax(-1), clean).mean()
    blocks = int(block[-1]) + 1
    t = processes.low_discrepancy_times(n * blocks, generator)
    t = t[torch.randperm(n * blocks, generator=generator, device=t.device)].view(n, blocks)[:, block]  # (N, L)
    noisy = processes.mask(clean, t, model.mask_id, generator)
    logits = model.predict_blocks(noisy, clean).float()
    cross_entropy = cross_entropies(logits.log_softmax(-1), clean)
    return integrand(cross_entropy, 1 / t, 1 / t, noisy == model.mask_id).mean() / length
