"""Reference policies over sets: customary rules for closing several positions in one forward.

Each has ``sample(observation, generator) -> (N, A) bool``, ``log_prob_of(observation, action) -> (N,)`` and
``log_inclusion(observation) -> (N, A)``, the log-probability that each entry is in the set. A set that closes nothing
stands for the surest open position (:class:`unmask_env.core.Rules`); rules that close something anyway never use that.

p_i is the denoiser's distribution at position i, p_i(1) >= p_i(2) >= ... its sorted probabilities. A = L entries, or
2 L where positions may be opened again; the references here open again nothing unless they say so.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tasks import UnknownNameError, UnmaskError
from unmask_env import reference
from unmask_env.core import Observation


def log_complement(log_probability: Tensor) -> Tensor:
    """log(1 - p) of log p; -inf at p = 1."""
    return torch.where(
        log_probability > -0.6931, (-torch.expm1(log_probability)).log(), torch.log1p(-log_probability.exp())
    )


def independent_log_prob(log_inclusion: Tensor, choices: Tensor, action: Tensor) -> Tensor:
    """(N,) log-probability of the sets ``action`` if each entry is in it independently with ``log_inclusion``.

    Args:
        log_inclusion: (N, A). choices: (N, A) bool, the entries that may be in a set; the others never are.
        action: (N, A) bool. A set with an entry that may not be in it has -inf.
    """
    inside = log_inclusion.masked_fill(~choices, -torch.inf)
    each = torch.where(action.bool(), inside, log_complement(inside))
    return each.sum(1)


def independent_sample(log_inclusion: Tensor, choices: Tensor, generator: torch.Generator | None) -> Tensor:
    """(N, A) bool sets in which each entry is independently; without a generator those more likely in than out."""
    if generator is None:
        return (log_inclusion > -math.log(2)) & choices
    draw = torch.rand(choices.shape, generator=generator, device=choices.device)
    return (draw < log_inclusion.exp()) & choices


class SetReference:
    """Base of the reference policies over sets: entries are in a set independently.

    ``deterministic`` ones have probabilities of 0 and 1 alone.
    """

    deterministic = False

    def log_inclusion(self, observation: Observation) -> Tensor:
        """(N, A) log-probabilities; -inf on entries that may not be in a set."""
        raise NotImplementedError

    def log_prob_of(self, observation: Observation, action: Tensor) -> Tensor:
        """(N,) log-probabilities of the sets ``action`` (N, A)."""
        return independent_log_prob(self.log_inclusion(observation), observation.choices, action)

    def sample(self, observation: Observation, generator: torch.Generator | None) -> Tensor:
        """(N, A) bool: a set per row."""
        return independent_sample(self.log_inclusion(observation), observation.choices, generator)


def _among_choices(close: Tensor, observation: Observation) -> Tensor:
    """(N, A): (N, L) log-probabilities of closing, and of opening again none."""
    log_inclusion = close.masked_fill(~observation.open, -torch.inf)
    if observation.reopenable is None:
        return log_inclusion
    return torch.cat([log_inclusion, torch.full_like(log_inclusion, -torch.inf)], 1)


@dataclass(frozen=True)
class SoftThreshold(SetReference):
    """Position i is closed with probability sigmoid((p_i(1) - theta) / tau): a confidence threshold with full support.

    Where positions may be opened again, each is with probability ``reopen``.
    """

    theta: float = 0.9
    tau: float = 0.05
    reopen: float = 0.01

    def __post_init__(self) -> None:
        require_share("theta", self.theta)
        require_share("reopen", self.reopen)
        reference.require_positive("tau", self.tau)

    def log_inclusion(self, observation: Observation) -> Tensor:
        close = logsigmoid((reference.confidence(observation) - self.theta) / self.tau)
        log_inclusion = _among_choices(close, observation)
        if observation.reopenable is not None:
            log_inclusion[:, close.shape[1] :].masked_fill_(observation.reopenable, math.log(self.reopen))
        return log_inclusion


class _Deterministic(SetReference):
    """Says which positions to close."""

    deterministic = True

    def closes(self, observation: Observation) -> Tensor:
        """(N, L) bool, at least one in every row with an open position."""
        raise NotImplementedError

    def log_inclusion(self, observation: Observation) -> Tensor:
        close = self.closes(observation) & observation.open
        return _among_choices(
            torch.zeros(close.shape, device=close.device).masked_fill(~close, -torch.inf), observation
        )


SCORES: dict[str, Callable[[Observation], Tensor]] = {
    "confidence": reference.confidence,
    "margin": reference.margin,
    "entropy": lambda observation: -reference.entropy(observation),
}


def ranked(score: Tensor, open: Tensor) -> Tensor:
    """(N, L) int64 rank of each open position by ``score``, the best is 0, ties by lowest index; L on the others."""
    order = score.masked_fill(~open, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    rank = order.argsort(1)
    return rank.masked_fill(~open, open.shape[1])


@dataclass(frozen=True)
class FixedK(_Deterministic):
    """The ``k`` best open positions of a heuristic's score, ties by lowest index (LLaDA closes L / steps per forward).

    Args:
        score: ``confidence``, ``margin`` or ``entropy`` (the least).
    """

    k: int = 2
    score: str = "margin"

    def __post_init__(self) -> None:
        require_score(self.score)
        if not isinstance(self.k, int) or self.k < 1:
            raise UnmaskError(f"k must be a whole number of at least 1, not {self.k!r}")

    def closes(self, observation: Observation) -> Tensor:
        return ranked(SCORES[self.score](observation), observation.open) < self.k


@dataclass(frozen=True)
class Threshold(_Deterministic):
    """Every open position whose score reaches ``theta``, and the best one in any case (Fast-dLLM's confidence
    threshold, arXiv 2505.22618; its default is 0.9)."""

    theta: float = 0.9
    score: str = "confidence"

    def __post_init__(self) -> None:
        require_score(self.score)

    def closes(self, observation: Observation) -> Tensor:
        score = SCORES[self.score](observation)
        return (score >= self.theta) | (ranked(score, observation.open) == 0)


def require_share(name: str, value: float) -> None:
    """Raises :class:`tasks.UnmaskError` unless 0 < value < 1."""
    if not isinstance(value, int | float) or not 0 < value < 1:
        raise UnmaskError(f"{name} must be between 0 and 1, not {value!r}")


def require_score(score: str) -> None:
    """Raises :class:`tasks.UnknownNameError` for a score that is not in :data:`SCORES`."""
    if score not in SCORES:
        raise UnknownNameError("score", score, SCORES)


SET_REFERENCES: dict[str, Callable[..., SetReference]] = {
    "soft_threshold": SoftThreshold,
    "fixed_k": FixedK,
    "threshold": Threshold,
}


def get(name: str, **options: float | str) -> SetReference:
    """The set reference called ``name``, for example ``get("threshold", theta=0.8)``.

    Raises:
        UnknownNameError: listing the known names. UnmaskError: an option that it does not have or that is out of range.
    """
    if name not in SET_REFERENCES:
        raise UnknownNameError("set reference", name, SET_REFERENCES)
    factory = SET_REFERENCES[name]
    unknown = sorted(options.keys() - inspect.signature(factory).parameters.keys())
    if unknown:
        raise UnmaskError(f"set reference {name!r} does not take {', '.join(unknown)}")
    return factory(**options)
