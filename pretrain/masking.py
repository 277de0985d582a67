"""Masking: how complete sequences lose their symbols, and in which order they come back.

Time runs from 0 (clean) to 1 (all masked). A *schedule* gives every position its own alpha^i(t), the probability that
it is still visible at time t, and the *velocity* A^i(t) = -alpha'(t) / (1 - alpha(t)), the rate at which a masked
position is revealed when time runs backwards (Hong et al. 2026, arXiv 2602.02112): the higher, the earlier it comes.

Shapes: N sequences, L positions. Schedules may have N = 1 and then hold for every sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    """Per-position masking schedules."""

    def masked_probability(self, t: Tensor) -> Tensor:
        """(N, L) 1 - alpha^i(t) at times ``t`` (N,)."""
        ...

    def velocity(self, t: Tensor) -> Tensor:
        """(N, L) A^i(t) at times ``t`` (N,)."""
        ...


@dataclass(frozen=True)
class PolynomialSchedule:
    """alpha^i(t) = 1 - t^(w_i), so A^i(t) = w_i / t; the order of revealing is Plackett-Luce with weights w.

    w = 1 is masked diffusion; other constants per position are a multivariate schedule (Garg et al. 2025, arXiv
    2511.19152); w may also depend on the symbols (GenMD4) or on the whole sequence (LoMDM).

    Args:
        order_weights: (N, L) or (1, L), greater than 0.
    """

    order_weights: Tensor

    def masked_probability(self, t: Tensor) -> Tensor:
        """(N, L) 1 - alpha^i(t) = t^w_i at times ``t`` (N,)."""
        return t.unsqueeze(1) ** self.order_weights

    def velocity(self, t: Tensor) -> Tensor:
        """(N, L) A^i(t) = w_i / t at times ``t`` (N,)."""
        return self.order_weights / t.unsqueeze(1)

    def log_time(self, share: Tensor) -> Tensor:
        """(N,) float64 log t at which ``share`` (N,) in (0, 1] of the positions is masked on average; no gradient.

        With t^(w_i) for their probabilities, q = log t / log share solves mean_i share^(w_i q) = share. The log of
        the left side is convex and falls in q, and is above at q = 1 / mean w (Jensen), so Newton's steps go up to it.
        """
        weights, log_share = self.order_weights.detach().double(), share.double().log().unsqueeze(1)  # (N, L), (N, 1)
        q = 1 / weights.mean(1, keepdim=True).expand(len(share), -1)
        for _ in range(30):
            terms = weights * q * log_share
            above = terms.logsumexp(1, keepdim=True) - math.log(weights.shape[1]) - log_share
            slope = (terms.softmax(1) * weights).sum(1, keepdim=True) * log_share
            if float(above.abs().max()) <= 1e-13:
                break
            q = q - torch.where(slope < 0, above / slope.clamp(max=-1e-300), 0.0)
        return (q * log_share).squeeze(1)

    def log_probability(self, masked: Tensor, log_t: Tensor) -> Tensor:
        """(N,) log q(which positions are masked | clean, t), of ``log_t`` (N,); ``masked`` (N, L) bool.

        Differentiable in the weights. log alpha = log(1 - t^w) is taken as log(-expm1(w log t)), with t kept below 1,
        where it is -inf.
        """
        log_masked = self.order_weights * log_t.clamp(max=-1e-6).to(self.order_weights.dtype).unsqueeze(1)
        # The inner where keeps the gradient of the branch not taken finite.
        visible = torch.log(-torch.expm1(torch.where(masked, -1.0, log_masked)))
        return torch.where(masked, log_masked, visible).sum(1)


def blocks_of(length: int, block_length: int) -> Tensor:
    """(L,) int64 block of each position when the sequence is cut into blocks of ``block_length``."""
    return torch.arange(length) // block_length


def low_discrepancy_times(n: int, generator: torch.Generator) -> Tensor:
    """(n,) times in (0, 1], one in each of n equal intervals: t_i = (i + 1 - u) / n with one shared u in [0, 1).

    The variance-reduced sampler of variational diffusion models (Kingma et al. 2021, arXiv 2107.00630, appendix I.1).
    """
    u = torch.rand((), generator=generator, device=generator.device)
    return (torch.arange(1, n + 1, device=generator.device) - u) / n


def mask(clean: Tensor, probability: Tensor, mask_id: int, generator: torch.Generator) -> Tensor:
    """Each symbol becomes ``mask_id`` with its own probability, independently.

    Args:
        clean: (N, L) int64. probability: broadcastable to (N, L), from a schedule.

    Returns:
        (N, L) int64.
    """
    hide = torch.rand(clean.shape, generator=generator, device=clean.device) < probability
    return torch.where(hide, mask_id, clean)


def gumbel(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise of the shape of ``like``: the argmax of log-probabilities plus it is a sample of them."""
    uniform = torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))


def plackett_luce(weights: Tensor, generator: torch.Generator) -> Tensor:
    """(N, L) rank of each position in an order of revealing drawn in proportion to ``weights`` (N, L): 0 comes first.

    Exponential clocks with rates w ring in Plackett-Luce order.
    """
    uniform = torch.rand(weights.shape, generator=generator, device=weights.device, dtype=weights.dtype)
    clocks = -torch.log1p(-uniform) / weights
    return clocks.argsort(1).argsort(1)
