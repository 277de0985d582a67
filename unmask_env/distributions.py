"""What a policy answers with: a distribution over actions.

An action is (N, A) bool: the positions to fill and, behind them, those to mask again. A distribution knows how to
``sample`` one, its ``mode``, and ``log_prob``, ``kl``, ``entropy``. A new kind of action is a new class here, and its
space in :mod:`unmask_env.encoding`.

Shapes: N rows, L positions, A entries. Entries outside ``allowed`` (N, A) bool are never in an action.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pretrain.masking import gumbel
from tasks import UnmaskError


class NoClosedFormError(UnmaskError):
    """A divergence that can only be estimated from samples."""


class Distribution(ABC):
    """A distribution over the actions of N rows. A row that allows nothing gives the empty action.

    Attributes:
        passes: (N,) int64, how many passes of a network of its own the policy took to decide; None: none.
    """

    passes: Tensor | None = None

    @abstractmethod
    def sample(self, generator: torch.Generator) -> Tensor:
        """(N, A) bool."""

    @abstractmethod
    def mode(self) -> Tensor:
        """(N, A) bool: the action to play without randomness."""

    @abstractmethod
    def log_prob(self, action: Tensor) -> Tensor:
        """(N,) log-probability of ``action`` (N, A) bool; -inf where it is not allowed."""

    @abstractmethod
    def kl(self, other: Distribution) -> Tensor:
        """(N,) KL(self || other) in nats, inf where ``other`` excludes what this allows.

        Raises:
            NoClosedFormError: it can only be estimated.
        """

    @abstractmethod
    def cross_entropy(self, target: Distribution) -> Tensor:
        """(N,) -sum_a target(a) log self(a); of sets -log self of the target's mode, so for deterministic targets."""

    @abstractmethod
    def entropy(self) -> Tensor:
        """(N,) in nats. Raises :class:`NoClosedFormError`."""

    @abstractmethod
    def entry_log_probs(self) -> Tensor:
        """(N, A) log-probability that each entry is in the action; -inf where it is not allowed."""

    @abstractmethod
    def logits(self) -> Tensor:
        """(N, A) of the libraries' own distributions: log-probabilities of positions, log-odds of entries."""

    @abstractmethod
    def sb3_logits(self) -> Tensor:
        """As stable-baselines3 has them: of sets (N, 2 A), per entry the log-probability that it is out and in."""

    def act(self, generator: torch.Generator | None) -> Tensor:
        """(N, A) bool: a sample, or the mode without a generator."""
        return self.mode() if generator is None else self.sample(generator)

    def tempered(self, temperature: float) -> Self:
        """The distribution in proportion to p^(1 / temperature). Raises :class:`tasks.UnmaskError` where there is
        none."""
        if temperature == 1.0:
            return self
        raise UnmaskError(f"{type(self).__name__} actions are sampled at temperature 1, not {temperature}")


# ---------------------------------------------------------------------- one position
class Categorical(Distribution):
    """Exactly one position.

    Args:
        log_probs: (N, L), normalised over what is allowed, -inf elsewhere.
    """

    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs = log_probs

    @classmethod
    def of(cls, scores: Tensor, allowed: Tensor) -> Categorical:
        """In proportion to exp(``scores``) (N, L) over ``allowed`` (N, L) bool."""
        return cls(masked_log_softmax(scores, allowed))

    def _action(self, position: Tensor) -> Tensor:
        action = torch.zeros_like(self.log_probs, dtype=torch.bool).scatter_(1, position.unsqueeze(1), True)
        return action & (self.log_probs > -torch.inf)

    def sample(self, generator: torch.Generator) -> Tensor:
        return self._action((self.log_probs + gumbel(self.log_probs, generator)).argmax(1))

    def mode(self) -> Tensor:
        """The most likely position, the lowest index where several tie."""
        return self._action(self.log_probs.argmax(1))

    def log_prob(self, action: Tensor) -> Tensor:
        one = action[:, : self.log_probs.shape[1]]
        log_prob = self.log_probs.masked_fill(~one, 0.0).sum(1)
        return log_prob.masked_fill(action.sum(1) != 1, -torch.inf)

    def kl(self, other: Distribution) -> Tensor:
        inside = self.log_probs > -torch.inf
        difference = self.log_probs.masked_fill(~inside, 0.0) - other.log_probs.masked_fill(~inside, 0.0)
        return torch.where(inside, self.log_probs.exp() * difference, 0.0).sum(1)

    def cross_entropy(self, target: Distribution) -> Tensor:
        inside = target.log_probs > -torch.inf
        return -torch.where(inside, target.log_probs.exp() * self.log_probs.masked_fill(~inside, 0.0), 0.0).sum(1)

    def entropy(self) -> Tensor:
        return self.cross_entropy(self)

    def entry_log_probs(self) -> Tensor:
        return self.log_probs

    def logits(self) -> Tensor:
        return self.log_probs

    def sb3_logits(self) -> Tensor:
        return self.log_probs

    def tempered(self, temperature: float) -> Categorical:
        if temperature == 1.0:
            return self
        allowed = self.log_probs > -torch.inf
        return Categorical.of(self.log_probs.masked_fill(~allowed, 0.0) / temperature, allowed)


# ---------------------------------------------------------------------- several positions
class _Set(Distribution):
    """What distributions over sets share.

    Args:
        scores: (N, A), of each entry. allowed: (N, A) bool.
        remasks_left: (N,) how many positions a budget lets rows mask again; an action keeps the likeliest of them.
            None: any number.
        chosen: makes the mode (N, A) bool where it is another than the entries more likely in than out.
    """

    def __init__(
        self,
        scores: Tensor,
        allowed: Tensor,
        remasks_left: Tensor | None = None,
        chosen: Callable[[], Tensor] | None = None,
    ) -> None:
        self.scores, self.allowed, self.remasks_left, self.chosen = scores, allowed, remasks_left, chosen

    @abstractmethod
    def _draw(self, generator: torch.Generator) -> Tensor: ...

    @abstractmethod
    def _likely(self) -> Tensor:
        """(N, A) bool: entries that are more likely in than out."""

    def _within_budget(self, action: Tensor) -> Tensor:
        if self.remasks_left is None:
            return action
        fill, remask = action.tensor_split(2, 1)
        kept = ranked(self.scores.tensor_split(2, 1)[1], remask) < self.remasks_left.unsqueeze(1)
        return torch.cat([fill, remask & kept], 1)

    def sample(self, generator: torch.Generator) -> Tensor:
        return self._within_budget(self._draw(generator))

    def mode(self) -> Tensor:
        return self._within_budget(self._likely() if self.chosen is None else self.chosen())

    def cross_entropy(self, target: Distribution) -> Tensor:
        return -self.log_prob(target.mode())

    def sb3_logits(self) -> Tensor:
        inside = self.entry_log_probs()
        return torch.stack([log_complement(inside), inside], -1).flatten(1)

    def logits(self) -> Tensor:
        return log_odds(self.entry_log_probs())


class Bernoulli(_Set):
    """Every allowed entry for itself; ``scores`` are log-probabilities of being in the set."""

    def _draw(self, generator: torch.Generator) -> Tensor:
        draw = torch.rand(self.allowed.shape, generator=generator, device=self.allowed.device)
        return (draw < self.scores.exp()) & self.allowed

    def _likely(self) -> Tensor:
        return (self.scores > -math.log(2)) & self.allowed

    def log_prob(self, action: Tensor) -> Tensor:
        inside = self.entry_log_probs()
        return torch.where(action, inside, log_complement(inside.masked_fill(action, -1.0))).sum(1)

    def kl(self, other: Distribution) -> Tensor:
        p, not_p = self.scores.exp(), log_complement(self.scores)
        inside = p * (self.scores - other.entry_log_probs()).masked_fill(p == 0, 0.0)
        outside = not_p.exp()
        outside = outside * (not_p - log_complement(other.entry_log_probs())).masked_fill(outside == 0, 0.0)
        return torch.where(self.allowed, inside + outside, 0.0).sum(1)

    def entropy(self) -> Tensor:
        p, not_p = self.scores.exp(), log_complement(self.scores)
        terms = -(p * self.scores.masked_fill(p == 0, 0.0)) - not_p.exp() * not_p.masked_fill(p == 1, 0.0)
        return torch.where(self.allowed, terms, 0.0).sum(1)

    def entry_log_probs(self) -> Tensor:
        return self.scores.masked_fill(~self.allowed, -torch.inf)


# Nodes of the stop's time, on a logarithmic scale; the trapezoid rule is exact to float32 there.
_TIMES = torch.arange(-32.0, 4.5, 0.25, dtype=torch.float64)


class PlackettLuce(_Set):
    """Entries drawn without replacement with probabilities proportional to their rates, beside a stop of rate 1; a set
    holds what was drawn before the stop. ``scores`` are log-rates.

    As a race of exponential clocks: given the stop's time t, entry i is in the set with probability 1 - exp(-w_i t),
    independently, so (derived, checked against the sum over all sequences of draws)

        P(S) = integral of e^-t  prod_{i in S} (1 - e^(-w_i t))  prod_{i not in S} e^(-w_i t)  dt.

    Entry i alone is in the set with probability w_i / (1 + w_i): rates are the odds of :class:`Bernoulli`.
    """

    def _draw(self, generator: torch.Generator) -> Tensor:
        # Of exponential clocks, -log(time) is log-rate + Gumbel noise: the larger, the sooner.
        log_rates = torch.cat([self.scores, torch.zeros_like(self.scores[:, :1])], 1)
        noisy = log_rates + gumbel(log_rates, generator)
        return (noisy[:, :-1] > noisy[:, -1:]) & self.allowed

    def _likely(self) -> Tensor:
        return (self.scores > 0) & self.allowed

    def log_prob(self, action: Tensor) -> Tensor:
        x = _TIMES.to(self.scores.device)
        log_rates = torch.where(self.allowed, self.scores.double(), -torch.inf)
        log_wt = log_rates.masked_fill(~action, torch.inf).unsqueeze(-1) + x  # (N, A, X) log(w t)
        log_in = log_one_minus_exp_neg(log_wt)  # 0 where not in the set
        rest = log_rates.masked_fill(action, -torch.inf).exp().sum(1, keepdim=True)  # (N, 1) rates that stay out
        total = log_in.sum(1) - rest * x.exp() - x.exp() + x  # (N, X), with dt = t dx
        log_prob = total.logsumexp(1) + math.log(float(x[1] - x[0]))
        return log_prob.masked_fill((action & ~self.allowed).any(1), -torch.inf).to(self.scores.dtype)

    def kl(self, other: Distribution) -> Tensor:
        raise NoClosedFormError(
            "the KL of Plackett-Luce sets has no closed form; estimate it by samples (--regulariser trajectory_kl)"
        )

    def entropy(self) -> Tensor:
        raise NoClosedFormError("the entropy of Plackett-Luce sets has no closed form; average -log_prob over samples")

    def entry_log_probs(self) -> Tensor:
        return -softplus(-self.scores).masked_fill(~self.allowed, torch.inf)


# ---------------------------------------------------------------------- arithmetic
def masked_log_softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """(N, L) log-probabilities over ``allowed``, -inf elsewhere; rows with nothing allowed are -inf throughout."""
    log_probs = scores.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    return log_probs.masked_fill(~allowed, -torch.inf)


def ranked(score: Tensor, among: Tensor) -> Tensor:
    """(N, L) int64 rank of each position of ``among`` (N, L) bool by falling ``score``: the best is 0, ties by lowest
    index; L on the others."""
    order = score.masked_fill(~among, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    return order.argsort(1).masked_fill(~among, among.shape[1])


def log_complement(log_probability: Tensor) -> Tensor:
    """log(1 - p) of log p; -inf at p = 1."""
    # Each formula sees harmless numbers where the other is taken: an infinite slope times 0 would be NaN.
    likely = log_probability > -0.6931
    above, below = log_probability.masked_fill(~likely, -0.5), log_probability.masked_fill(likely, -1.0)
    certain = log_probability >= 0
    above = above.masked_fill(certain, -0.5)
    log_outside = torch.where(likely, (-torch.expm1(above)).log(), torch.log1p(-below.exp()))
    return log_outside.masked_fill(certain, -torch.inf)


def log_odds(log_probability: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p."""
    return log_probability - log_complement(log_probability)


def log_one_minus_exp_neg(log_x: Tensor) -> Tensor:
    """log(1 - exp(-x)) of log x, also where x is tiny or infinite."""
    x = log_x.clamp(max=40.0).exp()
    return torch.where(log_x < -12.0, log_x, torch.log(-torch.expm1(-x.clamp(min=1e-6))))


def regularised_reward(reward: Tensor, log_prob: Tensor, log_reference: Tensor, beta: float) -> Tensor:
    """reward - beta * (log pi(a|s) - log g(a|s)): summed over an episode, its mean is J(pi) = E[r] - beta * KL.

    KL is the divergence between the paths of pi and g (the chain rule of KL). The policy gradient of this reward, taken
    as a constant, is exactly that of J, since E[grad log pi] = 0; so any on-policy method maximises J.

    Args:
        log_prob: log pi(a|s) of the distribution that the action was sampled from. log_reference: log g(a|s).
    """
    return reward - beta * (log_prob - log_reference)
