"""N boards with their own random streams, and what an agent is shown of them: what the four faces share. Torch only.

Row i draws its instances and, with sampled filling, its symbols from generators of its own, so an episode depends on
the row's seed and actions only, not on how many rows play beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pretrain.backbone import Backbone
from tasks import Instances, Task, UnmaskError
from unmask_env import core, parallel, reference, registration, set_laws
from unmask_env.core import Denoised, Observation, Rules, State, Transition
from unmask_env.denoiser import Denoiser, load_denoiser
from unmask_env.parallel import SetReference
from unmask_env.reference import Reference

TOP = 8  # most likely symbols per position that an observation shows
FLOOR = -20.0  # least log-probability of a symbol shown, so that spaces are bounded
LOG_ZERO = -1e4  # shown where the reference's log-probability is -inf, or below it
_AHEAD = 16  # instances drawn per call of task.sample
_FILLING = 0x5DEECE66D  # sets the seeds of the filling streams apart from those of the instances

Key = Literal["tokens", "action_mask", "top_tokens", "top_log_probs", "log_reference", "reopened"]
View = dict[Key, Tensor]
"""What an agent is shown: ``tokens`` (N, L) int64; ``action_mask`` (N, A) bool, which entries an action may contain:
A = L, or 2 L where positions may be opened again; ``top_tokens`` (N, L, K) int64 and ``top_log_probs`` (N, L, K), the
K = min(8, V) most likely symbols; ``log_reference`` (N, A): log g(i|s), or of sets that entry i is in one; where
positions may be opened again ``reopened`` (N, L) int64, how often each was."""


def show(observation: Observation, log_reference: Tensor) -> View:
    """The view of N boards. Symbols of equal probability are listed in no fixed order."""
    log_probs = observation.denoised.log_probs
    k = min(TOP, log_probs.shape[-1])
    # Sorting everything is the faster way to the top of a small vocabulary.
    values, indices = log_probs.sort(-1, descending=True) if log_probs.shape[-1] <= 2 * k else log_probs.topk(k, -1)
    reopened: View = {} if observation.reopened is None else {"reopened": observation.reopened}
    return reopened | {
        "tokens": observation.tokens,
        "action_mask": observation.choices,
        "top_tokens": indices[..., :k],
        "top_log_probs": values[..., :k].clamp(min=FLOOR, max=0.0),
        "log_reference": log_reference.clamp(min=LOG_ZERO),
    }


def blank(tokens: Tensor, choices: Tensor, reopened: Tensor, top: int) -> View:
    """The view of boards on which the denoiser was not run: its parts are zeros, the reference's -inf."""
    zeros = tokens.new_zeros((*tokens.shape, top))
    none = torch.full(choices.shape, LOG_ZERO, device=tokens.device)
    return show(_observation(tokens, choices, reopened, Denoised(zeros.float())), none) | {"top_tokens": zeros}


def read(view: View, vocab_size: int) -> Observation:
    """The observation that ``view`` shows, for orders. What the most likely symbols leave is spread over the others.

    Exact up to ``FLOOR`` for vocabularies of at most eight symbols; of nine, the last one's probability is right to
    float32's 3e-7. ``tokens``, ``top_tokens`` and ``action_mask`` may be floats, as stable-baselines3 hands them on.
    Hidden states are not shown, so there are none.
    """
    top, values = view["top_tokens"].long(), view["top_log_probs"].float()
    n, length, k = top.shape
    others = vocab_size - k
    if others:
        left = (-torch.expm1(values.logsumexp(-1).clamp(max=-1e-7))).log() - torch.tensor(float(others)).log()
        log_probs = left.unsqueeze(-1).expand(n, length, vocab_size).scatter(-1, top, values)
    else:
        # Blank boards name one symbol K times: the others must not be left to chance.
        log_probs = torch.full((n, length, vocab_size), FLOOR, device=values.device).scatter(-1, top, values)
    return _observation(view["tokens"].long(), view["action_mask"].bool(), view.get("reopened"), Denoised(log_probs))


def _observation(tokens: Tensor, choices: Tensor, reopened: Tensor | None, denoised: Denoised) -> Observation:
    """What orders see, of (N, L) or (N, 2 L) ``choices``."""
    length = tokens.shape[1]
    if choices.shape[1] == length:
        return Observation(tokens, choices, denoised)
    return Observation(tokens, choices[:, :length], denoised, choices[:, length:], reopened.long())


@dataclass(frozen=True)
class Look:
    """What one forward tells: the ``view`` of the boards and ``symbols`` (N, L), what each position would become.

    The symbols decide what an action leads to. With sampled filling they are drawn with the look, and no agent may see
    them.
    """

    view: View
    symbols: Tensor

    @property
    def confidence(self) -> Tensor:
        """(N, L) log-probability of each position's most likely symbol."""
        return self.view["top_log_probs"][..., 0]


def log_reference_of(log_reference: np.ndarray | Tensor, action: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """(N,) log g(action | s) from a view's ``log_reference`` (N, A): at the position (N,), or of the set (N, A)."""
    if isinstance(log_reference, np.ndarray):
        return log_reference_of(torch.from_numpy(log_reference), torch.as_tensor(action)).numpy()
    if action.ndim == 1:
        return log_reference.gather(1, action.long().unsqueeze(1)).squeeze(1)
    return set_laws.independent_log_prob(log_reference, log_reference > LOG_ZERO, action)


def require_possible(log_reference: np.ndarray | Tensor) -> None:
    """Raises :class:`tasks.UnmaskError` where an action has log g(a|s) = -inf: the KL would be infinite."""
    if bool((log_reference <= LOG_ZERO).any()):
        raise UnmaskError(
            "an action has probability 0 under the reference (a closed position, or one that it excludes), so the KL "
            "is infinite; mask the policy's actions, and take a reference that allows every open position"
        )


def default_reference(rules: Rules) -> Literal["softmax_confidence", "soft_threshold"]:
    """The name of the reference policy where none is named."""
    return "softmax_confidence" if rules.actions == "single" else "soft_threshold"


def _reference(order: str | Reference | SetReference | None, rules: Rules) -> Reference | SetReference:
    """The reference policy that ``order`` means where ``rules`` hold; None is the default one.

    Raises:
        UnmaskError: one that sees the answers, or one of single positions for sets, or the reverse.
    """
    sets = rules.actions != "single"
    order = default_reference(rules) if order is None else order
    by_name = parallel.get if sets else reference.get
    found = by_name(order) if isinstance(order, str) else order
    if hasattr(found, "with_answers"):
        raise UnmaskError("the oracle sees the answers, which an observation never shows; take another reference")
    if hasattr(found, "log_inclusion") != sets:
        raise UnmaskError(f"{type(found).__name__} is no reference for actions {rules.actions!r}")
    return found


class Boards:
    """The rules and the random streams of N rows; the states of play are the callers'.

    Raises:
        UnmaskError: a task or denoiser is missing, or a setting is not allowed; also what loading a denoiser raises.
    """

    def __init__(
        self,
        n: int,
        env_id: str | None,
        task: str | Task | None,
        denoiser: str | Path | Backbone | Denoiser | None,
        order: str | Reference | SetReference | None,
        rules: Rules,
        temperature: float,
        device: torch.device | str,
    ) -> None:
        found = registration.lookup(env_id) if env_id is not None else None
        task = task if task is not None else (found.task if found else None)
        denoiser = denoiser if denoiser is not None else (found.denoiser if found else None)
        if n < 1:
            raise UnmaskError(f"num_envs must be at least 1, not {n}")
        if task is None or denoiser is None:
            missing = "task" if task is None else "denoiser"
            raise UnmaskError(f"this environment needs a {missing}; give {missing}=... or register the id with one")
        if not temperature >= 0:
            raise UnmaskError(f"temperature must be 0 (greedy filling) or more, not {temperature}")
        self.reference = _reference(order, rules)
        self.n, self.device = n, torch.device(device)
        self.task = registration.resolve_task(task)
        self.denoiser = load_denoiser(denoiser, self.task, device)
        if self.denoiser.device.type != self.device.type:
            raise UnmaskError(f"the denoiser is on {self.denoiser.device} and the environment on {self.device}")
        self.temperature = temperature
        # Without a budget, an illegal no-op or opening again must not loop for ever.
        self.rules = replace(rules, nfe_budget=rules.nfe_budget or 2 * self.task.length)
        self.entries = self.task.length * (2 if rules.actions == "set+remask" else 1)
        self.top = min(TOP, self.task.vocab_size)
        self._instances: list[torch.Generator] | None = None
        self._fillings: list[torch.Generator] = [torch.Generator() for _ in range(n)]
        self._ahead: list[tuple[Instances, int] | None] = [None] * n

    # ------------------------------------------------------------------ randomness
    def seed(self, seeds: Sequence[int], rows: Sequence[int] | None = None, share: int = 1) -> None:
        """One seed per row; with ``rows`` only those take theirs.

        Args:
            share: runs of this many rows draw the same instances (each its own symbols): those of their first seed.
        """
        if len(seeds) != self.n:
            raise UnmaskError(f"{self.n} rows need {self.n} seeds, not {len(seeds)}")
        if self._instances is None:
            self._instances = [torch.Generator() for _ in seeds]
        for row in range(self.n) if rows is None else rows:
            self._instances[row].manual_seed(int(seeds[row - row % share]))
            self._fillings[row].manual_seed(int(seeds[row]) ^ _FILLING)
            self._ahead[row] = None

    @property
    def seeded(self) -> bool:
        return self._instances is not None

    def _next_instance(self, row: int) -> Instances:
        if self._instances is None:
            raise UnmaskError("call reset() before anything else")
        instances, at = self._ahead[row] or (None, _AHEAD)
        if instances is None or at == len(instances):
            instances, at = self.task.sample(_AHEAD, self._instances[row]), 0
        self._ahead[row] = (instances, at + 1)
        return instances[at : at + 1]

    def put_back(self, rows: Sequence[int]) -> None:
        """The instances that ``rows`` drew last were not used: they draw them again."""
        for row in rows:
            instances, at = self._ahead[row] or (None, 0)
            if instances is not None and at > 0:
                self._ahead[row] = (instances, at - 1)

    # ------------------------------------------------------------------ play
    def empty(self) -> State:
        """A state before the first reset: nothing has begun."""
        holes = torch.full((self.n, self.task.length), self.task.mask_id, device=self.device)
        return core.begin(Instances(holes, torch.zeros_like(holes)), self.task.mask_id)

    def begin(self, state: State, rows: Sequence[int], instances: Instances | None = None) -> State:
        """``state`` with the episodes of ``rows`` begun anew, from ``instances`` or else each row's own stream."""
        if not len(rows):
            return state
        if instances is None:
            drawn = [self._next_instance(row) for row in rows]
            instances = Instances(torch.cat([d.tokens for d in drawn]), torch.cat([d.answers for d in drawn]))
        elif instances.tokens.shape != (len(rows), self.task.length):
            raise UnmaskError(f"options['instances'] must hold {len(rows)} instances of length {self.task.length}")
        if not bool((instances.tokens == self.task.mask_id).any(1).all()):
            raise UnmaskError("every instance needs at least one hole; an episode without one would never end")
        index = torch.as_tensor(rows, device=self.device)
        return core.reset_rows(state, index, instances.to(self.device), self.task.mask_id)

    def choices(self, state: State) -> Tensor:
        """(N, A) bool: the entries that an action may contain."""
        open, reopenable = core.choices(self.task, state, self.rules)
        return open if reopenable is None else torch.cat([open, reopenable], 1)

    @torch.no_grad()  # a learned order may be the reference
    def _see(self, tokens: Tensor, choices: Tensor, reopened: Tensor) -> tuple[Denoised, View]:
        denoised = self.denoiser(tokens)
        observation = _observation(tokens, choices, reopened, denoised)
        sets = self.rules.actions != "single"
        log_reference = (self.reference.log_inclusion if sets else self.reference.log_prob)(observation)
        return denoised, show(observation, log_reference)

    def _symbols(self, log_probs: Tensor, drawing: Sequence[int]) -> Tensor:
        if self.temperature == 0:
            return core.fill(log_probs)
        uniform = torch.zeros(log_probs.shape[:2])
        for row in drawing:
            uniform[row] = torch.rand(self.task.length, generator=self._fillings[row])
        return core.fill(log_probs, self.temperature, uniform.to(self.device))

    def look(self, state: State, drawing: Sequence[int] | None = None) -> Look:
        """One forward for all rows. ``drawing``: the rows whose filling streams advance, by default all."""
        denoised, view = self._see(state.tokens, self.choices(state), state.reopened)
        return Look(view, self._symbols(denoised.log_probs, range(self.n) if drawing is None else drawing))

    def step(self, state: State, look: Look, action: Tensor) -> Transition:
        """Apply one action per row to the boards that ``look`` was taken of."""
        return core.step(self.task, state, look.symbols, action, self.rules, look.confidence)

    def legal(self, state: State) -> Tensor:
        """An action per row that no rule forbids, where one can act at all: an open position, or the empty set."""
        if self.rules.actions == "single":
            return self.choices(state).int().argmax(1)
        return torch.zeros(self.n, self.entries, dtype=torch.long, device=self.device)

    def go_on(self, transition: Transition) -> tuple[State, Look, Tensor, View]:
        """Begin anew the rows that ended, and look at all boards, in one forward.

        Returns:
            The state and look from which play goes on; the indices (M,) of the rows that ended, and the view (M, ...)
            of their boards as they ended. Complete boards are not given to the denoiser; truncated ones, whose value
            a learner still needs, ride in the same forward.
        """
        left = transition.state
        rows = (transition.terminated | transition.truncated).nonzero().flatten()
        state = self.begin(left, rows.tolist())
        ended = left.tokens[rows], self.choices(left)[rows], left.reopened[rows]
        last = blank(*ended, self.top)
        cut = transition.truncated[rows].nonzero().flatten()
        if not len(cut):
            return state, self.look(state), rows, last
        playing = state.tokens, self.choices(state), state.reopened
        denoised, view = self._see(*(torch.cat([a, b[cut]]) for a, b in zip(playing, ended, strict=True)))
        last = {key: value.index_copy(0, cut, view[key][self.n :]) for key, value in last.items()}
        symbols = self._symbols(denoised.log_probs[: self.n], range(self.n))
        return state, Look({key: value[: self.n] for key, value in view.items()}, symbols), rows, last
