"""The network of an order policy as a second denoiser: it fills, and a heuristic orders.

A policy that gains over heuristics has learned a second reading of the board. This spends the same reading another way,
so that a table tells how much of a gain is the reading's and how much the order's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from agents.policy import OrderPolicy
from unmask_env.denoiser import Denoiser
from unmask_env.distributions import Distribution
from unmask_env.reference import Margin, Policy
from unmask_env.state import Denoised, Observation


class BeliefDenoiser:
    """``denoiser``, but where none of its positions is confident the belief of ``policy`` after its last pass."""

    def __init__(self, denoiser: Denoiser, policy: OrderPolicy) -> None:
        self.denoiser, self.policy = denoiser, policy
        self.device, self.hidden_dim, self.calls = denoiser.device, denoiser.hidden_dim, 0
        self.carries = getattr(denoiser, "carries", False)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, where: Tensor | None = None, *carried: Any) -> Denoised:
        self.calls += 1
        first = self.denoiser(tokens) if where is None and not carried else self.denoiser(tokens, where, *carried)
        denoised = first.without_carried()
        masked = tokens == denoised.vocab_size
        seen = Observation(tokens, masked, masked if where is None else where, denoised)
        rows = self.policy.uncertain(seen).nonzero().squeeze(1)
        once = torch.ones_like(tokens[:, 0]) if denoised.passes is None else denoised.passes
        denoised = replace(denoised, passes=once.index_add(0, rows, torch.full_like(rows, self.policy.num_passes)))
        if len(rows):
            second = self._belief(replace(seen, denoised=denoised)[rows])
            denoised = Denoised.join([denoised, second], lambda parts: parts[0].index_copy(0, rows, parts[1]))
        return replace(denoised, carried=first.carried)

    def _belief(self, seen: Observation) -> Denoised:
        belief = self.policy.read(seen)[0][-1]
        hidden, order_weights, passes = seen.hidden, seen.order_weights, seen.denoised.passes
        if seen.denoised.log_probs is not None:
            return replace(Denoised.of(belief, hidden, order_weights), passes=passes)
        log_probs, order = belief.sort(-1, descending=True)
        entropy = -torch.xlogy(belief.exp(), belief.exp()).sum(-1)
        symbols = seen.top_symbols.gather(-1, order)
        shown = Denoised.shown(seen.denoised.vocab_size, symbols, log_probs, entropy, hidden, order_weights)
        return replace(shown, passes=passes)


class BeliefFills(Policy):
    """The margin heuristic over :class:`BeliefDenoiser`: the row ``belief:NAME`` of tables."""

    def __init__(self, policy: OrderPolicy) -> None:
        self.policy, self.order = policy, Margin()
        self.trained, self.reads_hidden = policy.trained, policy.reads_hidden

    def denoiser(self, denoiser: Denoiser) -> Denoiser:
        """What it is played with in place of ``denoiser``."""
        return BeliefDenoiser(denoiser, self.policy)

    def __call__(self, seen: Observation) -> Distribution:
        return self.order(seen)
