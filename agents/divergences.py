"""How far a policy is from a reference: exact per-step divergences, and UPO's trajectory-level surrogate.

Shapes: S steps, L positions, T trajectories. Positions that may not be chosen have log-probability -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor


def categorical_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(S,) KL(p || q) of rows of log-probabilities; positions with p = 0 contribute 0."""
    inside = log_p > -torch.inf
    difference = log_p.masked_fill(~inside, 0.0) - log_q.masked_fill(~inside, 0.0)
    return torch.where(inside, log_p.exp() * difference, 0.0).sum(1)


def cross_entropy(log_target: Tensor, log_prob: Tensor) -> Tensor:
    """(S,) -sum_i t(i) log pi(i): UPO's divergence from a deterministic reference t, ties split evenly."""
    inside = log_target > -torch.inf
    return -torch.where(inside, log_target.exp() * log_prob.masked_fill(~inside, 0.0), 0.0).sum(1)


def trajectory_kl_surrogate(taken: Tensor, old: Tensor, target: Tensor, trajectory: Tensor, count: int) -> Tensor:
    """(T,) UPO's score-function surrogate for the trajectory-level KL, which bounds the terminal KL from above.

    stopgrad[ w (1 + log P - log P_ref) ] log P with w = clamp(P / P_old, 0.5, 2), as in the released ``compute_loss``
    but in log space throughout. Its value means nothing; its gradient estimates that of the KL.

    Args:
        taken, old, target: (S,) log-probabilities of the chosen positions under the policy, the sampling policy and
            the reference. trajectory: (S,) index of the trajectory, below ``count``.
    """

    def total(values: Tensor) -> Tensor:
        return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, trajectory, values)

    log_p, log_old, log_ref = total(taken), total(old), total(target)
    weight = (log_p - log_old).clamp(-10, 10).exp().clamp(0.5, 2.0)
    return (weight * (1 + log_p - log_ref)).detach() * log_p
