"""Reference policies: every customary unmasking rule, each a map from an observation to a distribution.

p_i is the denoiser's distribution at position i, p_i(1) >= p_i(2) >= ... its sorted probabilities. A rule of single
positions answers with a :class:`Categorical`, one of several positions with a :class:`Bernoulli`. A new rule is a
class here, under ``@register``; the command line, the sweeps and the documentation take their lists from that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from pretrain.samplers import Remasking, Strategy
from tasks import Instances, Task, UnknownNameError, UnmaskError, read_options
from tasks.settings import AtLeast1, InnerShare, NotNegative, Positive, validate
from unmask_env.distributions import Bernoulli, Categorical, Distribution, ranked
from unmask_env.state import Actions, History, Observation


class Policy:
    """Anything that chooses positions: a map from an observation to a distribution over actions.

    Attributes:
        name: of its row in tables; by default its class's.
        actions: the rules it is made for.
        sampled: evaluation samples it; else it takes the mode.
        deterministic: it gives some allowed actions probability 0, so that the KL to it may be infinite.
        sees_answers: it needs :meth:`for_instances`, and cannot be the reference of an environment.
        reads_hidden: it reads the denoiser's hidden states. looks_back: it reads the forward before.
    """

    name: ClassVar[str]
    actions: Actions = "single"
    sampled: bool = False
    deterministic: bool = False
    sees_answers: bool = False
    reads_hidden: bool = False
    looks_back: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def __call__(self, observation: Observation) -> Distribution:
        raise NotImplementedError

    def for_instances(self, task: Task, instances: Instances) -> Policy:
        """The policy for these problems. The oracles are told the answers here; all others stay as they are."""
        return self


@dataclass(frozen=True)
class Reference(Policy):
    """Base of the reference policies: frozen dataclasses, whose fields are their checked options.

    Attributes:
        customary: it is in tables that name no orders. sweeps: its curves, each a list of options, for frontiers.
    """

    customary: ClassVar[bool] = False
    sweeps: ClassVar[dict[str, list[dict[str, Any]]]] = {}
    sampled = True

    def __post_init__(self) -> None:
        validate(self)


REFERENCES: dict[str, type[Reference]] = {}
"""Every rule by name."""


def register(
    name: str, customary: bool = False, sweeps: dict[str, list[dict[str, Any]]] | None = None
) -> Callable[[type], type]:
    """List a class of reference policies under ``name``. ``sweeps``: its settings for frontiers, by curve."""

    def enter(rule: type) -> type:
        rule.name, rule.customary, rule.sweeps = name, customary, sweeps or {}
        REFERENCES[name] = rule
        return rule

    return enter


def reference(name: str, /, **options: Any) -> Reference:
    """The reference policy called ``name``, which may carry options: ``reference("threshold:theta=0.8")`` is
    ``reference("threshold", theta=0.8)``.

    Raises:
        UnknownNameError: listing the known names. UnmaskError: an option that it does not have or that is out of range.
    """
    base, colon, details = name.partition(":")
    if base not in REFERENCES:
        raise UnknownNameError("reference policy", base, REFERENCES)
    rule = REFERENCES[base]
    return rule(**read_options(f"reference policy {base!r}", details if colon else None, rule, options))


def customary(actions: Actions) -> list[str]:
    """The rules of tables that name no orders: of single positions, or of sets."""
    kind = "single" if actions == "single" else "set"
    return [name for name, rule in REFERENCES.items() if rule.customary and rule.actions == kind]


def default_reference(actions: Actions) -> str:
    """The reference policy where none is named."""
    return "softmax_confidence" if actions == "single" else "soft_threshold"


def sweeps(actions: Actions) -> dict[str, tuple[type[Reference], list[dict[str, Any]]]]:
    """By curve, the rule of sets and its settings, for frontiers where ``actions`` are allowed."""
    kinds = ("set", actions)
    return {
        curve: (rule, settings)
        for rule in REFERENCES.values()
        if rule.actions in kinds
        for curve, settings in rule.sweeps.items()
    }


# ---------------------------------------------------------------------- one position
def _left_to_right(seen: Observation) -> Tensor:
    length = seen.tokens.shape[1]
    return -torch.arange(length, device=seen.tokens.device).float().expand(seen.tokens.shape)


ScoreName = Literal["confidence", "margin", "entropy"]
SCORES: dict[str, Callable[[Observation], Tensor]] = {
    "confidence": lambda seen: seen.confidence,
    "margin": lambda seen: seen.margin,
    "entropy": lambda seen: -seen.entropy,
    "left_to_right": _left_to_right,
}
"""(N, L) scores of positions: the higher, the sooner it is filled."""


def evenly(among: Tensor) -> Categorical:
    """Uniform over ``among`` (N, L) bool."""
    return Categorical.of(torch.zeros(among.shape, device=among.device), among)


class _Best(Reference):
    """All mass on the fillable positions of the highest score, split evenly where several tie."""

    deterministic = True
    score: ClassVar[str]

    def __call__(self, seen: Observation) -> Categorical:
        score = SCORES[self.score](seen).masked_fill(~seen.fillable, -torch.inf)
        return evenly((score == score.max(1, keepdim=True).values) & seen.fillable)


@register("random", customary=True)
class Random(Reference):
    """Uniform over the fillable positions."""

    def __call__(self, seen: Observation) -> Categorical:
        return evenly(seen.fillable)


@register("left_to_right", customary=True)
class LeftToRight(_Best):
    """The lowest masked index."""

    score = "left_to_right"


@register("max_confidence", customary=True)
class MaxConfidence(_Best):
    """argmax_i p_i(1); LLaDA's ``low_confidence`` remasking."""

    score = "confidence"


@register("margin", customary=True)
class Margin(_Best):
    """argmax_i p_i(1) - p_i(2) (Kim et al. 2025, arXiv 2502.06768)."""

    score = "margin"


@register("entropy", customary=True)
class Entropy(_Best):
    """The least entropy."""

    score = "entropy"


@register("softmax_confidence")
@dataclass(frozen=True)
class SoftmaxConfidence(Reference):
    """g(i) proportional to exp(p_i(1) / tau); UPO's stochastic reference (Hong et al. 2025, arXiv 2510.05725).

    Args:
        tau: temperature; UPO uses 0.05.
        literal: the released code's form, sum_v exp(p_iv / tau) over the whole vocabulary. The two coincide for small
            vocabularies; at LLaDA's 126,464 symbols the literal one is nearly uniform below p_i(1) of about 0.58. Of
            large vocabularies, symbols that are not shown count as of probability 0.
    """

    tau: Positive = 0.05
    literal: bool = False

    def __call__(self, seen: Observation) -> Categorical:
        if not self.literal:
            return Categorical.of(seen.confidence / self.tau, seen.fillable)
        log_probs = seen.denoised.log_probs
        scores = (seen.top_log_probs if log_probs is None else log_probs).exp() / self.tau  # (N, L, K)
        hidden = seen.denoised.vocab_size - scores.shape[-1]
        if hidden:
            scores = torch.cat([scores, torch.full_like(scores[..., :1], math.log(hidden))], -1)
        return Categorical.of(scores.logsumexp(-1), seen.fillable)


@register("softmax_margin")
@dataclass(frozen=True)
class SoftmaxMargin(Reference):
    """g(i) proportional to exp((p_i(1) - p_i(2)) / tau): the margin heuristic with full support."""

    tau: Positive = 0.05

    def __call__(self, seen: Observation) -> Categorical:
        return Categorical.of(seen.margin / self.tau, seen.fillable)


@register("top_k", customary=True)
@dataclass(frozen=True)
class TopK(Reference):
    """Uniform over the k most confident fillable positions (all where there are fewer); UPO uses k = 5. Positions that
    tie for the last place are taken by lowest index."""

    k: AtLeast1 = 5

    def __call__(self, seen: Observation) -> Categorical:
        return evenly((ranked(seen.confidence, seen.fillable) < self.k) & seen.fillable)


NO_ORDER = (
    "this denoiser has learned no order; the reference 'learned' is for those of `unmask pretrain lomdm`, "
    "learned-schedule and genmd4"
)


def order_weights(seen: Observation) -> Tensor:
    """(N, L) of the denoiser. Raises :class:`tasks.UnmaskError` where it has learned no order."""
    if seen.order_weights is None:
        raise UnmaskError(NO_ORDER)
    return seen.order_weights


@register("learned")
class Learned(Reference):
    """The order that the denoiser itself learned: g(i) proportional to its weight w_i.

    For LoMDM (arXiv 2602.02112) the velocity of its unmasking process, w / sum w; for a learned multivariate schedule
    (arXiv 2511.19152) the Plackett-Luce order of its positions; for GenMD4 what its predictions imply.
    """

    def __call__(self, seen: Observation) -> Categorical:
        return Categorical.of(order_weights(seen).log(), seen.fillable)


@register("learned_greedy")
class LearnedGreedy(_Best):
    """The position of the largest weight: a heuristic, where :class:`Learned` is the model's own distribution."""

    score = "order_weights"


SCORES["order_weights"] = order_weights


@register("oracle")
@dataclass(frozen=True)
class Oracle(Reference):
    """Sees the answers and never picks a position whose top symbol is wrong while a right one is fillable.

    Uniform over the fillable positions whose top symbol is right; over all of them where none is. For pretraining and
    as the upper-bound row of tables only. :meth:`for_instances` tells it the answers.

    Args:
        answers: (N, L), or (N, M, L) where several are right.
    """

    answers: Tensor | None = None
    sees_answers = True

    def for_instances(self, task: Task, instances: Instances) -> Oracle:
        return replace(self, answers=task.all_answers(instances))

    def answer(self, seen: Observation) -> Tensor:
        """(N, L): of the right answers that contradict the board least, and of those the ones that are right about the
        top symbol of a fillable position, if any, the one that the denoiser finds likeliest."""
        if self.answers is None:
            raise UnmaskError("the oracle sees the answers; give them with .for_instances(task, instances)")
        if self.answers.ndim == 2:
            return self.answers
        several = self.answers.transpose(1, 2)  # (N, L, M)
        masked = seen.masked.unsqueeze(-1)
        contradictions = (~masked & (several != seen.tokens.unsqueeze(-1))).sum(1)  # (N, M)
        among = contradictions == contradictions.min(1, keepdim=True).values
        right = (several == seen.denoised.best.unsqueeze(-1)) & seen.fillable.unsqueeze(-1)
        helped = among & right.any(1)
        among = torch.where(helped.any(1, keepdim=True), helped, among)
        likelihood = (seen.denoised.log_prob_of(several).clamp(min=-30.0) * masked).sum(1)
        best = likelihood.masked_fill(~among, -torch.inf).argmax(1)
        return self.answers[torch.arange(len(best), device=best.device), best]

    def right(self, seen: Observation) -> Tensor:
        """(N, L) bool: fillable, and the denoiser's most likely symbol is that of :meth:`answer`."""
        return seen.fillable & (seen.denoised.best == self.answer(seen))

    def __call__(self, seen: Observation) -> Distribution:
        right = self.right(seen)
        return evenly(torch.where(right.any(1, keepdim=True), right, seen.fillable))


# ---------------------------------------------------------------------- several positions
class _Sets(Reference):
    """Rules of several positions: each entry is in the set independently."""

    actions = "set"

    def _answer(self, seen: Observation, fill: Tensor, remask: Tensor | None = None) -> Bernoulli:
        """Of the log-probabilities (N, L) that positions are filled and, if given, masked again."""
        entries = fill
        if seen.remaskable is not None:
            entries = torch.cat([fill, torch.full_like(fill, -torch.inf) if remask is None else remask], 1)
        left = None if seen.history is None else seen.history.remasks_left
        return Bernoulli(entries.masked_fill(~seen.action_mask, -torch.inf), seen.action_mask, left)

    def _history(self, seen: Observation) -> History:
        if seen.history is None:
            raise UnmaskError(f"{self.name} looks back, and an observation read from arrays holds no history")
        return seen.history

    def _dealt(self, seen: Observation, steps: int) -> tuple[Tensor, Tensor]:
        """(N,) each: the forwards that the block in play has had, and how many of all ``steps`` it has. They are dealt
        to the blocks by their holes, at least one each. Without blocks: those so far, and ``steps``."""
        history = self._history(seen)
        if history.block is None or history.block_holes is None:
            return history.steps, torch.full_like(history.steps, steps)
        holes = history.block_holes  # (N, B)
        count = (holes > 0).cumsum(1)  # of blocks that take a forward at least, up to each
        ends = (steps * holes.cumsum(1) / holes.sum(1, keepdim=True).clamp(min=1)).round().long()
        ends = (ends - count).clamp(min=0).cummax(1).values + count
        ends = pad(torch.minimum(ends, steps - count[:, -1:] + count), (1, 0))
        begin, end = (ends.gather(1, history.block.unsqueeze(1) + after).squeeze(1) for after in (0, 1))
        return (history.steps - begin).clamp(min=0), (end - begin).clamp(min=1)


def certainly(chosen: Tensor) -> Tensor:
    """(N, L) log-probabilities: 0 where ``chosen`` bool, else -inf."""
    return torch.zeros(chosen.shape, device=chosen.device).masked_fill(~chosen, -torch.inf)


@register("soft_threshold")
@dataclass(frozen=True)
class SoftThreshold(_Sets):
    """Position i is filled with probability sigmoid((p_i(1) - theta) / tau): a confidence threshold with full support.

    Where positions may be masked again, each is with probability ``remask``.
    """

    theta: InnerShare = 0.9
    tau: Positive = 0.05
    remask: InnerShare = 0.01

    def __call__(self, seen: Observation) -> Bernoulli:
        fill = logsigmoid((seen.confidence - self.theta) / self.tau)
        return self._answer(seen, fill, torch.full_like(fill, math.log(self.remask)))


class _Deterministic(_Sets):
    """Says which positions to fill."""

    deterministic = True

    def fills(self, seen: Observation) -> Tensor:
        """(N, L) bool, at least one in every row with a fillable position."""
        raise NotImplementedError

    def __call__(self, seen: Observation) -> Bernoulli:
        return self._answer(seen, certainly(self.fills(seen) & seen.fillable))


_SHARES = (0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.999)
_STEPS = (3, 4, 5, 6, 8, 12)


@register(
    "fixed_k",
    customary=True,
    sweeps={
        f"fixed_k {score}": [{"k": k, "score": score} for k in (1, 2, 3, 4, 5, 6, 8)]
        for score in ("confidence", "margin", "entropy")
    },
)
@dataclass(frozen=True)
class FixedK(_Deterministic):
    """The ``k`` best fillable positions of a heuristic's score, ties by lowest index (LLaDA fills L / steps per
    forward)."""

    k: AtLeast1 = 2
    score: ScoreName = "margin"

    def fills(self, seen: Observation) -> Tensor:
        return ranked(SCORES[self.score](seen), seen.fillable) < self.k


@register(
    "threshold",
    customary=True,
    sweeps={
        "threshold": [{"theta": theta} for theta in _SHARES],
        "threshold margin": [{"theta": theta, "score": "margin"} for theta in _SHARES],
    },
)
@dataclass(frozen=True)
class Threshold(_Deterministic):
    """Every fillable position whose score reaches ``theta``, and the ``at_least`` best ones in any case (Fast-dLLM's
    confidence threshold, arXiv 2505.22618; its default is 0.9). By entropy: whose entropy is at most ``-theta`` nats.
    With ``at_least`` of block length / steps it is the block refinement of LLaDA2 and ``diffusers``."""

    theta: float = 0.9
    score: ScoreName = "confidence"
    at_least: AtLeast1 = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score == "entropy" and not self.theta <= 0:
            raise UnmaskError(f"by entropy, theta must be at most 0, not {self.theta!r}")
        if self.score != "entropy" and not 0 < self.theta < 1:
            raise UnmaskError(f"theta must be above 0 and below 1, not {self.theta!r}")

    def fills(self, seen: Observation) -> Tensor:
        score = SCORES[self.score](seen)
        return (score >= self.theta) | (ranked(score, seen.fillable) < self.at_least)


@register(
    "factor",
    customary=True,
    sweeps={
        "factor": [{"factor": factor} for factor in (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)]
    },
)
@dataclass(frozen=True)
class Factor(_Deterministic):
    """The n most confident fillable positions, for the largest n with (n + 1) (1 - c_n) < ``factor``, where c_n is the
    n-th highest confidence, and the best one in any case (Fast-dLLM's factor rule, arXiv 2505.22618, section 3.3)."""

    factor: Positive = 1.0

    def fills(self, seen: Observation) -> Tensor:
        rank = ranked(seen.confidence, seen.fillable)  # (N, L), 0 is the best
        # c_n falls with n, so what holds for n holds for every smaller number.
        return ((rank + 2) * (1 - seen.confidence) < self.factor) | (rank == 0)


@register(
    "entropy_bounded",
    customary=True,
    sweeps={"entropy_bounded": [{"gamma": gamma} for gamma in (0.0, 1e-4, 1e-3, 0.01, 0.1, 0.4, 1.5)]},
)
@dataclass(frozen=True)
class EntropyBounded(_Deterministic):
    """The k fillable positions of least entropy H, for the largest k whose sum_i H_i - max_i H_i is at most ``gamma``:
    a bound on how far their joint is from the product that fills them (EB-sampler, arXiv 2505.24857). With actions
    ``accept`` it is the sampler of ``transformers``' DiffusionGemma, whose ``entropy_bound`` is ``gamma``."""

    gamma: NotNegative = 0.1

    def fills(self, seen: Observation) -> Tensor:
        entropy = seen.entropy
        rank = ranked(-entropy, seen.fillable)
        ordered = entropy.masked_fill(~seen.fillable, 0.0).gather(1, rank.argsort(1))
        before = (ordered.cumsum(1) - ordered).gather(1, rank.clamp(max=rank.shape[1] - 1))  # of those with less
        return (before <= self.gamma) | (rank == 0)


@register(
    "kl_stability",
    customary=True,
    sweeps={
        "kl_stability": [
            {"theta": theta, "epsilon": epsilon} for epsilon in (0.01, 0.1) for theta in (0.6, 0.8, 0.9, 0.95)
        ]
    },
)
@dataclass(frozen=True)
class KLStability(_Deterministic):
    """Every fillable position whose confidence reaches ``theta`` and whose distribution moved by KL(p || p before) of
    at most ``epsilon`` since the last forward; the most confident one where there is none (KLASS, arXiv 2511.05664,
    with a history of one forward; its defaults for LLaDA are 0.6 and 0.01). Of large vocabularies over what is shown
    now."""

    theta: InnerShare = 0.6
    epsilon: Positive = 0.01
    looks_back = True

    def fills(self, seen: Observation) -> Tensor:
        history, score = self._history(seen), seen.confidence
        best = ranked(score, seen.fillable) == 0
        if history.previous is None:
            return best
        now, symbols = seen.denoised.log_probs, None
        if now is None:
            now, symbols = seen.top_log_probs, seen.top_symbols
        before = history.previous.log_probs if symbols is None else history.previous.log_prob_of(symbols)
        moved = torch.where(now > -torch.inf, now.exp() * (now - before.clamp(min=-1e4)), 0.0).sum(-1)
        stable = (score >= self.theta) & (moved <= self.epsilon) & (history.steps > 0).unsqueeze(1)
        return stable | best


@register(
    "schedule",
    customary=True,
    sweeps={
        f"schedule {shape}": [{"steps": steps, "shape": shape} for steps in _STEPS] for shape in ("cosine", "linear")
    },
)
@dataclass(frozen=True)
class Schedule(_Deterministic):
    """The best fillable positions by ``score``, as many as leave masked what a schedule of ``steps`` forwards says: a
    share cos(pi s / 2 T) after forward s (MaskGIT, arXiv 2202.04200), or 1 - s / T. Where filling goes block by block,
    the forwards are dealt to the blocks by their holes, at least one each, and every block has a schedule of its own
    (as LLaDA's, arXiv 2502.09992); so it is with the other rules of a number of steps."""

    steps: AtLeast1 = 8
    shape: Literal["cosine", "linear"] = "cosine"
    score: ScoreName = "confidence"

    def _masked_after(self, share: Tensor) -> Tensor:
        share = share.clamp(max=1.0)
        return torch.cos(share * math.pi / 2) if self.shape == "cosine" else 1 - share

    def fills(self, seen: Observation) -> Tensor:
        done, steps = self._dealt(seen, self.steps)
        done, masked = done.double(), seen.fillable.sum(1)
        left = masked * (self._masked_after((done + 1) / steps) / self._masked_after(done / steps).clamp(min=1e-12))
        count = masked - (left + 1e-6).floor().clamp(min=0).long()
        count = count.masked_fill(done + 1 >= steps, seen.fillable.shape[1])
        return ranked(SCORES[self.score](seen), seen.fillable) < count.clamp(min=1).unsqueeze(1)


class _Remasking(_Sets):
    actions = "set+remask"

    def __call__(self, seen: Observation) -> Bernoulli:
        if seen.remaskable is None:
            raise UnmaskError(f"{self.name} masks positions again; play with actions 'set+remask'")
        return self._answer(seen, *self.log_probs(seen))

    def log_probs(self, seen: Observation) -> tuple[Tensor, Tensor]:
        """(N, L) log-probabilities that positions are filled, and that they are masked again."""
        raise NotImplementedError


@register(
    "remdm",
    sweeps={
        f"remdm {strategy}": [{"steps": steps, "strategy": strategy, "eta": 0.04} for steps in _STEPS]
        for strategy in ("cap", "rescale", "loop", "conf")
    },
)
@dataclass(frozen=True)
class ReMDM(_Remasking):
    """Ancestral steps in ``steps`` forwards that mask filled positions again (ReMDM, arXiv 2503.00307): strategies and
    ``eta`` are those of :class:`pretrain.samplers.Remasking`, whose probabilities these are, position by position, up
    to the rule that an empty set fills the most confident one."""

    steps: AtLeast1 = 16
    strategy: Strategy = "cap"
    eta: float = 0.04

    def __post_init__(self) -> None:
        super().__post_init__()
        Remasking(self.strategy, self.eta)

    def log_probs(self, seen: Observation) -> tuple[Tensor, Tensor]:
        history, remasking = self._history(seen), Remasking(self.strategy, self.eta)
        done, steps = self._dealt(seen, self.steps)
        fill = remask = torch.zeros_like(history.fill_prob)
        for total in steps.unique().tolist():  # one, where filling does not go block by block
            parts = remasking.probabilities(done, total, seen.remaskable, history.fill_prob)
            fill, remask = (
                torch.where((steps == total).unsqueeze(1), *pair) for pair in zip(parts, (fill, remask), strict=True)
            )
        return fill.log(), remask.log()


@register(
    "self_planning",
    sweeps={"self_planning": [{"steps": steps, "eta": eta} for eta in (0.5, 1.0, 2.0) for steps in _STEPS]},
)
@dataclass(frozen=True)
class SelfPlanning(_Remasking):
    """After forward s, the share s / T of the positions of which the denoiser is most confident is filled and the
    others are masked, whatever they were before (P2 with the denoiser as its own planner, arXiv 2502.03540). A filled
    position counts with the probability of the symbol that it holds, to the power ``eta``: 0 never masks it again."""

    steps: AtLeast1 = 16
    eta: NotNegative = 1.0

    deterministic = True

    def log_probs(self, seen: Observation) -> tuple[Tensor, Tensor]:
        history, within = self._history(seen), seen.fillable | seen.remaskable
        held = seen.denoised.log_prob_of(seen.tokens.clamp(max=seen.denoised.vocab_size - 1))
        score = torch.where(seen.fillable, seen.denoised.best_log_prob, self.eta * held.clamp(min=-1e4))
        done, steps = self._dealt(seen, self.steps)
        share = ((done + 1) / steps).clamp(max=1.0)
        count = torch.ceil(within.sum(1) * share - 1e-6).clamp(min=1)
        kept = ranked(score, within) < count.unsqueeze(1)
        remask = seen.remaskable & ~kept
        if history.remasks_left is not None:  # the least likely symbols first
            remask = remask & (ranked(-score, remask) < history.remasks_left.unsqueeze(1))
        return certainly(seen.fillable & kept), certainly(remask)


@register("oracle_sets")
@dataclass(frozen=True)
class OracleSets(_Deterministic):
    """Sees the answers: fills every position whose top symbol is right, or the most confident (a mistake) where none
    is, and masks every wrong one again. A yardstick, not a bound: filling less can lead further
    (:func:`unmask_env.exact_sets.fewest_forwards`)."""

    oracle: Oracle = Oracle()
    sees_answers = True

    def for_instances(self, task: Task, instances: Instances) -> OracleSets:
        return OracleSets(self.oracle.for_instances(task, instances))

    def fills(self, seen: Observation) -> Tensor:
        right = self.oracle.right(seen)
        most_confident = ranked(seen.confidence, seen.fillable) == 0
        return torch.where(right.any(1, keepdim=True), right, most_confident)

    def __call__(self, seen: Observation) -> Bernoulli:
        remask = None
        if seen.remaskable is not None:
            remask = certainly(seen.remaskable & (seen.tokens != self.oracle.answer(seen)))
        return self._answer(seen, certainly(self.fills(seen) & seen.fillable), remask)


# ---------------------------------------------------------------------- what learners ask
def require_full_support(policy: Policy) -> None:
    """Raises :class:`tasks.UnmaskError` where KL(pi || g) would be infinite: g gives allowed actions probability 0."""
    if policy.deterministic or policy.sees_answers:
        raise UnmaskError(
            f"the KL to the deterministic reference {getattr(policy, 'name', type(policy).__name__)} is infinite; take "
            "a softmax reference, random, or, for UPO, regulariser cross_entropy"
        )


def require_learned(process: Any) -> None:
    """Raises :class:`tasks.UnmaskError` if the denoiser of ``process`` has learned no order; one forward on an empty
    sequence."""
    task = process.task
    empty = torch.full((1, task.length), task.mask_id, device=process.device)
    order_weights(process.observe(process.reset(Instances(empty, torch.zeros_like(empty)))))
