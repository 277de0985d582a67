"""Reference policies: every customary unmasking order as an object with log-probabilities.

Each has ``log_prob(observation) -> (N, L)``: one on the open positions in total, -inf elsewhere; and
``sample(observation, generator) -> (N,)``. Deterministic heuristics split ties evenly.

p_i is the denoiser's distribution at position i, p_i(1) >= p_i(2) >= ... its sorted probabilities.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tasks import Task, UnknownNameError, UnmaskError
from unmask_env.core import Denoised, Observation, choose, masked_log_softmax


class Reference:
    """Base of the reference policies. ``deterministic`` ones put all mass on the best positions."""

    deterministic = False

    def log_prob(self, observation: Observation) -> Tensor:
        """(N, L) log-probabilities over the open positions; -inf elsewhere."""
        raise NotImplementedError

    def sample(self, observation: Observation, generator: torch.Generator) -> Tensor:
        """(N,) positions drawn from :meth:`log_prob`."""
        return choose(self.log_prob(observation), generator)


class _Greedy(Reference):
    """All mass on the open positions of the highest score, split evenly where several tie."""

    deterministic = True

    def score(self, observation: Observation) -> Tensor:
        """(N, L) scores; the highest open one is chosen."""
        raise NotImplementedError

    def log_prob(self, observation: Observation) -> Tensor:
        score = self.score(observation).masked_fill(~observation.open, -torch.inf)
        best = (score == score.max(1, keepdim=True).values) & observation.open
        return masked_log_softmax(torch.zeros_like(score), best)


def confidence(observation: Observation) -> Tensor:
    """(N, L) probability of the most likely symbol, max_v p_iv."""
    return observation.denoised.log_probs.max(-1).values.exp()


def margin(observation: Observation) -> Tensor:
    """(N, L) p_i(1) - p_i(2), the top-probability margin (Kim et al. 2025, arXiv 2502.06768, section 4)."""
    top = observation.denoised.log_probs.topk(2, -1).values.exp()
    return top[..., 0] - top[..., 1]


def entropy(observation: Observation) -> Tensor:
    """(N, L) entropy of p_i in nats, with 0 log 0 = 0; summed in sorted order, so that equal distributions tie."""
    probabilities = observation.denoised.log_probs.sort(-1).values.exp()
    return -torch.xlogy(probabilities, probabilities).sum(-1)


class Random(Reference):
    """Uniform over the open positions."""

    def log_prob(self, observation: Observation) -> Tensor:
        return masked_log_softmax(torch.zeros_like(observation.open, dtype=torch.float32), observation.open)


class LeftToRight(_Greedy):
    """The lowest open index."""

    def score(self, observation: Observation) -> Tensor:
        length = observation.open.shape[1]
        return -torch.arange(length, device=observation.open.device).float().expand(observation.open.shape)


class MaxConfidence(_Greedy):
    """argmax_i p_i(1); LLaDA's ``low_confidence`` remasking."""

    def score(self, observation: Observation) -> Tensor:
        return confidence(observation)


class Margin(_Greedy):
    """argmax_i p_i(1) - p_i(2)."""

    def score(self, observation: Observation) -> Tensor:
        return margin(observation)


class Entropy(_Greedy):
    """The least entropy."""

    def score(self, observation: Observation) -> Tensor:
        return -entropy(observation)


@dataclass(frozen=True)
class SoftmaxConfidence(Reference):
    """g(i) proportional to exp(p_i(1) / tau); UPO's stochastic reference (Hong et al. 2025, arXiv 2510.05725).

    Args:
        tau: temperature; UPO uses 0.05.
        literal: the released code's form, sum_v exp(p_iv / tau) over the whole vocabulary. The two coincide for small
            vocabularies; at LLaDA's 126,464 symbols the literal one is nearly uniform below p_i(1) of about 0.58.
    """

    tau: float = 0.05
    literal: bool = False

    def __post_init__(self) -> None:
        require_positive("tau", self.tau)

    def log_prob(self, observation: Observation) -> Tensor:
        if self.literal:
            scores = (observation.denoised.log_probs.exp() / self.tau).logsumexp(-1)
        else:
            scores = confidence(observation) / self.tau
        return masked_log_softmax(scores, observation.open)


@dataclass(frozen=True)
class SoftmaxMargin(Reference):
    """g(i) proportional to exp((p_i(1) - p_i(2)) / tau): the margin heuristic with full support."""

    tau: float = 0.05

    def __post_init__(self) -> None:
        require_positive("tau", self.tau)

    def log_prob(self, observation: Observation) -> Tensor:
        return masked_log_softmax(margin(observation) / self.tau, observation.open)


@dataclass(frozen=True)
class TopK(Reference):
    """Uniform over the k most confident open positions (all of them where fewer are open); UPO uses k = 5.

    Positions that tie for the last place are taken by lowest index.
    """

    k: int = 5

    def __post_init__(self) -> None:
        if not isinstance(self.k, int):
            raise UnmaskError(f"k must be a whole number, not {self.k!r}")
        require_positive("k", self.k)

    def log_prob(self, observation: Observation) -> Tensor:
        score = confidence(observation).masked_fill(~observation.open, -torch.inf)
        order = score.sort(dim=1, descending=True, stable=True).indices
        among = torch.zeros_like(observation.open).scatter(1, order[:, : self.k], True) & observation.open
        return masked_log_softmax(torch.zeros_like(score), among)


NO_ORDER = (
    "this denoiser has learned no order; the reference 'learned' is for those of `unmask pretrain lomdm`, "
    "learned-schedule and genmd4"
)


class Learned(Reference):
    """The order that the denoiser itself learned: g(i) proportional to its exponent w_i.

    For LoMDM (arXiv 2602.02112) the velocity of its revealing process, w_i / sum w; for a learned multivariate schedule
    (arXiv 2511.19152) the Plackett-Luce order of its positions; for GenMD4 what its predictions imply.
    """

    def log_prob(self, observation: Observation) -> Tensor:
        return masked_log_softmax(_exponents(observation).log(), observation.open)


class LearnedGreedy(_Greedy):
    """The position that :class:`Learned` prefers most: a heuristic, as the model's own law is the stochastic one."""

    def score(self, observation: Observation) -> Tensor:
        return _exponents(observation)


def _exponents(observation: Observation) -> Tensor:
    if observation.denoised.exponents is None:
        raise UnmaskError(NO_ORDER)
    return observation.denoised.exponents


@dataclass(frozen=True)
class Oracle(Reference):
    """Sees the answers and never picks a position whose top symbol is wrong while a right one is open.

    Uniform over the open positions whose top symbol is right; over all open ones where none is. For pretraining and
    as the upper-bound row of tables only. :func:`unmask_env.core.rollout` hands it the answers.

    Args:
        answers: (N, L), or (N, K, L) where several are right.
    """

    answers: Tensor | None = None

    def with_answers(self, answers: Tensor) -> Oracle:
        return replace(self, answers=answers)

    def answer(self, observation: Observation) -> Tensor:
        """(N, L): of the right answers that contradict the board least, and of those the ones that are right about the
        top symbol of an open position, if any, the one that the denoiser finds likeliest."""
        if self.answers is None:
            raise UnmaskError("the oracle order sees the answers; give them with .with_answers(instances.answers)")
        if self.answers.ndim == 2:
            return self.answers
        log_probs, several = observation.denoised.log_probs, self.answers.transpose(1, 2)  # (N, L, V), (N, L, K)
        hole = (observation.tokens == log_probs.shape[-1]).unsqueeze(-1)
        contradictions = (~hole & (several != observation.tokens.unsqueeze(-1))).sum(1)  # (N, K)
        among = contradictions == contradictions.min(1, keepdim=True).values
        right = (several == log_probs.argmax(-1, keepdim=True)) & observation.open.unsqueeze(-1)
        helped = among & right.any(1)
        among = torch.where(helped.any(1, keepdim=True), helped, among)
        likelihood = (log_probs.gather(2, several).clamp(min=-30.0) * hole).sum(1)
        best = likelihood.masked_fill(~among, -torch.inf).argmax(1)
        return self.answers[torch.arange(len(best), device=best.device), best]

    def right(self, observation: Observation) -> Tensor:
        """(N, L) bool: open, and the denoiser's most likely symbol is that of :meth:`answer`."""
        return observation.open & (observation.denoised.log_probs.argmax(-1) == self.answer(observation))

    def log_prob(self, observation: Observation) -> Tensor:
        right = self.right(observation)
        among = torch.where(right.any(1, keepdim=True), right, observation.open)
        return masked_log_softmax(torch.zeros_like(among, dtype=torch.float32), among)


def require_positive(name: str, value: float) -> None:
    """Raises :class:`tasks.UnmaskError` unless value > 0."""
    if not isinstance(value, int | float) or not value > 0:
        raise UnmaskError(f"{name} must be a number greater than 0, not {value!r}")


def require_full_support(reference: Reference) -> None:
    """Raises :class:`tasks.UnmaskError` where KL(pi || g) would be infinite: g gives open positions probability 0."""
    if getattr(reference, "deterministic", False) or isinstance(reference, Oracle):  # any order may be a reference
        raise UnmaskError(
            f"the KL to the deterministic reference {type(reference).__name__} is infinite; take a softmax reference, "
            "random, or, for UPO, regulariser cross_entropy"
        )


def require_learned(denoiser: Callable[[Tensor], Denoised], task: Task) -> None:
    """Raises :class:`tasks.UnmaskError` if ``denoiser`` has learned no order; one forward on an empty sequence."""
    if denoiser(torch.full((1, task.length), task.mask_id, device=denoiser.device)).exponents is None:
        raise UnmaskError(NO_ORDER)


REFERENCES: dict[str, Callable[..., Reference]] = {
    "random": Random,
    "left_to_right": LeftToRight,
    "max_confidence": MaxConfidence,
    "margin": Margin,
    "entropy": Entropy,
    "softmax_confidence": SoftmaxConfidence,
    "softmax_margin": SoftmaxMargin,
    "top_k": TopK,
    "learned": Learned,
    "learned_greedy": LearnedGreedy,
    "oracle": Oracle,
}


def get(name: str, **options: float) -> Reference:
    """The reference policy called ``name``, for example ``get("top_k", k=5)``.

    Raises:
        UnknownNameError: listing the known names. UnmaskError: an option that it does not have or that is out of range.
    """
    return make("reference policy", name, REFERENCES, options)


def make(what: str, name: str, known: Mapping[str, Callable[..., Any]], options: Mapping[str, Any]) -> Any:
    """What ``known`` has under ``name``, made with ``options``; ``what`` it is, for messages.

    Raises:
        UnknownNameError, UnmaskError: as :func:`get`.
    """
    if name not in known:
        raise UnknownNameError(what, name, known)
    unknown = sorted(options.keys() - inspect.signature(known[name]).parameters.keys())
    if unknown:
        raise UnmaskError(f"{what} {name!r} does not take {', '.join(unknown)}")
    return known[name](**options)
