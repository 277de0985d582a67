"""Losses of the models that are more than plain masked diffusion: learned orders, block diffusion, autoregression.

Shapes: N sequences, L positions, V symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pretrain import masking
from pretrain.backbone import Backbone
from pretrain.masking import PolynomialSchedule
from pretrain.objectives.masked import cross_entropies, integrand


class AtTimes(NamedTuple):
    """Each sequence at a time of its own: ``schedule``, ``log_t`` (N,) float64, how likely each position is masked,
    ``probability`` (N, L) float64, and its ``velocity`` (N, L); and ``draw()``, (N, L) each: a mask, and under it the
    cross-entropies and the velocity of revealing."""

    schedule: PolynomialSchedule
    log_t: Tensor
    probability: Tensor
    velocity: Tensor
    draw: Callable[[], tuple[Tensor, Tensor, Tensor]]


def at_even_shares(model: Backbone, clean: Tensor, generator: torch.Generator) -> AtTimes:
    """``clean`` (N, L) int64 at times at which the share of positions that is masked on average is spread evenly over
    (0, 1], see :func:`learned_order_loss`; velocities are per unit of that share."""
    share = masking.low_discrepancy_times(clean.shape[0], generator)
    hidden = None
    if model.order.reads_clean:
        with torch.no_grad():
            hidden = model.trunk(clean)
    schedule = PolynomialSchedule(model.order.order_weights(clean, hidden))
    log_t = schedule.log_time(share)
    probability = (schedule.order_weights * log_t.unsqueeze(1)).exp()  # (N, L) float64, t^w
    weight = 1 / (schedule.order_weights * probability).detach().mean(1, keepdim=True)  # d tau / d share

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        noisy = masking.mask(clean, probability.detach(), model.mask_id, generator)
        log_probs, order_weights = model.order.reverse(*model(noisy))
        return noisy == model.mask_id, cross_entropies(log_probs.float(), clean), (order_weights * weight).float()

    return AtTimes(schedule, log_t, probability, (schedule.order_weights * weight).float(), draw)


def learned_order_loss(
    model: Backbone, clean: Tensor, generator: torch.Generator, estimator: Estimator = "control_variate"
) -> tuple[Tensor, Tensor]:
    """(surrogate to differentiate, estimate of the bound in nats per position), scalars.

    *Times.* What is drawn uniformly is not t but the share s of positions that are masked on average, and t follows for
    each sequence (:meth:`pretrain.masking.PolynomialSchedule.log_time`). In tau = -log t the velocities are the
    weights, and d tau = d s / mean_i w_i t^(w_i): whatever they are, a position's probability of being masked times
    its weight w_i / mean_j w_j t^(w_j) is at most L. With t itself uniform, a position with a small weight is
    revealed at times that are never drawn, training does not see what it costs, and weights fall to where the bound
    is worst.

    *The order's gradient.* The estimate's gradient in the trunk and in the revealing weights is the bound's. The
    masking weights also decide which masks are drawn, so a second mask is drawn at the same time, independently, and
    ``estimator`` says what is made of the two; in expectation both have the bound's gradient.

    Args:
        clean: (N, L) int64 complete sequences.
        estimator: ``rloo``, :func:`rloo`, or ``control_variate``, :func:`control_variate`.
    """
    surrogate, bound = ESTIMATORS[estimator](at_even_shares(model, clean, generator))
    return surrogate.mean() / clean.shape[1], bound.mean() / clean.shape[1]


def rloo(at: AtTimes) -> tuple[Tensor, Tensor]:
    """(N,) each, surrogate and bound: two-sample leave-one-out REINFORCE of the losses l_1 and l_2 of the two masks z_1
    and z_2, (l_1 + l_2) / 2 + (log q(z_1) - log q(z_2)) stopgrad(l_1 - l_2) / 2 (Hong et al. 2026, arXiv 2602.02112,
    eq. 8): a forward and a backward of each."""
    losses, chances = [], []
    for _ in range(2):
        masked, cross_entropy, reverse = at.draw()
        losses.append(integrand(cross_entropy, at.velocity, reverse, masked))
        chances.append(at.schedule.log_probability(masked, at.log_t))
    mean = (losses[0] + losses[1]) / 2
    score = (chances[0] - chances[1]) * (losses[0] - losses[1]).detach() / 2
    return mean + score, mean.detach()


def control_variate(at: AtTimes) -> tuple[Tensor, Tensor]:
    """(N,) each, surrogate and bound: one mask b, and a second one, without gradients, which says what each position of
    the first may be expected to cost: c_i, its own cross-entropy under the second where that masks it, and the mean of
    those elsewhere. With p the first's probabilities and l(b, CE) the integrand, the surrogate is

        l(b, CE - c) + log q(b | x) stopgrad(l(b, CE - c)) + sum_i p_i A_i c_i,

    whose last term adds what c takes from the first two, exactly (a linear control variate; Gu et al. 2016, arXiv
    1511.05176). How many positions are masked cancels, and the second mask takes no backward: cheaper than
    :func:`rloo`, and not always less noisy (docs/results/lomdm.md).
    """
    masked, cross_entropy, reverse = at.draw()
    with torch.no_grad():
        bound = integrand(cross_entropy, at.velocity, reverse, masked)
        others, costs, _ = at.draw()
        mean = (costs * others).sum(1, keepdim=True) / others.sum(1, keepdim=True).clamp(min=1)
        expected = torch.where(others, costs, mean)  # (N, L) c
    surprise = integrand(cross_entropy - expected, at.velocity, reverse, masked)
    score = at.schedule.log_probability(masked, at.log_t) * surprise.detach()
    return surprise + score + (at.probability.float() * at.velocity * expected).sum(1), bound


Estimator = Literal["control_variate", "rloo"]
ESTIMATORS: dict[str, Callable[[AtTimes], tuple[Tensor, Tensor]]] = {"control_variate": control_variate, "rloo": rloo}


def block_loss(model: Backbone, clean: Tensor, generator: torch.Generator) -> Tensor:
    """One-sample estimate of block diffusion's bound on -log p(x), in nats per position; exact for blocks of one.

    Each block has its own time: sum over blocks of E_t (1/t) sum over its masked positions of -log p(x^i | the blocks
    before, the rest of its own) (Arriola et al. 2025, arXiv 2503.09573, eq. 8). With one position per block the mask is
    certain and t cancels: the autoregressive cross-entropy.

    Args:
        model: with a ``block_length``. clean: (N, L) int64.
    """
    n, length = clean.shape
    block = masking.blocks_of(length, model.block_length or length).to(clean.device)
    if model.block_length == 1:
        logits = model.predict_blocks(torch.full_like(clean, model.mask_id), clean).float()
        return cross_entropies(logits.log_softmax(-1), clean).mean()
    blocks = int(block[-1]) + 1
    t = masking.low_discrepancy_times(n * blocks, generator)
    t = t[torch.randperm(n * blocks, generator=generator, device=t.device)].view(n, blocks)[:, block]  # (N, L)
    noisy = masking.mask(clean, t, model.mask_id, generator)
    logits = model.predict_blocks(noisy, clean).float()
    cross_entropy = cross_entropies(logits.log_softmax(-1), clean)
    return integrand(cross_entropy, 1 / t, 1 / t, noisy == model.mask_id).mean() / length
