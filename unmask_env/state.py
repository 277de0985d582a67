"""The data of the decision process: what an action may do, where play stands, and what everybody sees of it.

Shapes: N rows (independent boards), L positions, V symbols, K shown symbols, D hidden channels; an action has A = L
entries, or 2 L where positions may be masked again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tasks import Instances, UnmaskError
from tasks.settings import AtLeast0, AtLeast1, NotNegative, Positive, validate

Actions = Literal["single", "set", "set+remask", "accept"]
WHOLE = 128  # vocabularies up to this many symbols are shown whole: K = V
CHUNK = 2**22  # numbers of a (positions, V) tensor that are made at a time
SHOWN = 16  # the most likely symbols that are shown of larger ones
FLOOR = -20.0  # least log-probability of a shown symbol in the interfaces, so that spaces are bounded


class InvalidActionError(UnmaskError):
    """An action of the wrong shape or kind, or an illegal one where the environment was told to raise."""


class UnknownKeywordError(UnmaskError, TypeError):
    """A keyword that environments do not take, in Python's words, which libraries look for."""


# ---------------------------------------------------------------------- rules
@dataclass(frozen=True)
class Rules:
    """What an action may do, and when an episode is cut off.

    Attributes:
        actions: ``single``: one masked position per forward. ``set``: the positions to fill in one forward.
            ``set+remask``: those and, behind them, the filled positions to mask again; what an instance gives stays.
            **An empty set fills the most confident position**, so every forward makes progress.
            ``accept``: of a canvas that holds uniform noise, the positions that take the denoiser's symbols in this
            forward; all others are noise again, also those that were accepted before (:mod:`unmask_env.canvas`).
        on_illegal: an illegal action (a position that may not be chosen, or more remasking than the budget leaves)
            changes nothing and costs its forward (``noop``), ends the episode with reward 0 (``terminate``), or raises.
        nfe_budget: episodes are truncated after this many denoiser forwards; None: after 2 L.
        block_length: positions behind the task's prompt are filled block by block of this many (LLaDA's
            semi-autoregressive decoding, arXiv 2502.09992); within a block the order is free. None: one block, or with
            ``accept`` the denoiser's own canvas.
        remask_budget: how many positions an episode may mask again; None: any number.
        speed: exponent alpha of rewards r ((H - NFE + 1) / H)^alpha for H holes (Jazbec et al. 2025, arXiv 2512.09106);
            0 does not count forwards.
        speed_bonus: add alpha (H - NFE + 1) / H instead, whatever r is. It is known to end in one-step policies.
        canvas_steps: with ``accept``, the most forwards that a canvas takes. Its end is the denoiser's most likely
            symbols.
        stop_entropy, stop_stable: with ``accept``, a canvas ends earlier where the mean entropy of its positions is
            below ``stop_entropy`` nats and the most likely symbols were the same as in each of the ``stop_stable``
            forwards before. None: never earlier. The defaults are those of ``transformers``' DiffusionGemma.

    Raises:
        UnmaskError: a setting that is not allowed.
    """

    actions: Actions = "single"
    on_illegal: Literal["noop", "terminate", "raise"] = "noop"
    nfe_budget: AtLeast1 | None = None
    block_length: AtLeast1 | None = None
    remask_budget: AtLeast0 | None = None
    speed: NotNegative = 0.0
    speed_bonus: bool = False
    canvas_steps: AtLeast1 = 48
    stop_entropy: Positive | None = 0.005
    stop_stable: AtLeast0 = 1

    def __post_init__(self) -> None:
        validate(self)
        if self.remask_budget is not None and self.actions != "set+remask":
            raise UnmaskError(f"remask_budget is for actions 'set+remask', not {self.actions!r}")

    @classmethod
    def of(cls, options: dict[str, Any]) -> Rules:
        """Rules from keyword arguments. Raises :class:`UnknownKeywordError` naming one that is none of theirs."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(options.keys() - set(known)):
            raise UnknownKeywordError(
                f"an environment got an unexpected keyword argument {unknown[0]!r}; beside its own arguments it takes "
                f"{', '.join(known)}"
            )
        return cls(**options)

    def shaped(self, reward: Tensor, nfe: Tensor, holes: Tensor) -> Tensor:
        """(N,) rewards of complete rows with their forwards counted in; ``holes`` (N,) at the start."""
        left = ((holes - nfe + 1) / holes.clamp(min=1)).clamp(min=0.0)
        return reward + self.speed * left if self.speed_bonus else reward * left**self.speed

    def entries(self, length: int) -> int:
        """A, the number of entries of an action."""
        return 2 * length if self.actions == "set+remask" else length


SINGLE = Rules()
"""One position per forward, nothing else."""


class Rows:
    """Base of dataclasses whose tensors have a row for each board."""

    def __getitem__(self, rows: Tensor | slice) -> Self:
        return join_rows([self], lambda parts: parts[0][rows])

    @classmethod
    def join(cls, parts: Sequence[Self], how: Callable[[Sequence[Tensor]], Tensor]) -> Self:
        """One of several: ``how`` (for example ``torch.cat``) of each of their tensors."""
        return join_rows(parts, how)


# ---------------------------------------------------------------------- one denoiser forward
@dataclass(frozen=True)
class Denoised(Rows):
    """What one denoiser forward says: the K most likely symbols of every position, and the entropy.

    K = V for at most 128 symbols, else 16. Make it with :meth:`of`, which keeps no tensor with a larger vocabulary
    axis, or from shown parts with :meth:`shown`.

    Attributes:
        vocab_size: V.
        log_probs: (N, L, V) float32 in the order of the symbols, if all are shown; else None.
        hidden: (N, L, D), where the denoiser gives some.
        order_weights: (N, L), where it has learned an order: the larger, the sooner a position is filled.
        passes: (N,) int64, how many network passes each row took; None: one.
        drawn: (N, L) int64, a sample of every position's distribution, where it was asked for: of large vocabularies it
            is drawn among all symbols.
        carried: what the denoiser is given back with the next forward: a tensor by row, or a dataclass of such, or of
            tuples of them, which it alone reads. None of one that carries nothing.
    """

    vocab_size: int
    log_probs: Tensor | None = None
    hidden: Tensor | None = None
    order_weights: Tensor | None = None
    _symbols: Tensor | None = None  # (N, W, K) int32
    _values: Tensor | None = None  # (N, W, K)
    _entropy: Tensor | None = None
    passes: Tensor | None = None
    _places: Tensor | None = None  # (N, L) int32, where among W each position is kept, -1: nowhere; None: W = L
    drawn: Tensor | None = None
    carried: Any = None

    @classmethod
    def of(cls, log_probs: Tensor, hidden: Tensor | None = None, order_weights: Tensor | None = None) -> Denoised:
        """From the log-probabilities (N, L, V) of a whole forward."""
        vocab_size = ([0, *getattr(log_probs, "shape", ())])[-1]
        if vocab_size <= WHOLE or not isinstance(log_probs, Tensor):  # what is none is for check_denoised to name
            return cls(vocab_size, log_probs, hidden, order_weights)
        values, symbols = log_probs.topk(SHOWN, -1)
        probabilities = log_probs.exp()
        entropy = -torch.xlogy(probabilities, probabilities).sum(-1)
        return cls(vocab_size, None, hidden, order_weights, symbols.int(), values, entropy)

    @classmethod
    def at(
        cls,
        where: Tensor,
        vocab_size: int,
        log_probs_at: Callable[[Tensor, Tensor], Tensor],
        hidden: Tensor | None = None,
    ) -> Denoised:
        """Of a large vocabulary, made at the positions ``where`` (N, L) bool alone, a few at a time. Elsewhere nothing
        is known: the floor, entropy 0.

        Args:
            log_probs_at: rows (M,) and positions (M,) to their (M, V) float32 log-probabilities.
        """
        places = (where.cumsum(1) - 1).masked_fill(~where, -1).int()
        kept = (len(where), max(1, int(places.max()) + 1), SHOWN)
        symbols = torch.zeros(kept, dtype=torch.int32, device=where.device)
        values = torch.full(kept, FLOOR, device=where.device)
        entropy = torch.zeros(where.shape, device=where.device)
        for some in where.nonzero().split(max(1, CHUNK // vocab_size)):
            rows, positions = some.unbind(1)
            log_probs = log_probs_at(rows, positions)  # (M, V), of this size there is one more
            best, indices = log_probs.topk(SHOWN, -1)
            at = places[rows, positions].long()
            values[rows, at], symbols[rows, at] = best, indices.int()
            log_probs = log_probs.clamp_(min=-1e4)  # 0 log 0 = 0
            entropy[rows, positions] = -torch.linalg.vecdot(log_probs.exp(), log_probs)
        return cls(vocab_size, None, hidden, None, symbols, values, entropy, _places=places)

    @classmethod
    def shown(
        cls,
        vocab_size: int,
        symbols: Tensor,
        log_probs: Tensor,
        entropy: Tensor,
        hidden: Tensor | None = None,
        order_weights: Tensor | None = None,
    ) -> Denoised:
        """From its shown parts: ``symbols`` (N, L, K) int64 and ``log_probs`` (N, L, K), the most likely first."""
        dense = None
        if symbols.shape[-1] == vocab_size:  # blank boards name symbol 0 K times: the others get the floor
            dense = torch.full_like(log_probs, FLOOR).scatter(-1, symbols, log_probs)
        return cls(vocab_size, dense, hidden, order_weights, symbols.int(), log_probs, entropy)

    # ------------------------------------------------------------------ the shown parts
    @property
    def form(self) -> tuple[tuple[int, ...], Any]:
        """Shape (N, L, K) and dtype of the shown log-probabilities; () and the name of a type where they are none."""
        values = self._values if self.log_probs is None else self.log_probs
        if not isinstance(values, Tensor):
            return tuple(getattr(values, "shape", ())), getattr(values, "dtype", type(values).__name__)
        positions = values.shape[:-1] if self._places is None else self._places.shape
        return (*positions, *values.shape[-1:]), values.dtype

    def _spread(self, kept: Tensor, elsewhere: float) -> Tensor:
        """(N, L, ...) from what is kept of the positions asked for (N, W, ...)."""
        if self._places is None:
            return kept
        index = self._places.clamp(min=0).long().unsqueeze(-1).expand(-1, -1, kept.shape[-1])
        return kept.gather(1, index).masked_fill((self._places < 0).unsqueeze(-1), elsewhere)

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        """Of log-probabilities that are kept whole."""
        # As a stable sort, in a third of its time: one integer holds a number's bits and, below them, its index.
        bits = self.log_probs.clamp(max=0.0).abs().view(torch.int32).long() << 7
        key = bits | torch.arange(self.vocab_size, device=bits.device)
        key = torch.from_numpy(np.sort(key.numpy())) if key.device.type == "cpu" else key.sort(-1).values
        symbols = key & (WHOLE - 1)
        return self.log_probs.gather(-1, symbols), symbols

    @property
    def top_symbols(self) -> Tensor:
        """(N, L, K) int64, the most likely first; equally likely ones in the order of their numbers."""
        return self._sorted[1] if self._symbols is None else self._spread(self._symbols, 0).long()

    @property
    def top_log_probs(self) -> Tensor:
        """(N, L, K) float32, falling."""
        return self._sorted[0] if self._values is None else self._spread(self._values, FLOOR)

    @cached_property
    def entropy(self) -> Tensor:
        """(N, L) entropy in nats over all V symbols, with 0 log 0 = 0.

        Summed in sorted order, so that equal distributions tie.
        """
        if self._entropy is not None:
            return self._entropy
        probabilities = self._sorted[0].flip(-1).exp()
        return -torch.xlogy(probabilities, probabilities).sum(-1)

    def top_k_log_probs(self, k: int) -> Tensor:
        """(N, L, k) log-probabilities of the k most likely symbols, falling; k at most K."""
        if self.log_probs is not None:
            return self.log_probs.topk(k, -1).values
        return self._spread(self._values[..., :k], FLOOR)

    @cached_property
    def best(self) -> Tensor:
        """(N, L) int64, the most likely symbol, the lowest number where several tie."""
        if self._symbols is not None:
            return self._spread(self._symbols[..., :1], 0)[..., 0].long()
        return self._sorted[1][..., 0] if "_sorted" in vars(self) else self.log_probs.argmax(-1)

    @cached_property
    def best_log_prob(self) -> Tensor:
        """(N, L) log-probability of :attr:`best`."""
        if self._values is not None:
            return self._spread(self._values[..., :1], FLOOR)[..., 0]
        return self._sorted[0][..., 0] if "_sorted" in vars(self) else self.log_probs.max(-1).values

    def log_prob_of(self, symbols: Tensor) -> Tensor:
        """Log-probability of ``symbols`` (N, L) or (N, L, M), of the same shape; -inf for those that are not shown."""
        asked = symbols if symbols.ndim == 3 else symbols.unsqueeze(-1)  # (N, L, M)
        if self.log_probs is not None:
            answer = self.log_probs.gather(-1, asked)
        else:
            same = self.top_symbols.unsqueeze(-2) == asked.unsqueeze(-1)  # (N, L, M, K)
            answer = self.top_log_probs.unsqueeze(-2).masked_fill(~same, -torch.inf).amax(-1)
        return answer if symbols.ndim == 3 else answer.squeeze(-1)

    def draw(self, temperature: float, uniform: Tensor | None) -> Tensor:
        """(N, L) the symbol that each position becomes if it is filled: :attr:`best` at temperature 0, else a sample of
        p^(1/temperature) among the shown symbols, by inversion of its distribution function.

        Args:
            uniform: (N, L) in [0, 1), needed above temperature 0.
        """
        if temperature == 0 or uniform is None:
            return self.best
        log_probs, symbols = self.log_probs, None
        if log_probs is None:
            symbols, order = self.top_symbols.sort(-1)
            log_probs = self.top_log_probs.gather(-1, order)
        cumulative = (log_probs / temperature).softmax(-1).cumsum(-1)
        # The total is 1 up to rounding; staying below it keeps symbols of probability 0 out.
        at = (uniform * (1 - 1e-6)).unsqueeze(-1) * cumulative[..., -1:]
        index = (cumulative <= at).sum(-1).clamp(max=log_probs.shape[-1] - 1)
        return index if symbols is None else symbols.gather(-1, index.unsqueeze(-1)).squeeze(-1)

    def without_carried(self) -> Denoised:
        """The same without what a denoiser is given back with the next forward."""
        return self if self.carried is None else replace(self, carried=None)

    def without_hidden(self) -> Denoised:
        """Without what only its own step reads: hidden states, and what is drawn and carried."""
        if self.hidden is None and self.drawn is None and self.carried is None:
            return self
        return replace(self, hidden=None, drawn=None, carried=None)


def join_rows(parts: Sequence[Any], how: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    """One dataclass of several of its kind, field by field: tensors by ``how``, those in tuples and dataclasses
    likewise, others as they are. A field that one of them lacks is None."""
    if isinstance(parts[0], Denoised):
        parts = _alike(parts)
    joined = {}
    for field in fields(parts[0]):
        values = [getattr(part, field.name) for part in parts]
        if any(value is None for value in values):
            joined[field.name] = None
        elif isinstance(values[0], Tensor):
            joined[field.name] = how(values)
        elif isinstance(values[0], tuple):
            joined[field.name] = tuple(how(each) for each in zip(*values, strict=True))
        elif isinstance(values[0], int):
            joined[field.name] = values[0]
        else:
            joined[field.name] = join_rows(values, how)
    return type(parts[0])(**joined)


def _alike(parts: Sequence[Denoised]) -> Sequence[Denoised]:
    """They, keeping equally many positions."""
    if len({part._places is None for part in parts}) > 1:  # one keeps all: the others, too
        return [
            part
            if part._places is None
            else replace(part, _symbols=part.top_symbols.int(), _values=part.top_log_probs, _places=None)
            for part in parts
        ]
    if parts[0]._places is None or len({part._values.shape[1] for part in parts}) == 1:
        return parts
    most = max(part._values.shape[1] for part in parts)
    more = [(0, 0, 0, most - part._values.shape[1]) for part in parts]
    return [
        replace(part, _symbols=pad(part._symbols, wider), _values=pad(part._values, wider))
        for part, wider in zip(parts, more, strict=True)
    ]


class Block(NamedTuple):
    """The block in play of each row, for denoisers that carry something.

    ``start`` and ``stop`` (N,) int64: the positions from ``start`` on, before ``stop``. ``begun`` (N, L) int64: the
    tokens as they were when the block began, its holes masked. Where filling does not go block by block, all that is
    behind the prompt is one block.
    """

    start: Tensor
    stop: Tensor
    begun: Tensor


# ---------------------------------------------------------------------- what everybody sees
@dataclass(frozen=True)
class History:
    """What rules that look back read.

    Attributes:
        steps: (N,) int64, denoiser forwards before this one.
        fill_prob: (N, L) the probability that each filled symbol had when it was filled in, 1 of given ones.
        previous: the forward before this one; None where no row had one. A row's first step has ``steps`` 0.
        remasks_left: (N,) int64, how many positions the ``remask_budget`` still lets it mask again; None without one.
        block: (N,) int64, the block that is being filled, from 0; None where filling does not go block by block.
        block_holes: (N, B) int64, how many holes the instance had in each block; None likewise.
    """

    steps: Tensor
    fill_prob: Tensor
    previous: Denoised | None = None
    remasks_left: Tensor | None = None
    block: Tensor | None = None
    block_holes: Tensor | None = None


@dataclass(frozen=True)
class Observation(Rows):
    """All that a policy may look at: the same for references, learned policies, learners and a user's own loop. The
    answers are not here.

    Attributes:
        tokens: (N, L) int64; V where a position is masked, and noise or an accepted symbol on a canvas.
        masked: (N, L) bool. fillable: (N, L) bool, those that may be filled now: all, or those of the current block.
        denoised: the denoiser's forward on ``tokens``; ``top_symbols``, ``top_log_probs``, ``entropy``, ``hidden`` and
            ``order_weights`` are its.
        remaskable: (N, L) bool, the positions that may be masked again; None where the rules have none.
        remask_count: (N, L) int64, how often each position was masked again in this episode; None likewise.
        history: what the episode remembers; None in observations that were read from an interface's arrays.
    """

    tokens: Tensor
    masked: Tensor
    fillable: Tensor
    denoised: Denoised
    remaskable: Tensor | None = None
    remask_count: Tensor | None = None
    history: History | None = None

    @property
    def top_symbols(self) -> Tensor:
        """(N, L, K) int64, :attr:`Denoised.top_symbols`."""
        return self.denoised.top_symbols

    @property
    def top_log_probs(self) -> Tensor:
        """(N, L, K) float32, :attr:`Denoised.top_log_probs`."""
        return self.denoised.top_log_probs

    @property
    def entropy(self) -> Tensor:
        """(N, L) in nats, :attr:`Denoised.entropy`."""
        return self.denoised.entropy

    @property
    def hidden(self) -> Tensor | None:
        """(N, L, D), where the denoiser gives some; else None."""
        return self.denoised.hidden

    @property
    def order_weights(self) -> Tensor | None:
        """(N, L), where the denoiser has learned an order; else None."""
        return self.denoised.order_weights

    @property
    def confidence(self) -> Tensor:
        """(N, L) probability of the most likely symbol, max_v p_i(v)."""
        return self.denoised.best_log_prob.exp()

    @property
    def margin(self) -> Tensor:
        """(N, L) p_i(1) - p_i(2), the top-probability margin (Kim et al. 2025, arXiv 2502.06768, section 4)."""
        top = self.denoised.top_k_log_probs(2).exp()
        return top[..., 0] - top[..., 1]

    def certain(self, above: float) -> Tensor:
        """(N, L) bool: fillable positions whose confidence is at least ``above``."""
        return (self.confidence >= above) & self.fillable

    @property
    def action_mask(self) -> Tensor:
        """(N, A) bool: the entries that an action may contain."""
        return self.fillable if self.remaskable is None else torch.cat([self.fillable, self.remaskable], 1)


# ---------------------------------------------------------------------- where play stands
@dataclass(frozen=True)
class Canvas:
    """What is remembered of the canvas in play; all zero where it begins.

    Attributes:
        steps: (N,) int64, denoiser forwards that it had.
        stable: (N,) int64, for how many of them, up to the last, the most likely symbols were those of the one before.
        carried: (N, ...), what the denoiser carries from one forward to the next (self-conditioning); None: nothing.
    """

    steps: Tensor
    stable: Tensor
    carried: Tensor | None = None


@dataclass(frozen=True)
class State(Rows):
    """N boards in play; rows are independent, and everything that is remembered of them is here.

    Attributes:
        tokens: (N, L) int64. masked: (N, L) bool, positions that are not settled: those of a canvas hold symbols, too.
        instances: the problems, with their answers, that the rows came from.
        steps: (N,) int64, denoiser forwards (NFE) of the episode so far.
        remask_count: (N, L) int64, how often each position was masked again.
        fill_prob: (N, L) float32, the probability that each symbol had when it was filled in; 1 where it was given.
        done: (N,) bool, rows whose episode has ended: they idle. truncated: of those, the ones cut off by the budget.
        illegal: (N,) bool, rows whose last action was illegal.
        previous: the last forward, without hidden states; None before the first step.
        canvas: with actions ``accept``, what is remembered of the canvas in play; else None.
        carried: what the denoiser carries from that forward to the next; None of most. What rows carry that have begun
            anew may be of boards before theirs. Of a canvas it stands there.
    """

    tokens: Tensor
    masked: Tensor
    instances: Instances
    steps: Tensor
    remask_count: Tensor
    fill_prob: Tensor
    done: Tensor
    truncated: Tensor
    illegal: Tensor
    previous: Denoised | None = None
    canvas: Canvas | None = None
    carried: Any = None

    @property
    def terminated(self) -> Tensor:
        """(N,) bool: rows that ended by themselves."""
        return self.done & ~self.truncated

    def __len__(self) -> int:
        return len(self.tokens)

    def put(self, rows: Tensor, other: State) -> State:
        """This state with ``other`` in the rows ``rows`` (indices); what ``other`` has no ``previous`` of keeps its
        old one, which its ``steps`` of 0 tell to ignore, and what was ``carried``, which denoisers check."""
        if other.previous is None and self.previous is not None:
            other = replace(other, previous=self.previous[rows])
        if other.carried is None and self.carried is not None:
            other = replace(other, carried=join_rows([self.carried], lambda parts: parts[0][rows]))
        return join_rows([self, other], lambda parts: parts[0].index_copy(0, rows, parts[1]))


class Step(NamedTuple):
    """One recorded step of a rollout.

    ``observation``; ``action`` (N, A) bool; ``alive`` (N,) bool, rows that were still in play; ``log_prob`` (N,).
    """

    observation: Observation
    action: Tensor
    alive: Tensor
    log_prob: Tensor


class Rollout(NamedTuple):
    """A finished batch of episodes: the final ``state``, ``reward`` (N,) float32, recorded ``steps``; and the network
    passes that each took, (N,) int64: the denoiser's (one per forward, or more of one that reads its own belief), and
    the policy's own."""

    state: State
    reward: Tensor
    steps: list[Step]
    denoiser_passes: Tensor
    policy_passes: Tensor

    @property
    def tokens(self) -> Tensor:
        """(N, L) the finished sequences; rows whose budget ran out keep their masks."""
        return self.state.tokens

    @property
    def nfe(self) -> Tensor:
        """(N,) int64 denoiser forwards."""
        return self.state.steps
