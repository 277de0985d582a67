"""Probability laws of sets of entries: each entry for itself, or all before a common stop.

Shapes: N rows, A entries. Entries outside ``choices`` (N, A) bool are never in a set.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pretrain.processes import gumbel


def log_complement(log_probability: Tensor) -> Tensor:
    """log(1 - p) of log p; -inf at p = 1."""
    # Each formula sees harmless numbers where the other is taken: an infinite slope times 0 would be NaN.
    likely = log_probability > -0.6931
    above, below = log_probability.masked_fill(~likely, -0.5), log_probability.masked_fill(likely, -1.0)
    return torch.where(likely, (-torch.expm1(above)).log(), torch.log1p(-below.exp()))


def independent_log_prob(log_inclusion: Tensor, choices: Tensor, action: Tensor) -> Tensor:
    """(N,) log-probability of the sets ``action`` if each entry is in it independently with ``log_inclusion``.

    Args:
        log_inclusion: (N, A). choices: (N, A) bool, the entries that may be in a set; the others never are.
        action: (N, A) bool. A set with an entry that may not be in it has -inf.
    """
    inside, action = log_inclusion.masked_fill(~choices, -torch.inf), action.bool()
    each = torch.where(action, inside, log_complement(inside.masked_fill(action, -1.0)))
    return each.sum(1)


def independent_sample(log_inclusion: Tensor, choices: Tensor, generator: torch.Generator | None) -> Tensor:
    """(N, A) bool sets in which each entry is independently; without a generator those more likely in than out."""
    if generator is None:
        return (log_inclusion > -math.log(2)) & choices
    draw = torch.rand(choices.shape, generator=generator, device=choices.device)
    return (draw < log_inclusion.exp()) & choices


def independent_kl(log_p: Tensor, log_q: Tensor, choices: Tensor) -> Tensor:
    """(N,) KL(p || q) of two laws of independent entries, given their log-inclusions (N, A)."""
    p, not_p = log_p.exp(), log_complement(log_p)
    each = p * (log_p - log_q).masked_fill(p == 0, 0.0)
    rest = not_p.exp()
    each = each + rest * (not_p - log_complement(log_q)).masked_fill(rest == 0, 0.0)
    return torch.where(choices, each, 0.0).sum(1)


# Nodes of the stop's time, on a logarithmic scale; the trapezoid rule is exact to float32 there.
_TIMES = torch.arange(-32.0, 4.5, 0.25, dtype=torch.float64)


def stopping_log_prob(log_rates: Tensor, choices: Tensor, action: Tensor) -> Tensor:
    """(N,) log-probability of the sets ``action`` under Plackett-Luce draws that end when *stop* is drawn.

    Entries are drawn without replacement with probabilities proportional to their rates, beside a stop of rate 1; a set
    holds what was drawn before it. As a race of exponential clocks: given the stop's time t, entry i is in the set with
    probability 1 - exp(-w_i t), independently, so (derived, checked against the sum over all sequences of draws)

        P(S) = integral of e^-t  prod_{i in S} (1 - e^(-w_i t))  prod_{i not in S} e^(-w_i t)  dt.

    Entry i alone is in the set with probability w_i / (1 + w_i): rates are the odds of :func:`independent_log_prob`.

    Args:
        log_rates: (N, A) log w.
    """
    x = _TIMES.to(log_rates.device)
    inside, action = torch.where(choices, log_rates.double(), -torch.inf), action.bool()
    chosen = inside.masked_fill(~action, torch.inf).unsqueeze(-1) + x  # (N, A, X) log(w t)
    log_ring = log_one_minus_exp_neg(chosen)  # 0 where not in the set
    rest = inside.masked_fill(action, -torch.inf).exp().sum(1, keepdim=True)  # (N, 1) rates of those that stay out
    total = log_ring.sum(1) - rest * x.exp() - x.exp() + x  # (N, X), with dt = t dx
    found = total.logsumexp(1) + math.log(float(x[1] - x[0]))
    impossible = (action & ~choices).any(1)
    return found.masked_fill(impossible, -torch.inf).to(log_rates.dtype)


def log_one_minus_exp_neg(log_x: Tensor) -> Tensor:
    """log(1 - exp(-x)) of log x, also where x is tiny or infinite."""
    x = log_x.clamp(max=40.0).exp()
    return torch.where(log_x < -12.0, log_x, torch.log(-torch.expm1(-x.clamp(min=1e-6))))


def stopping_sample(log_rates: Tensor, choices: Tensor, generator: torch.Generator | None) -> Tensor:
    """(N, A) bool sets drawn before the stop; without a generator those more likely in than out."""
    if generator is None:
        return (log_rates > 0) & choices
    # Of exponential clocks, -log(time) is log-rate + Gumbel noise: who has more than the stop rings first.
    both = torch.cat([log_rates, torch.zeros_like(log_rates[:, :1])], 1)
    noisy = both + gumbel(both, generator)
    return (noisy[:, :-1] > noisy[:, -1:]) & choices


def log_odds_to_inclusion(log_odds: Tensor, choices: Tensor) -> Tensor:
    """(N, A) log-probability of being in the set; -inf outside ``choices``."""
    return logsigmoid(log_odds).masked_fill(~choices, -torch.inf)


def inclusion_to_log_odds(log_inclusion: Tensor) -> Tensor:
    """Inverse of :func:`log_odds_to_inclusion`."""
    return log_inclusion - log_complement(log_inclusion)
