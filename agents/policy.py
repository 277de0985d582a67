"""The order policy: a reader of the board and of the denoiser's output, and a head that turns what it read into a
distribution over actions.

Shapes: N boards, L positions, V symbols, K shown symbols, C coordinates, D channels, A entries of an action.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from agents.decoding import Read, Thresholds, most_likely_set
from pretrain.backbone import Backbone, Reader
from pretrain.card import HubModel
from pretrain.checkpoint import CheckpointError, load_model
from tasks import Task, UnmaskError
from tasks.settings import Depth, InnerShare, NotNegative, Width, check, validate
from unmask_env.denoiser import Denoiser
from unmask_env.distributions import Bernoulli, Categorical, Distribution, PlackettLuce, log_complement, log_odds
from unmask_env.reference import MaxConfidence, Policy, Reference, SoftThreshold, TopK, reference
from unmask_env.state import FLOOR, SHOWN, WHOLE, Observation

PACKAGED_POLICIES = Path(__file__).parent / "models"
FEATURES = 8  # most likely symbols whose probabilities the features hold, as in UPO's released head
REFILL_PENALTY = 2.0  # times the belief weight: how far the log-odds of filling fall per remasking of a position
CERTAIN_LOG_ODDS = 30.0  # of filling a position without reading the board
MAX_REMASK_COUNT = 3  # more are as many
TAGS = ["unmask", "discrete-diffusion", "decoding-order"]  # of cards

Base = Literal["none", "softmax_confidence", "softmax_margin", "learned", "soft_threshold"]
DistributionName = Literal["categorical", "bernoulli", "plackett_luce"]


@dataclass(frozen=True)
class PolicyConfig:
    """What a new policy looks like and reads; each is an option of ``unmask train``."""

    copy: bool = True
    """start from a copy of the denoiser's embeddings, last blocks and head, where it has them (dim and heads are then
    the denoiser's)"""
    layers: Depth | None = None
    """transformer blocks; default: all of the denoiser's, or 3 when not copying"""
    dim: Width = 48
    """on a line of positions attention sees distances where this is a multiple of 2 heads"""
    heads: Depth = 4
    num_passes: Depth = 2
    """how often the policy reads the board, each time with its last belief in place of the masks; weights are shared"""
    defer_above: NotNegative = 0.97
    """confidence of a fillable position from which on the base decides, and nothing is read; above 1: never (policies
    over sets always read)"""
    read_tokens: bool = True
    """see the symbols on the board"""
    read_denoiser: bool = True
    """read with the denoiser's distributions in place of the masks (the score knows its top symbol in any case)"""
    read_hidden: bool = False
    """see the denoiser's last hidden states, where it has them"""
    state_head: bool = False
    """score a position also by a linear function of the policy's states, which know where it stands: for tasks whose
    positions differ, as in text. Policies over sets have it in any case"""
    distribution: DistributionName = "bernoulli"
    """of policies over sets: each position for itself (bernoulli), or drawn without replacement up to a learned stop
    (plackett_luce). Policies of single positions are categorical"""


# ---------------------------------------------------------------------- heads: from what was read to a distribution
def features(seen: Observation, k: int) -> Tensor:
    """(N, L, 2 k + 4): top k probabilities, their logs / 8, entropy, margin, fillable flag, fraction fillable."""
    top, fillable = seen.denoised.top_k_log_probs(k).clamp(min=-16.0), seen.fillable.float()
    left = fillable.mean(1, keepdim=True).expand_as(fillable)
    return torch.cat([top.exp(), top / 8, torch.stack([seen.entropy, seen.margin, fillable, left], -1)], -1)


def remask_count(seen: Observation) -> Tensor:
    """(N, L) how often each position was masked again, up to a maximum: what policies and critics remember."""
    return seen.remask_count.clamp(max=MAX_REMASK_COUNT)


def belief_log_prob(seen: Observation, belief: Tensor, symbols: Tensor) -> Tensor:
    """(N, L) what a ``belief`` (N, L, K) of log-probabilities gives ``symbols`` (N, L); the floor to those that are not
    shown."""
    if seen.denoised.log_probs is not None:
        return belief.gather(-1, symbols.unsqueeze(-1)).squeeze(-1)
    same = seen.top_symbols == symbols.unsqueeze(-1)
    return belief.masked_fill(~same, FLOOR).amax(-1)


def belief_log_odds(seen: Observation, belief: Tensor, symbols: Tensor) -> Tensor:
    """(N, L) log-odds of ``symbols`` (N, L) in ``belief`` (N, L, K)."""
    return log_odds(belief_log_prob(seen, belief, symbols).clamp(max=-1e-6))


class Head(nn.Module):
    """Scores positions: a weight times the log-odds that the policy's belief gives to the denoiser's top symbol, plus a
    linear function of the features, plus one of the states.

    Args:
        state_outputs: 0, or how many linear functions of the states (N, L, D) it has. belief_weight: at the start.
    """

    def __init__(self, dim: int, vocab_size: int, belief_weight: float, state_outputs: int) -> None:
        super().__init__()
        self.num_features = min(FEATURES, vocab_size)
        self.belief_weight = nn.Parameter(torch.tensor(float(belief_weight)))
        self.feature_head = zeroed(nn.Linear(2 * self.num_features + 4, 1, bias=False))
        self.state_head = zeroed(nn.Linear(dim, state_outputs)) if state_outputs else None

    def scores(self, seen: Observation, belief: Tensor) -> Tensor:
        """(N, L), meaningful at fillable positions, without the base and the states."""
        odds = belief_log_odds(seen, belief, seen.denoised.best)
        return self.belief_weight * odds + self.feature_head(features(seen, self.num_features)).squeeze(-1)


def zeroed(linear: nn.Linear) -> nn.Linear:
    """``linear`` with all of its parameters set to 0."""
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


class PositionHead(Head):
    """One position: the softmax of the base's log-probabilities plus the scores.

    With a ``beta`` the scores are log-odds of values, Q(s, a) between the two ends of ``value_range``, and the policy
    is g(a | s) exp(Q(s, a) / beta), normalised: for this Q the exact optimum of E[Q] - beta KL(pi || g), g the base.

    Args:
        base: a reference, or None: nothing is added, and max-confidence is followed where the policy does not read.
        candidates: only the k most confident positions may be chosen (UPO's top-k realisation); None: all.
        beta: 0: the scores are not values.
    """

    actions = "single"

    def __init__(self, base: Reference | None, candidates: int | None, beta: float = 0.0, **scores: Any) -> None:
        super().__init__(**scores)
        self.base, self.candidates, self.beta = base, candidates, beta
        if beta > 0:
            self.register_buffer("value_range", torch.tensor([0.0, 1.0]))

    def allowed(self, seen: Observation) -> Tensor:
        """(N, L) bool."""
        return seen.fillable if self.candidates is None else TopK(self.candidates)(seen).log_probs > -torch.inf

    def unread(self, seen: Observation) -> Categorical:
        """What is played on boards that are not read: the base."""
        base = (MaxConfidence() if self.base is None else self.base)(seen)
        if self.candidates is None:
            return base
        allowed = self.allowed(seen)
        return Categorical.of(base.log_probs.masked_fill(~allowed, 0.0), allowed)

    def log_odds(self, seen: Observation, belief: Tensor, states: Tensor) -> Tensor:
        """(N, L) scores without the base; with a ``beta`` the log-odds of values in their range."""
        scores = self.scores(seen, belief)
        return scores if self.state_head is None else scores + self.state_head(states)[..., 0]

    def values(self, seen: Observation, belief: Tensor, states: Tensor) -> Tensor:
        """(N, L) Q(s, a), in units of reward; where their range begins below 0, differences from a state's mean."""
        return torch.lerp(*self.value_range, self.log_odds(seen, belief, states).sigmoid())

    def over_base(self, seen: Observation, scores: Tensor, allowed: Tensor) -> Categorical:
        """g(a | s) exp(scores), normalised over ``allowed`` (N, L) bool."""
        if self.base is not None:
            scores = scores + self.base(seen).log_probs.masked_fill(~seen.fillable, 0.0)
        return Categorical.of(scores, allowed)

    def forward(self, seen: Observation, belief: Tensor, states: Tensor) -> Categorical:
        scores = self.values(seen, belief, states) / self.beta if self.beta > 0 else self.log_odds(seen, belief, states)
        return self.over_base(seen, scores, self.allowed(seen))


class SetHead(Head):
    """Several positions: the same scores as log-odds that a position is filled, plus a weight times the denoiser's own
    log-odds of its top symbol. Positions that may be masked again have a linear function of the states, less a weight
    times the log-odds that the belief gives to the symbol on the board.

    Args:
        base: :class:`SoftThreshold`, or None: even odds before anything is learned.
        stops: draw without replacement up to a learned stop (Plackett-Luce), instead of each entry for itself.
    """

    actions = "set"

    def __init__(
        self, base: SoftThreshold | None, stops: bool, dim: int, vocab_size: int, belief_weight: float
    ) -> None:
        super().__init__(dim, vocab_size, belief_weight, state_outputs=2)  # fill it; mask it again
        self.base, self.stops = base, stops
        self.stop_head = zeroed(nn.Linear(dim, 1))
        self.denoiser_weight = nn.Parameter(torch.tensor(float(belief_weight)))
        self.remask_belief_weight = nn.Parameter(torch.zeros(()))
        self.refill_penalty = nn.Parameter(torch.tensor(REFILL_PENALTY * float(belief_weight)))

    def log_odds(self, seen: Observation, belief: Tensor, states: Tensor) -> Tensor:
        """(N, A) log-odds that each entry is in the set, of those of the stop; meaningless outside the action mask."""
        fill, remask = self.state_head(states).unbind(-1)
        log_p = seen.denoised.best_log_prob.clamp(max=-1e-6)
        fill = fill + self.scores(seen, belief) + self.denoiser_weight * (log_p - log_complement(log_p))
        if self.base is not None:
            base = log_odds(self.base(seen).entry_log_probs())[:, : fill.shape[1]]
            fill = fill + base.masked_fill(~seen.fillable, 0.0)
        if self.stops:
            fill = fill - self.stop_head(states.mean(1))
        if seen.remaskable is None:
            return fill
        # Without a memory the symbol that was masked again would be filled again, and round in circles.
        fill = fill - self.refill_penalty * remask_count(seen)
        # A new policy masks again as its base does, or one position in a hundred.
        rare = SoftThreshold().remask if self.base is None else self.base.remask
        on_board = belief_log_odds(seen, belief, seen.tokens.clamp(max=seen.denoised.vocab_size - 1))
        remask = remask + math.log(rare / (1 - rare)) - self.remask_belief_weight * on_board
        return torch.cat([fill, remask], 1)


def set_distribution(seen: Observation, odds: Tensor, thresholds: Thresholds, stops: bool = False) -> Distribution:
    """The distribution over sets of log-odds (N, A), whose mode is what ``thresholds`` say."""
    left = None if seen.history is None or seen.remaskable is None else seen.history.remasks_left
    chosen = partial(most_likely_set, seen, odds, thresholds)
    if stops:
        return PlackettLuce(odds, seen.action_mask, left, chosen)
    return Bernoulli(logsigmoid(odds).masked_fill(~seen.action_mask, -torch.inf), seen.action_mask, left, chosen)


# ---------------------------------------------------------------------- the policy
class LearnedPolicy(nn.Module, Policy):
    """Base of the policies that are networks, whose mode decoding thresholds say.

    ``trained`` says how: ``imitation`` (of answers), ``rewards``, both, or nothing.
    """

    kind = "order policy"
    trained: str = ""

    def mark_trained(self, how: str) -> None:
        """It learned from ``how``, beside what it had learned from before; saved with the policy."""
        self.trained = how if self.trained in ("", how) else "imitation, rewards"
        self._hub_mixin_config["trained"] = self.trained

    def decide(self, seen: Observation, thresholds: Thresholds) -> Distribution:
        """The policy's answer, whose mode is what ``thresholds`` say."""
        raise NotImplementedError

    def forward(self, seen: Observation) -> Distribution:
        return self.decide(seen, Thresholds())

    def at(
        self,
        threshold: float = 0.5,
        remask_threshold: float = 0.5,
        read: Read = "always",
        defer_above: float | None = None,
    ) -> Policy:
        """This policy with another way of decoding; see :class:`agents.decoding.Thresholds`."""
        check("threshold", threshold, InnerShare)
        check("remask_threshold", remask_threshold, InnerShare)
        return Decoded(self, Thresholds(threshold, remask_threshold, read, defer_above))


class Decoded(Policy):
    """A learned policy at its own decoding thresholds."""

    def __init__(self, policy: LearnedPolicy, thresholds: Thresholds) -> None:
        self.policy, self.thresholds = policy, thresholds
        self.actions, self.reads_hidden, self.trained = policy.actions, policy.reads_hidden, policy.trained

    def __call__(self, seen: Observation) -> Distribution:
        return self.policy.decide(seen, self.thresholds)


class OrderPolicy(LearnedPolicy, HubModel, tags=[*TAGS]):
    """A policy that reads the board, and the denoiser's distributions in place of the masks, forms a belief q_i over
    symbols of its own, and chooses where that belief agrees with what the denoiser would fill in.

    It chooses positions only: what is filled in is the frozen denoiser's. A new policy has ``belief_weight`` and the
    linear heads at 0, so it *is* its base: KL(pi || base reference) = 0. Of single positions it reads only boards where
    no fillable position's confidence reaches ``defer_above``; elsewhere it follows its base, as there is nothing to
    decide. With more than 128 symbols it reads the 16 that are shown: by name if it has copied a denoiser's table, else
    by rank.

    Args:
        vocab_size: V of the denoiser. coordinates: (L, C) as nested lists.
        base: reference whose log-probabilities (at ``base_tau``) are the starting point; ``none`` is max-confidence
            where it defers, and uniform (of sets: even odds) elsewhere; ``learned`` is the denoiser's own order.
        candidates: if given, only the k most confident positions may be chosen.
        distribution: ``categorical`` for single positions; the others are over sets.
        hidden_dim: channels of the denoiser's hidden states to read; 0: none.
        rotary: attention sees distances. by_rank: read symbols by rank, not by name.
        belief_weight: at the start. beta: above 0, the scores are values (:class:`PositionHead`).
        trained: how it was: ``imitation`` (of answers), ``rewards`` or both. settings: the other fields of
            :class:`PolicyConfig`.
    """

    def __init__(
        self,
        vocab_size: int,
        coordinates: Sequence[Sequence[int]],
        base: Base = "none",
        base_tau: float = 0.05,
        candidates: int | None = None,
        distribution: DistributionName = "categorical",
        hidden_dim: int = 0,
        rotary: bool = False,
        by_rank: bool = False,
        belief_weight: float = 0.0,
        beta: float = 0.0,
        trained: str = "",
        **settings: Any,
    ) -> None:
        super().__init__()
        self.trained = trained
        self.config = PolicyConfig(distribution=distribution, **settings)
        validate(self.config)
        self.vocab_size, self.length, self.by_rank = vocab_size, len(coordinates), by_rank
        dim, layers = self.config.dim, self.config.layers or 3
        sizes = (dim, layers, self.config.heads, self.config.num_passes, hidden_dim, rotary)
        self.reader = Reader(SHOWN if by_rank else vocab_size, coordinates, *sizes)
        scores = {"dim": dim, "vocab_size": vocab_size, "belief_weight": belief_weight}
        self.head: Head
        if distribution == "categorical":
            options = {"tau": base_tau} if base.startswith("softmax") else {}
            start = None if base == "none" else reference(base, **options)
            self.head = PositionHead(start, candidates, beta, state_outputs=int(self.config.state_head), **scores)
        else:
            start = SoftThreshold() if base == "soft_threshold" else None
            self.head = SetHead(start, distribution == "plackett_luce", **scores)
            self.remaskable_embedding = nn.Parameter(torch.zeros(dim))  # marks what play filled in, and may mask again
            self.remask_count_embedding = nn.Parameter(torch.zeros(dim))  # marks, as often, what was masked again

    @property
    def actions(self) -> str:
        return self.head.actions

    @property
    def reads_hidden(self) -> bool:
        return self.reader.hidden is not None

    @property
    def num_passes(self) -> int:
        return self.config.num_passes

    @property
    def masks_again(self) -> bool:
        """Whether it was trained to mask positions again."""
        return self.actions != "single" and bool(self.remaskable_embedding.any())

    @property
    def values_are_zero(self) -> bool:
        """Whether it has values and all were shrunk to 0: it plays its base and, where it has one, reads nothing."""
        ends = getattr(self.head, "value_range", None)
        return ends is not None and not bool(ends.any())

    def read(self, seen: Observation) -> tuple[list[Tensor], Tensor]:
        """Per pass the belief (N, L, K) as log-probabilities, the last one its view of the board, and the states
        (N, L, D) after the last pass."""
        masked, symbols = seen.masked, None
        belief = seen.denoised.log_probs
        if belief is None:
            belief, symbols = seen.top_log_probs, None if self.by_rank else seen.top_symbols
        tokens = seen.tokens if self.config.read_tokens and not self.by_rank else None
        known = self.reader.embed(tokens, masked, seen.hidden if self.reads_hidden else None)
        if seen.remaskable is not None:
            known = known + self.remaskable_embedding * seen.remaskable.unsqueeze(-1)
            known = known + self.remask_count_embedding * remask_count(seen).unsqueeze(-1)
        return self.reader(known, belief.exp() * self.config.read_denoiser, masked, symbols, seen.remaskable)

    def decide(self, seen: Observation, thresholds: Thresholds) -> Distribution:
        """Of single positions it reads the uncertain boards only, of sets those that ``thresholds`` say."""
        rows = self._to_read(seen, thresholds).nonzero().squeeze(1)
        if isinstance(self.head, PositionHead):
            decided: Distribution = self._decide_positions(seen, rows)
        else:
            odds = self._some_log_odds(seen, rows, thresholds)
            decided = set_distribution(seen, odds, thresholds, self.head.stops)
        decided.passes = torch.zeros_like(seen.tokens[:, 0]).index_fill(0, rows, self.num_passes)
        return decided

    def _to_read(self, seen: Observation, thresholds: Thresholds) -> Tensor:
        """(N,) bool."""
        if self.actions == "single":
            nothing_to_add = self.values_are_zero and self.head.base is not None
            return self.uncertain(seen) & (not nothing_to_add)
        if thresholds.read == "always":
            return torch.ones_like(seen.masked[:, 0])
        if seen.remaskable is not None:
            raise UnmaskError(f"a policy that masks positions again reads always, not {thresholds.read!r}")
        uncertain = self.uncertain(seen, thresholds.defer_above)
        first = thresholds.read == "first" and seen.history is not None
        return uncertain | (seen.history.steps == 0) if first else uncertain

    def _decide_positions(self, seen: Observation, rows: Tensor) -> Categorical:
        unread = self.head.unread(seen)
        if not len(rows):
            return unread
        decided = self._head_at(seen if len(rows) == len(seen.tokens) else seen[rows])
        return Categorical(unread.log_probs.index_put((rows,), decided.log_probs))

    def _head_at(self, seen: Observation) -> Categorical:
        beliefs, states = self.read(seen)
        return self.head(seen, beliefs[-1], states)

    def _some_log_odds(self, seen: Observation, rows: Tensor, thresholds: Thresholds) -> Tensor:
        """(N, A) log-odds, of the rows that are not read those of filling what is certain."""
        if thresholds.read == "always":
            return self.log_odds(seen)
        certain = self._certain(seen, thresholds.defer_above)
        odds = torch.where(certain, CERTAIN_LOG_ODDS, -CERTAIN_LOG_ODDS)
        if not len(rows):
            return odds
        return odds.index_put((rows,), torch.where(certain[rows], CERTAIN_LOG_ODDS, self.log_odds(seen[rows])))

    def uncertain(self, seen: Observation, defer_above: float | None = None) -> Tensor:
        """(N,) bool: boards in play where no fillable position's confidence reaches ``defer_above``."""
        return ~self._certain(seen, defer_above).any(1) & seen.fillable.any(1)

    def _certain(self, seen: Observation, defer_above: float | None) -> Tensor:
        """(N, L) bool."""
        return seen.certain(self.config.defer_above if defer_above is None else defer_above)

    def log_odds(self, seen: Observation) -> Tensor:
        """(N, A) log-odds that each entry is in the set; of policies over sets."""
        beliefs, states = self.read(seen)
        return self.head.log_odds(seen, beliefs[-1], states)


# ---------------------------------------------------------------------- made and loaded
def new_policy(
    config: PolicyConfig,
    task: Task,
    denoiser: Denoiser,
    seed: int,
    base: Base = "none",
    base_tau: float = 0.05,
    candidates: int | None = None,
    belief_weight: float = 0.0,
    sets: bool = False,
    beta: float = 0.0,
) -> OrderPolicy:
    """A policy for ``task`` and ``denoiser``, over ``sets`` or not; ``seed`` draws what is not copied.

    Raises:
        UnmaskError: more layers than the denoiser has to copy, or sizes that do not fit.
    """
    validate(config)
    model = getattr(denoiser, "model", None)
    backbone = model if config.copy and isinstance(model, Backbone) else None
    blocks = 3 if backbone is None else len(backbone.blocks)
    sizes = vars(config) | {"layers": blocks if config.layers is None else config.layers}
    if backbone is None:
        if config.dim % config.heads:
            raise UnmaskError(f"dim must be a multiple of heads; {config.dim} is not one of {config.heads}")
        rotary = task.is_line and config.dim % (2 * config.heads) == 0
    else:
        if sizes["layers"] > blocks:
            raise UnmaskError(
                f"the denoiser has {blocks} blocks to copy, not {config.layers}; use fewer layers or --no-copy"
            )
        sizes |= {"dim": backbone.dim, "heads": backbone.blocks[0].heads}
        rotary = backbone.rotary
    sizes["distribution"] = config.distribution if sets else "categorical"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = OrderPolicy(
            task.vocab_size,
            task.coordinates.tolist(),
            base,
            base_tau,
            candidates,
            hidden_dim=(denoiser.hidden_dim or 0) if config.read_hidden else 0,
            rotary=rotary,
            by_rank=task.vocab_size > WHOLE and backbone is None,
            belief_weight=belief_weight,
            beta=beta,
            **sizes,
        )
    if backbone is not None:
        policy.reader.copy_from(backbone)
    return policy


def load_policy(name: str | Path, task: Task | None = None, denoiser: Denoiser | None = None) -> OrderPolicy:
    """An order policy by packaged name, folder or hub id; one that masks positions again is a :class:`RemaskPolicy`.

    Raises:
        CheckpointError, UnknownNameError: in one line; also if the policy is for another vocabulary or length, or
            reads hidden states that ``denoiser`` does not give.
    """
    from agents.remask_policy import RemaskPolicy

    policy = load_model((RemaskPolicy, OrderPolicy), name, PACKAGED_POLICIES, "order policy")
    if task is not None and (policy.vocab_size, policy.length) != (task.vocab_size, task.length):
        raise CheckpointError(
            f"order policy {name} is for {policy.vocab_size} symbols and {policy.length} positions; "
            f"task {task.name} has {task.vocab_size} and {task.length}"
        )
    if denoiser is not None and policy.reads_hidden and policy.reader.hidden.in_features != denoiser.hidden_dim:
        raise CheckpointError(
            f"order policy {name} reads {policy.reader.hidden.in_features} hidden channels of its own denoiser; "
            f"this denoiser has {denoiser.hidden_dim or 0}"
        )
    return policy
