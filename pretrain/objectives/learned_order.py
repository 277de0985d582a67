"""Losses of the models that are more than plain masked diffusion: learned orders, block diffusion, autoregression.

Shapes: N sequences, L positions, V symbols.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain import processes
from pretrain.backbone import Backbone
from pretrain.objectives.masked import integrand
from pretrain.processes import Powers


def learned_order_loss(model: Backbone, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(surrogate to differentiate, estimate of the bound in nats per position), scalars.

    The estimate is the mean of two one-time samples of the bound at the same times, with independent masks. Its
    gradient in the trunk and in the revealing exponents is the loss's; the masking exponents also decide which masks
    are drawn, so the surrogate adds the two-sample score-function term (RLOO)

        (log q(z_1|x) - log q(z_2|x)) / 2 * stopgrad(l_1 - l_2)

    which is unbiased (Hong et al. 2026, arXiv 2602.02112, eq. 8; GenMD4's code does the same). Both masked samples go
    through the trunk in one batch; a context order reads the clean sequence in a third, without gradients.

    Args:
        clean: (N, L) int64 complete sequences.
    """
    n, length = clean.shape
    t = processes.low_discrepancy_times(n, generator)
    hidden = None
    if model.order.reads_clean:
        with torch.no_grad():
            hidden = model.trunk(clean)
    schedule = Powers(model.order.exponents(clean, hidden))
    with torch.no_grad():
        probability = schedule.masked_probability(t)
        noisy = torch.cat([processes.mask(clean, probability, model.mask_id, generator) for _ in range(2)])
    masked = noisy == model.mask_id
    log_probs, exponents = model.order.reverse(*model(noisy))
    cross_entropy = F.nll_loss(log_probs.float().transpose(1, 2), clean.repeat(2, 1), reduction="none")
    velocity = schedule.velocity(t).float().expand(n, length).repeat(2, 1)
    each = integrand(cross_entropy, velocity, exponents.float() / t.repeat(2).unsqueeze(1), masked) / length
    first, second = each.chunk(2)
    bound = each.mean()
    if not model.order.learned:
        return bound, bound.detach()
    log_q = [schedule.log_probability(some, t) for some in masked.chunk(2)]
    score = 0.5 * ((log_q[0] - log_q[1]) * (first - second).detach()).mean()
    return bound + score, bound.detach()


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
        return F.cross_entropy(logits.transpose(1, 2), clean)
    blocks = int(block[-1]) + 1
    t = processes.low_discrepancy_times(n * blocks, generator)
    t = t[torch.randperm(n * blocks, generator=generator, device=t.device)].view(n, blocks)[:, block]  # (N, L)
    noisy = processes.mask(clean, t, model.mask_id, generator)
    logits = model.predict_blocks(noisy, clean).float()
    cross_entropy = F.cross_entropy(logits.transpose(1, 2), clean, reduction="none")
    return integrand(cross_entropy, 1 / t, 1 / t, noisy == model.mask_id).mean() / length
