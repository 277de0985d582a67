"""Reference policies over sets: customary rules for closing several positions in one forward.

Each has ``sample(observation, generator) -> (N, A) bool``, ``log_prob_of(observation, action) -> (N,)`` and
``log_inclusion(observation) -> (N, A)``, the log-probability that each entry is in the set. A set that closes nothing
stands for the surest open position (:class:`unmask_env.core.Rules`); rules that close something anyway never use that.

p_i is the denoiser's distribution at position i, p_i(1) >= p_i(2) >= ... its sorted probabilities. A = L entries, or
2 L where positions may be opened again; the references here open again nothing unless they say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pretrain.samplers import Remasking, Strategy
from tasks import UnknownNameError, UnmaskError
from unmask_env import reference
from unmask_env.core import Memory, Observation
from unmask_env.set_laws import independent_log_prob, independent_sample


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
        """(N, A) bool: a set per row. Of the positions to open again, in a rollout, the likeliest that a
        ``remask_budget`` leaves."""
        log_inclusion = self.log_inclusion(observation)
        action = independent_sample(log_inclusion, observation.choices, generator)
        if observation.reopenable is None:
            return action
        close, again = action.tensor_split(2, 1)
        return torch.cat([close, within_budget(again, log_inclusion.tensor_split(2, 1)[1], observation)], 1)


def within_budget(again: Tensor, score: Tensor, observation: Observation) -> Tensor:
    """(N, L) bool: of the positions ``again`` (N, L) bool, to be opened again, those of the highest ``score`` (N, L)
    that the rollout's ``remask_budget`` leaves; all where nothing says what it leaves."""
    left = None if observation.memory is None else observation.memory.reopenings
    return again if left is None else again & (ranked(score, again) < left.unsqueeze(1))


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


class OracleSets(_Deterministic):
    """Sees the answers: closes every position whose top symbol is right, or the surest (a mistake) where none is, and
    opens again every wrong one. A yardstick, not a bound: closing less can lead further
    (:func:`unmask_env.exact.fewest_forwards`). :func:`unmask_env.core.rollout` hands it the answers."""

    def __init__(self) -> None:
        self.oracle = reference.Oracle()

    def with_answers(self, answers: Tensor) -> OracleSets:
        told = OracleSets()
        told.oracle = self.oracle.with_answers(answers)
        return told

    def closes(self, observation: Observation) -> Tensor:
        right = self.oracle.right(observation)
        surest = ranked(reference.confidence(observation), observation.open) == 0
        return torch.where(right.any(1, keepdim=True), right, surest)

    def log_inclusion(self, observation: Observation) -> Tensor:
        log_inclusion = super().log_inclusion(observation)
        if observation.reopenable is not None:
            wrong = observation.reopenable & (observation.tokens != self.oracle.answer(observation))
            log_inclusion[:, wrong.shape[1] :].masked_fill_(wrong, 0.0)
        return log_inclusion


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
    threshold, arXiv 2505.22618; its default is 0.9). By entropy: whose entropy is at most ``-theta`` nats."""

    theta: float = 0.9
    score: str = "confidence"

    def __post_init__(self) -> None:
        require_score(self.score)
        if self.score != "entropy":
            require_share("theta", self.theta)
        elif not self.theta <= 0:
            raise UnmaskError(f"by entropy, theta must be at most 0, not {self.theta!r}")

    def closes(self, observation: Observation) -> Tensor:
        score = SCORES[self.score](observation)
        return (score >= self.theta) | (ranked(score, observation.open) == 0)


@dataclass(frozen=True)
class Factor(_Deterministic):
    """The n most confident open positions, for the largest n with (n + 1) (1 - c_n) < ``factor``, where c_n is the n-th
    highest confidence, and the best one in any case (Fast-dLLM's factor rule, arXiv 2505.22618, section 3.3)."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        reference.require_positive("factor", self.factor)

    def closes(self, observation: Observation) -> Tensor:
        score = reference.confidence(observation)
        rank = ranked(score, observation.open)  # (N, L), 0 is the best
        # c_n falls with n, so what holds for n holds for every smaller number.
        return ((rank + 2) * (1 - score) < self.factor) | (rank == 0)


@dataclass(frozen=True)
class EntropyBounded(_Deterministic):
    """The k open positions of least entropy H, for the largest k whose sum_i H_i - max_i H_i is at most ``gamma``: a
    bound on how far the joint law of the k is from the product that fills them (EB-sampler, arXiv 2505.24857)."""

    gamma: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.gamma, int | float) or not self.gamma >= 0:
            raise UnmaskError(f"gamma must be at least 0, not {self.gamma!r}")

    def closes(self, observation: Observation) -> Tensor:
        entropy = reference.entropy(observation)
        rank = ranked(-entropy, observation.open)
        order = rank.argsort(1)
        ordered = entropy.masked_fill(~observation.open, 0.0).gather(1, order)
        before = (ordered.cumsum(1) - ordered).gather(1, rank.clamp(max=rank.shape[1] - 1))  # of those with less
        return (before <= self.gamma) | (rank == 0)


@dataclass(frozen=True)
class KLStability(_Deterministic):
    """Every open position whose confidence reaches ``theta`` and whose distribution moved by KL(p || p before) of at
    most ``epsilon`` since the last forward; the most confident one where there is none (KLASS, arXiv 2511.05664, with a
    history of one forward; its defaults for LLaDA are 0.6 and 0.01)."""

    theta: float = 0.6
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        require_share("theta", self.theta)
        reference.require_positive("epsilon", self.epsilon)

    def closes(self, observation: Observation) -> Tensor:
        previous, now = _remembered(self, observation).previous, observation.denoised.log_probs
        score = reference.confidence(observation)
        best = ranked(score, observation.open) == 0
        if previous is None:
            return best
        moved = torch.where(now > -torch.inf, now.exp() * (now - previous.clamp(min=-1e4)), 0.0).sum(-1)
        return ((score >= self.theta) & (moved <= self.epsilon)) | best


@dataclass(frozen=True)
class Schedule(_Deterministic):
    """The best open positions by ``score``, as many as leave open what a schedule of ``steps`` forwards says: a share
    cos(pi s / 2 T) after forward s (MaskGIT, arXiv 2202.04200), or 1 - s / T."""

    steps: int = 8
    shape: str = "cosine"
    score: str = "confidence"

    def __post_init__(self) -> None:
        require_score(self.score)
        _require_steps(self.steps)
        if self.shape not in ("cosine", "linear"):
            raise UnmaskError(f"shape must be cosine or linear, not {self.shape!r}")

    def _open_after(self, forwards: Tensor) -> Tensor:
        share = (forwards / self.steps).clamp(max=1.0)
        return torch.cos(share * math.pi / 2) if self.shape == "cosine" else 1 - share

    def closes(self, observation: Observation) -> Tensor:
        done = _remembered(self, observation).steps.double()
        left = observation.open.sum(1) * (self._open_after(done + 1) / self._open_after(done).clamp(min=1e-12))
        many = observation.open.sum(1) - (left - 1e-6).floor().clamp(min=0).long()
        many = many.masked_fill(done + 1 >= self.steps, observation.open.shape[1])
        rank = ranked(SCORES[self.score](observation), observation.open)
        return rank < many.clamp(min=1).unsqueeze(1)


@dataclass(frozen=True)
class ReMDM(SetReference):
    """Ancestral steps in ``steps`` forwards that open closed positions again (ReMDM, arXiv 2503.00307): strategies and
    ``eta`` are those of :class:`pretrain.samplers.Remasking`, whose law this is, position by position, up to the rule
    that a set that closes nothing closes the surest."""

    steps: int = 16
    strategy: Strategy = "cap"
    eta: float = 0.04

    def __post_init__(self) -> None:
        _require_steps(self.steps)
        Remasking(self.strategy, self.eta)

    def log_inclusion(self, observation: Observation) -> Tensor:
        memory, remasking = _remembered(self, observation), Remasking(self.strategy, self.eta)
        if observation.reopenable is None:
            raise UnmaskError("ReMDM opens positions again; play with actions 'set+remask'")
        levels = torch.tensor(remasking.visible(self.steps), device=observation.open.device)  # (T, 3)
        now, then, active = levels[memory.steps.clamp(max=self.steps - 1)].unsqueeze(-1).unbind(1)  # each (N, 1)
        most = torch.where((now > 0) & (active > 0), ((1 - then) / now.clamp(min=1e-9)).clamp(max=1.0), 0.0)
        if self.strategy == "conf":
            worst = (-memory.chosen_with).masked_fill(~observation.reopenable, -torch.inf).softmax(-1).nan_to_num()
            reopen, sigma = most * worst, torch.zeros_like(most)
        else:
            sigma = self.eta * most if self.strategy == "rescale" else most.clamp(max=self.eta)
            reopen = sigma.expand(observation.open.shape)
        close = 1 - ((1 - then - sigma * now) / (1 - now).clamp(min=1e-9)).clamp(0, 1)
        close = torch.where(then >= 1, torch.ones_like(close), close).expand(observation.open.shape)
        return torch.cat([close, reopen], 1).log().masked_fill(~observation.choices, -torch.inf)


@dataclass(frozen=True)
class SelfPlanning(SetReference):
    """After forward s, the share s / T of the positions of which the denoiser is surest is closed and the others are
    open, whatever they were before (P2 with the denoiser as its own planner, arXiv 2502.03540). A closed position
    counts with the probability of the symbol that it holds, to the power ``eta``: 0 never opens it again."""

    steps: int = 16
    eta: float = 1.0

    deterministic = True

    def __post_init__(self) -> None:
        _require_steps(self.steps)
        if not isinstance(self.eta, int | float) or not self.eta >= 0:
            raise UnmaskError(f"eta must be at least 0, not {self.eta!r}")

    def log_inclusion(self, observation: Observation) -> Tensor:
        if observation.reopenable is None:
            raise UnmaskError("SelfPlanning opens positions again; play with actions 'set+remask'")
        done = _remembered(self, observation).steps
        log_probs, within = observation.denoised.log_probs, observation.open | observation.reopenable
        held = log_probs.gather(-1, observation.tokens.clamp(max=log_probs.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
        score = torch.where(observation.open, log_probs.max(-1).values, self.eta * held.clamp(min=-1e4))
        keep = torch.ceil(within.sum(1) * ((done + 1) / self.steps).clamp(max=1.0) - 1e-6).clamp(min=1)
        kept = ranked(score, within) < keep.unsqueeze(1)
        again = within_budget(observation.reopenable & ~kept, -score, observation)  # the least likely symbols first
        action = torch.cat([observation.open & kept, again], 1)
        return torch.zeros(action.shape, device=action.device).masked_fill(~action, -torch.inf)


def _remembered(rule: SetReference, observation: Observation) -> Memory:
    """Raises :class:`tasks.UnmaskError` outside rollouts."""
    if observation.memory is None:
        raise UnmaskError(f"{type(rule).__name__} looks back, which rollouts allow and environments do not")
    return observation.memory


def _require_steps(steps: int) -> None:
    if not isinstance(steps, int) or steps < 1:
        raise UnmaskError(f"steps must be a whole number of at least 1, not {steps!r}")


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
    "factor": Factor,
    "entropy_bounded": EntropyBounded,
    "kl_stability": KLStability,
    "schedule": Schedule,
    "remdm": ReMDM,
    "self_planning": SelfPlanning,
    "oracle": OracleSets,
}


def get(name: str, **options: float | str) -> SetReference:
    """The set reference called ``name``, for example ``get("threshold", theta=0.8)``.

    Raises:
        UnknownNameError: listing the known names. UnmaskError: an option that it does not have or that is out of range.
    """
    return reference.make("set reference", name, SET_REFERENCES, options)
