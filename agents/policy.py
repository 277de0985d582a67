"""The order policy: a small transformer over per-position features of the board and of the denoiser's output.

Shapes: N boards, L positions, V symbols, C coordinates, D channels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from pretrain.backbone import Backbone, Block, CoordinateEmbedding, init_weights, rotations
from pretrain.checkpoint import CheckpointError, load_model
from pretrain.run import require_at_least
from tasks import Task, UnmaskError
from unmask_env import parallel, reference, set_laws
from unmask_env.core import Actions, Observation, choose, masked_log_softmax
from unmask_env.denoiser import Denoiser

PACKAGED_POLICIES = Path(__file__).parent / "models"
TOP = 8  # most likely symbols that a policy sees per position, as in UPO's released head
WARY = 2.0  # times the gate: how far a new policy's log-odds of closing fall each time a position was opened again
ONCE = 5.0  # how far a doubter's log-odds of opening a position again fall each time that it was
RECALL = 3  # times; more are as many

Base = Literal["none", "softmax_confidence", "softmax_margin", "learned", "soft_threshold"]
Sets = Literal["none", "bernoulli", "plackett_luce"]


@dataclass(frozen=True)
class PolicyShape:
    """What a new policy looks like and sees; each is an option of ``unmask train``."""

    copy: bool = True
    """start from a copy of the denoiser's embeddings, last blocks and head, where it has them (dim and heads are then
    its own)"""
    layers: int | None = None
    """the default is all that there are to copy, or 3 where there is nothing to copy; without its first blocks a copy
    has to learn to read anew"""
    dim: int = 48
    """on a line of positions attention sees distances where this is a multiple of 2 heads"""
    heads: int = 4
    readings: int = 2
    """how often the policy reads the board, each time with its last belief in place of the masks; weights are shared"""
    sure: float = 0.97
    """where an open position's confidence reaches this, the policy follows its base without reading; above 1: never"""
    tokens: bool = True
    """see the symbols on the board"""
    top_tokens: bool = True
    """read with the denoiser's distributions in place of the masks (the score knows its top symbol in any case)"""
    hidden: bool = False
    """see the denoiser's last hidden states, where it has them"""
    places: bool = False
    """score a position also by a linear function of the policy's own states, which know where it stands: for tasks
    whose places differ, as in text"""
    law: Literal["bernoulli", "plackett_luce"] = "bernoulli"
    """of policies over sets: positions are closed each for itself, or drawn without replacement up to a learned stop"""


def features(observation: Observation, k: int) -> Tensor:
    """(N, L, 2 k + 4): top k probabilities, their logs / 8, entropy, margin, open flag, fraction left open."""
    top = observation.denoised.log_probs.topk(k, -1).values.clamp(min=-16.0)  # (N, L, k)
    entropy, margin = reference.entropy(observation), reference.margin(observation)
    is_open = observation.open.float()
    left = is_open.mean(1, keepdim=True).expand_as(is_open)
    return torch.cat([top.exp(), top / 8, torch.stack([entropy, margin, is_open, left], -1)], -1)


class OrderPolicy(nn.Module, PyTorchModelHubMixin):
    """pi(i | observation) over the open positions.

    Where the denoiser is sure of some position, the policy is its base reference: there is nothing to decide. Where it
    is not, the policy reads the board again, with the denoiser's distributions in place of the masks, and forms a
    belief q_i over symbols of its own. A position then scores by the base's log-probability, plus the log-odds of q_i
    in the symbol that the denoiser would fill in there, plus a linear function of the position's numbers; pi is the
    softmax of the scores. The policy chooses positions only: what is filled in is the frozen denoiser's.

    A new policy has ``gate`` and the linear part at 0, so it *is* its base: KL(pi || base reference) = 0.

    A policy over sets turns the same scores into the log-odds that an entry is in the set, adds the denoiser's log-odds
    of its top symbol and a linear function of its own states, which see the positions together, and always reads the
    board. Where positions may be opened again, a learned mark tells them from what an instance gave; their log-odds are
    such a function, less the log-odds that its belief gives the symbol on the board, by a weight that begins at 0.

    Args:
        vocab_size: V of the denoiser. coordinates: (L, C) as nested lists.
        base: reference whose log-probabilities (at ``base_tau``) are the starting point; ``none`` is the most confident
            position where the denoiser is sure, and uniform elsewhere; ``learned`` is the denoiser's own order.
        candidates: if given, only the k most confident open positions may be chosen (UPO's top-k realisation).
        tokens: see the symbols on the board. top_tokens: see which symbols the denoiser thinks of.
        hidden_dim: channels of the denoiser's hidden states to see; 0 to leave them out.
        dim, layers, heads: size. readings: how often the board is read, with shared weights.
        sure: the confidence from which on no reading is needed; above 1 the board is always read.
        gate: initial weight of the log-odds.
        rotary: attention sees how far apart positions are, as the denoiser's does or a line of text needs.
        places: the score has a linear function of the states, too, which policies over sets have in any case.
        sets: ``none`` for one position at a time, else the law of its sets (:mod:`unmask_env.set_laws`); ``base`` is
            then ``soft_threshold``, or ``none``: even odds before anything is learned.
        doubts: it has a ``doubter``.

    Attributes:
        threshold: how likely an entry must be in a set to be in the most likely one, which is played without a
            generator: the knob between few forwards and sure ones.
        reopening: the same of entries that open positions again: where one passes it, all that pass half of it open
            with it, since much follows from a wrong guess; and of what is open the likeliest position alone is closed.
        doubter: a policy of its own, of the same shape, that says what to open again and reads twice as often; closing
            is then as if nothing could be, so that learning the one never unlearns the other. Each time that a position
            was opened again counts against closing it and against opening it once more. None: one network for both.
    """

    threshold = 0.5
    reopening = 0.5

    def __init__(
        self,
        vocab_size: int,
        coordinates: Sequence[Sequence[int]],
        base: Base = "none",
        base_tau: float = 0.05,
        candidates: int | None = None,
        tokens: bool = True,
        top_tokens: bool = True,
        hidden_dim: int = 0,
        dim: int = 48,
        layers: int = 3,
        heads: int = 4,
        readings: int = 2,
        sure: float = 0.97,
        gate: float = 0.0,
        rotary: bool = False,
        sets: Sets = "none",
        places: bool = False,
        doubts: bool = False,
    ) -> None:
        super().__init__()
        self.vocab_size, self.length, self.rotary, self.sets = vocab_size, len(coordinates), rotary, sets
        self.top = min(TOP, vocab_size)
        self.readings, self.sure = readings, sure
        self.candidates, self.see_tokens, self.see_top_tokens = candidates, tokens, top_tokens
        options = {"tau": base_tau} if base.startswith("softmax") else {}
        self.base = None if base in ("none", "soft_threshold") else reference.get(base, **options)
        self.set_base = parallel.SoftThreshold() if base == "soft_threshold" else None
        self.symbols = nn.Embedding(vocab_size, dim)
        self.positions = CoordinateEmbedding(torch.tensor(coordinates), dim)
        self.hidden = nn.Linear(hidden_dim, dim, bias=False) if hidden_dim else None
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size)
        self.gate = nn.Parameter(torch.tensor(float(gate)))
        self.numbers = nn.Linear(2 * self.top + 4, 1, bias=False)
        init_weights(self, layers)
        nn.init.zeros_(self.numbers.weight)
        if places or sets != "none":
            self.together = nn.Linear(dim, 1 if sets == "none" else 2)  # close it; open it again
            nn.init.zeros_(self.together.weight)
            nn.init.zeros_(self.together.bias)
        else:
            self.together = None
        if sets != "none":
            self.stop = nn.Linear(dim, 1)
            self.trust = nn.Parameter(torch.tensor(float(gate)))  # weight of the denoiser's own log-odds
            self.doubt = nn.Parameter(torch.zeros(dim))  # marks what play filled in, and may open again
            self.regret = nn.Parameter(torch.zeros(()))  # weight of its own belief against those
            self.recall = nn.Parameter(torch.zeros(dim))  # marks, as often, what was opened again
            self.wary = nn.Parameter(torch.tensor(WARY * float(gate)))  # weight of each time against closing it
            nn.init.zeros_(self.stop.weight)
            nn.init.zeros_(self.stop.bias)
        self.doubter: OrderPolicy | None = None
        if doubts:
            self.begin_doubting()

    def begin_doubting(self) -> None:
        """Give it a ``doubter``, which starts as its own copy, if it has none."""
        if self.doubter is not None:
            return
        self.doubter = copy.deepcopy(self)
        self.doubter.readings = 2 * self.readings
        with torch.no_grad():
            self.wary.fill_(WARY)  # also of a policy that began with a gate of 0
        self._hub_mixin_config["doubts"] = True  # so that it is saved with it

    @torch.no_grad()
    def copy_from(self, backbone: Backbone) -> None:
        """Start from the denoiser's embeddings, last blocks, norm and head (UPO copies LLaDA's last block likewise)."""
        for own, theirs in zip(self.blocks, backbone.blocks[-len(self.blocks) :], strict=True):
            own.load_state_dict(theirs.state_dict())
        for name in ("positions", "norm", "head"):
            getattr(self, name).load_state_dict(getattr(backbone, name).state_dict())
        self.symbols.weight.copy_(backbone.symbols.weight[:-1])
        if self.hidden is not None:
            self.hidden.weight.mul_(0.1)

    def beliefs(self, observation: Observation) -> list[Tensor]:
        """Per reading (N, L, V) log-probabilities: the policy's own view of the board, the last one its belief."""
        return self.read(observation)[0]

    def read(self, observation: Observation) -> tuple[list[Tensor], Tensor]:
        """:meth:`beliefs`, and the states (N, L, D) after the last reading."""
        is_open = (observation.tokens == self.vocab_size).unsqueeze(-1)  # undecided, whether or not it may be chosen
        fixed = self.positions()  # (L, D)
        if self.see_tokens:
            fixed = fixed + self.symbols(observation.tokens.clamp(max=self.vocab_size - 1)) * ~is_open
        if self.hidden is not None:
            fixed = fixed + self.hidden(observation.denoised.hidden)
        fixed = fixed.expand(*observation.tokens.shape, -1)  # (N, L, D)
        again = None if observation.reopenable is None else observation.reopenable.unsqueeze(-1)
        if again is not None:
            fixed = fixed + self.doubt * again + self.recall * recalled(observation).unsqueeze(-1)
        thought = observation.denoised.log_probs.exp() * self.see_top_tokens
        beliefs = []
        rotation = (
            rotations(self.length, fixed.shape[-1] // self.blocks[0].heads, fixed.device) if self.rotary else None
        )
        for _ in range(self.readings):
            x = fixed + (thought @ self.symbols.weight) * is_open
            for block in self.blocks:
                x = block(x, rotation=rotation)
            x = self.norm(x)
            beliefs.append(self.head(x).log_softmax(-1))
            thought = beliefs[-1].exp()
            is_open = is_open if again is None else is_open | again  # a masked denoiser says nothing of these
        return beliefs, x

    def score(self, observation: Observation, belief: Tensor) -> Tensor:
        """(N, L) own scores given the (N, L, V) belief, meaningful on open positions; the base is not added."""
        log_odds = self.belief_odds(observation.denoised.log_probs.argmax(-1), belief)
        return self.gate * log_odds + self.numbers(features(observation, self.top)).squeeze(-1)

    def belief_odds(self, tokens: Tensor, belief: Tensor) -> Tensor:
        """(N, L) log-odds of ``tokens`` in ``belief`` (N, L, V), of the last symbol where there is a mask."""
        log_q = belief.gather(-1, tokens.clamp(max=self.vocab_size - 1).unsqueeze(-1)).squeeze(-1).clamp(max=-1e-6)
        return log_q - torch.log(-torch.expm1(log_q))

    def allowed(self, observation: Observation) -> Tensor:
        """(N, L) bool: the open positions, or the most confident of them."""
        if self.candidates is None:
            return observation.open
        return reference.TopK(self.candidates).log_prob(observation) > -torch.inf

    def unsure(self, observation: Observation) -> Tensor:
        """(N,) bool: boards where no open position's confidence reaches ``sure``."""
        return reference.confidence(observation).masked_fill(~observation.open, 0.0).max(1).values < self.sure

    def read_log_prob(self, observation: Observation, belief: Tensor, states: Tensor | None = None) -> Tensor:
        """(N, L) log-probabilities after a reading that gave ``belief`` (N, L, V) and, for ``places``, ``states``
        (N, L, D), whether or not the denoiser is sure."""
        scores = self.score(observation, belief)
        if self.together is not None and states is not None:
            scores = scores + self.together(states)[..., 0]
        if self.base is not None:
            scores = scores + self.base.log_prob(observation).masked_fill(~observation.open, 0.0)
        return masked_log_softmax(scores, self.allowed(observation))

    def log_prob(self, observation: Observation) -> Tensor:
        """(N, L) log-probabilities; -inf on positions that may not be chosen."""
        unsure = self.unsure(observation) & observation.open.any(1)
        followed = reference.MaxConfidence() if self.base is None else self.base
        log_prob = followed.log_prob(observation)
        if self.candidates is not None:
            allowed = self.allowed(observation)
            log_prob = masked_log_softmax(log_prob.masked_fill(~allowed, 0.0), allowed)
        if bool(unsure.any()):
            rows = unsure.nonzero().squeeze(1)
            hard = observation[rows]
            beliefs, states = self.read(hard)
            log_prob = log_prob.index_put((rows,), self.read_log_prob(hard, beliefs[-1], states))
        return log_prob

    # ------------------------------------------------------------------ over sets
    def log_odds(self, observation: Observation) -> Tensor:
        """(N, A) log-odds that each entry is in the set; meaningless outside ``observation.choices``."""
        if self.doubter is not None and observation.reopenable is not None:
            close = self.log_odds(replace(observation, reopenable=None, reopened=None))
            reopen = self.doubter.log_odds(observation)[:, self.length :]
            times = recalled(observation)
            return torch.cat([close - self.wary * times, reopen - ONCE * times], 1)
        beliefs, states = self.read(observation)
        return self.read_log_odds(observation, beliefs[-1], states)

    def read_log_odds(self, observation: Observation, belief: Tensor, states: Tensor) -> Tensor:
        """:meth:`log_odds` after a reading that gave ``belief`` (N, L, V) and ``states`` (N, L, D)."""
        close, reopen = self.together(states).unbind(-1)
        log_p = observation.denoised.log_probs.max(-1).values.clamp(max=-1e-6)
        close = close + self.score(observation, belief) + self.trust * (log_p - set_laws.log_complement(log_p))
        if self.set_base is not None:
            odds = set_laws.inclusion_to_log_odds(self.set_base.log_inclusion(observation))
            close = close + odds[:, : self.length].masked_fill(~observation.open, 0.0)
        if self.sets == "plackett_luce":
            close = close - self.stop(states.mean(1))
        if observation.reopenable is None:
            return close
        # Without a memory the symbol that was opened again would be closed again, and round in circles.
        close = close - self.wary * recalled(observation)
        # A new policy opens again as its base does, or one position in a hundred.
        rare = parallel.SoftThreshold().reopen if self.set_base is None else self.set_base.reopen
        reopen = reopen + math.log(rare / (1 - rare)) - self.regret * self.belief_odds(observation.tokens, belief)
        return torch.cat([close, reopen], 1)

    def log_inclusion(self, observation: Observation) -> Tensor:
        """(N, A) log-probabilities that each entry is in the set."""
        return set_laws.log_odds_to_inclusion(self.log_odds(observation), observation.choices)

    def log_prob_of(self, observation: Observation, action: Tensor) -> Tensor:
        """(N,) log-probabilities of positions (N,), or of sets (N, A)."""
        if self.sets == "none":
            return self.log_prob(observation).gather(1, action.unsqueeze(1)).squeeze(1)
        if self.sets == "plackett_luce":
            return set_laws.stopping_log_prob(self.log_odds(observation), observation.choices, action)
        return set_laws.independent_log_prob(self.log_inclusion(observation), observation.choices, action)

    def sample(self, observation: Observation, generator: torch.Generator | None) -> Tensor:
        """(N,) positions or (N, A) sets drawn from the policy; without a generator the most likely choice.

        The most likely set closes what is above ``threshold``, and the likeliest position in any case. Where something
        is above ``reopening``, it opens again what is above half of that (the likeliest that a budget leaves, in a
        rollout) and closes the likeliest position alone.
        """
        if self.sets == "none":
            return choose(self.log_prob(observation), generator)
        odds, choices = self.log_odds(observation), observation.choices
        if generator is None:
            close, reopen = odds[:, : self.length], odds[:, self.length :]
            best = parallel.ranked(close, observation.open) == 0
            likely = (close > math.log(self.threshold / (1 - self.threshold))) & observation.open
            if observation.reopenable is None:
                return likely | best
            wrong = reopen.sigmoid().masked_fill(~observation.reopenable, 0.0)
            again = (wrong > self.reopening / 2) & (wrong > self.reopening).any(1, keepdim=True)
            again = parallel.within_budget(again, wrong, observation)
            return torch.cat([best | likely & ~again.any(1, keepdim=True), again], 1)
        if self.sets == "plackett_luce":
            return set_laws.stopping_sample(odds, choices, generator)
        return set_laws.independent_sample(set_laws.log_odds_to_inclusion(odds, choices), choices, generator)


def recalled(observation: Observation) -> Tensor:
    """(N, L) how often each position was opened again, up to ``RECALL``: what policies and critics remember."""
    return observation.reopened.clamp(max=RECALL)


def new_policy(
    shape: PolicyShape,
    task: Task,
    denoiser: Denoiser,
    seed: int,
    base: Base = "none",
    base_tau: float = 0.05,
    candidates: int | None = None,
    gate: float = 0.0,
    sets: bool = False,
) -> OrderPolicy:
    """A policy for ``task`` and ``denoiser``, over ``sets`` or not; ``seed`` draws what is not copied.

    Raises:
        UnmaskError: more layers than the denoiser has to copy, or sizes that do not fit.
    """
    model = getattr(denoiser, "model", None)
    backbone = model if shape.copy and isinstance(model, Backbone) else None
    to_copy = 3 if backbone is None else len(backbone.blocks)
    layers = to_copy if shape.layers is None else shape.layers
    require_at_least(1, layers=layers, dim=shape.dim, heads=shape.heads, readings=shape.readings)
    if backbone is not None and layers > to_copy:
        raise UnmaskError(f"the denoiser has {to_copy} blocks to copy, not {layers}; use fewer layers or --no-copy")
    if backbone is None and shape.dim % shape.heads:
        raise UnmaskError(f"dim must be a multiple of heads; {shape.dim} is not one of {shape.heads}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = OrderPolicy(
            task.vocab_size,
            task.coordinates.tolist(),
            base=base,
            base_tau=base_tau,
            candidates=candidates,
            tokens=shape.tokens,
            top_tokens=shape.top_tokens,
            hidden_dim=(denoiser.hidden_dim or 0) if shape.hidden else 0,
            dim=shape.dim if backbone is None else backbone.dim,
            layers=layers,
            heads=shape.heads if backbone is None else backbone.blocks[0].heads,
            readings=shape.readings,
            sure=shape.sure,
            gate=gate,
            rotary=task.is_line and shape.dim % (2 * shape.heads) == 0 if backbone is None else backbone.rotary,
            sets=shape.law if sets else "none",
            places=shape.places,
        )
    if backbone is not None:
        policy.copy_from(backbone)
    return policy


def load_policy(
    name: str | Path, task: Task | None = None, denoiser: Denoiser | None = None, actions: Actions = "single"
) -> OrderPolicy:
    """An order policy by packaged name, folder or hub id.

    Raises:
        CheckpointError, UnknownNameError: in one line; also if the policy is for another vocabulary or length,
            chooses other ``actions``, or sees hidden states that ``denoiser`` does not give.
    """
    policy = load_model(OrderPolicy, name, PACKAGED_POLICIES, "order policy")
    if (policy.sets == "none") != (actions == "single"):
        chooses = "single positions" if policy.sets == "none" else "sets"
        raise CheckpointError(f"order policy {name} chooses {chooses}; it cannot play with actions {actions!r}")
    if task is not None and (policy.vocab_size, policy.length) != (task.vocab_size, task.length):
        raise CheckpointError(
            f"order policy {name} is for {policy.vocab_size} symbols and {policy.length} positions; "
            f"task {task.name} has {task.vocab_size} and {task.length}"
        )
    if denoiser is not None and policy.hidden is not None and policy.hidden.in_features != denoiser.hidden_dim:
        raise CheckpointError(
            f"order policy {name} sees {policy.hidden.in_features} hidden channels of its own denoiser; "
            f"this denoiser has {denoiser.hidden_dim or 0}"
        )
    return policy
