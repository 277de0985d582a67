"""N rows with random streams of their own: what all environment interfaces play on. Torch only.

Row i draws its instances and, with sampled filling, its symbols from generators of its own, so an episode depends on
the row's seed and actions only, not on how many rows play beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from pretrain.checkpoint import checked_device
from tasks import Instances, Task, UnmaskError
from tasks.settings import AtLeast1, Seed, check
from tasks.task import check_instances, random_rows
from unmask_env.encoding import Arrays, Extra, encode, encode_unseen
from unmask_env.process import Unmasking
from unmask_env.reference import Policy, default_reference
from unmask_env.reference import reference as make_reference
from unmask_env.registration import make_process
from unmask_env.state import Observation, Rules, State

Split = Literal["train", "validation", "test"]
_AHEAD = 16  # instances drawn per call of task.sample
_FILLING = 0x5DEECE66D  # sets the seeds of the filling streams apart from those of the instances


class Seen(NamedTuple):
    """One forward: the ``observation`` that the process needs, and its ``arrays`` for agents."""

    observation: Observation
    arrays: Arrays


class Restarted(NamedTuple):
    """How play goes on once rows have ended: the ``state`` and what is ``seen`` of it; the indices ``rows`` (M,) that
    ended; and the arrays ``last`` (M, ...) of their boards as they ended."""

    state: State
    seen: Seen
    rows: Tensor
    last: Arrays


def checked_reference(policy: str | Policy | None, rules: Rules) -> Policy:
    """The reference policy of an environment; None is the default one.

    Raises:
        UnmaskError: one that sees the answers, or one of single positions for sets, or the reverse.
    """
    policy = default_reference(rules.actions) if policy is None else policy
    g = make_reference(policy) if isinstance(policy, str) else policy
    if not isinstance(g, Policy):
        raise UnmaskError(f"a reference is a name or a Policy, not {type(g).__name__}")
    if g.sees_answers:
        raise UnmaskError("the oracle sees the answers, which an observation never shows; take another reference")
    single = rules.actions == "single"
    if (g.actions == "single") != single or (g.actions == "set+remask" and rules.actions == "set"):
        raise UnmaskError(f"{getattr(g, 'name', type(g).__name__)} is no reference for actions {rules.actions!r}")
    return g


def whole(number: Any) -> Any:
    """Numpy's whole numbers as Python's; all else as it is."""
    return int(number) if isinstance(number, np.integer) else number


def read_seeds(seed: Any, n: int) -> list[int]:
    """The seeds of N rows: ``seed``, ``seed + 1``, ... of a whole number, or a list of them, one per row.

    Raises:
        UnmaskError: another number of seeds, or one that is no whole number from 0 to 2**63 - 1.
    """
    if isinstance(seed, list | tuple | range) or (isinstance(seed, np.ndarray) and seed.ndim):
        seeds = [whole(each) for each in seed]
    else:
        check("seed", whole(seed), Seed)
        seeds = [whole(seed) + row for row in range(n)]
    if len(seeds) != n:
        raise UnmaskError(f"{n} rows need {n} seeds, not {len(seeds)}")
    for each in seeds:
        check("seed", each, Seed)
    return seeds


def read_options(options: Any, known: tuple[str, ...]) -> Mapping[str, Any]:
    """What ``reset(options=...)`` was given. Raises :class:`tasks.UnmaskError` naming options that are not known."""
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise UnmaskError(f"options must be a dictionary with {' and '.join(known)}, not {type(options).__name__}")
    if unknown := [str(name) for name in options if name not in known]:
        raise UnmaskError(f"reset takes no option {', '.join(unknown)}; known: {', '.join(known)}")
    if {"index", "instances"} <= {name for name, value in options.items() if value is not None}:
        raise UnmaskError("reset takes options['index'] or options['instances'], not both")
    return options


def read_index(index: Any, n: int, count: int) -> list[int]:
    """Which of ``count`` instances N rows play: one whole number for all of them, or a list with one per row.

    Raises:
        UnmaskError: another number of indices, or one that is no whole number from 0 to ``count - 1``.
    """
    several = isinstance(index, list | tuple | range) or (isinstance(index, np.ndarray | Tensor) and index.ndim)
    indices = index.tolist() if isinstance(index, np.ndarray | Tensor) else index
    indices = [whole(each) for each in indices] if several else [whole(indices)] * n
    if len(indices) != n:
        raise UnmaskError(f"options['index'] must hold one index per row, {n} of them, not {len(indices)}")
    for each in indices:
        if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < count:
            raise UnmaskError(f"options['index'] must be a whole number from 0 to {count - 1}, not {each!r}")
    return indices


class Streams:
    """The process and the random streams of N rows; the states of play are the callers'.

    Args:
        reference: the policy g, by name with options or object; None: the default one.
        show: which of the optional parts of an observation are shown.
        split: what episodes are drawn from: ``train``, fresh training instances, or the fixed held-out ones of
            ``validation`` or ``test``, each as likely as another.
        options: ``task``, ``denoiser``, ``env_id``, ``temperature`` and rules, for
            :func:`unmask_env.registration.make_process`.

    Raises:
        UnmaskError: a task or denoiser is missing, or a setting is not allowed; also what loading a denoiser raises.
    """

    def __init__(
        self,
        n: int,
        reference: str | Policy | None = None,
        device: torch.device | str = "cpu",
        show: tuple[Extra, ...] = (),
        split: Split = "train",
        **options: Any,
    ) -> None:
        check("num_envs", n := whole(n), AtLeast1)
        check("split", split, Split)
        several = isinstance(show, Iterable) and not isinstance(show, str)
        if unknown := [part for part in show if part not in get_args(Extra)] if several else [show]:
            raise UnmaskError(f"show takes {' and '.join(get_args(Extra))}, not {unknown[0]!r}")
        self.process: Unmasking = make_process(device=device, **options)
        if self.process.rules.actions == "accept":
            raise UnmaskError("environments play on masks; play actions 'accept' with Unmasking.rollout")
        self.reference = checked_reference(reference, self.process.rules)
        self.n, self.device, self.extras, self.split = n, self.process.device, show, split
        if self.device.type != checked_device(device).type:
            raise UnmaskError(f"the denoiser is on {self.device} and the environment on {device}")
        self._instances: list[torch.Generator] | None = None
        self._fillings: list[torch.Generator] = [torch.Generator() for _ in range(n)]
        self._ahead: list[tuple[Instances, int] | None] = [None] * n

    @property
    def task(self) -> Task:
        """The task of the process."""
        return self.process.task

    # ------------------------------------------------------------------ randomness
    def seed(self, seeds: Sequence[int], rows: Sequence[int] | None = None, share: int = 1) -> None:
        """One seed per row, of :func:`read_seeds`; with ``rows`` only those take theirs.

        Args:
            share: runs of this many rows draw the same instances (each its own symbols): those of their first seed.
        """
        if self._instances is None:
            self._instances = [torch.Generator() for _ in seeds]
        for row in range(self.n) if rows is None else rows:
            self._instances[row].manual_seed(seeds[row - row % share])
            self._fillings[row].manual_seed(seeds[row] ^ _FILLING)
            self._ahead[row] = None

    @property
    def seeded(self) -> bool:
        """Whether :meth:`seed` was called, so that instances can be drawn."""
        return self._instances is not None

    def _next_instance(self, row: int) -> Instances:
        if self._instances is None:
            raise UnmaskError("call reset() before anything else")
        instances, at = self._ahead[row] or (None, _AHEAD)
        if instances is None or at == len(instances):
            instances, at = self._draw(self._instances[row]), 0
        self._ahead[row] = (instances, at + 1)
        return instances[at : at + 1]

    @cached_property
    def heldout(self) -> Instances:
        """Those of the split. Raises :class:`tasks.UnmaskError` for training, whose instances have no list."""
        if self.split == "train":
            raise UnmaskError(
                "options['index'] chooses a held-out instance; make the environment with split='test' or 'validation'"
            )
        return check_instances(self.task, self.task.heldout(split=self.split))

    def _draw(self, generator: torch.Generator) -> Instances:
        if self.split == "train":
            return check_instances(self.task, self.task.sample(_AHEAD, generator))
        return self.heldout[random_rows(len(self.heldout), _AHEAD, generator)]

    def chosen(self, options: Mapping[str, Any], n: int) -> Instances | None:
        """The ``instances`` or those of the ``index`` that N rows were given to begin with; None where neither was."""
        index = options.get("index")
        if index is None:
            return options.get("instances")
        return self.heldout[torch.tensor(read_index(index, n, len(self.heldout)))]

    def put_back(self, rows: Sequence[int]) -> None:
        """The instances that ``rows`` drew last were not used: they draw them again."""
        for row in rows:
            instances, at = self._ahead[row] or (None, 0)
            if instances is not None and at > 0:
                self._ahead[row] = (instances, at - 1)

    def _uniform(self, state: State) -> Tensor | None:
        """(N, L) what this step's filling draws: each row in play from its own stream."""
        if self.process.temperature == 0:
            return None
        uniform = torch.zeros(state.tokens.shape)
        for row in (~state.done).nonzero().flatten().tolist():
            uniform[row] = torch.rand(self.task.length, generator=self._fillings[row])
        return uniform.to(self.device)

    # ------------------------------------------------------------------ play
    def empty(self) -> State:
        """A state before the first reset: no row has begun."""
        holes = torch.full((self.n, self.task.length), self.task.mask_id, device=self.device)
        state = self.process.reset(Instances(holes, torch.zeros_like(holes)))
        return replace(state, done=torch.ones_like(state.done))

    def begin(self, state: State, rows: Sequence[int], instances: Instances | None = None) -> State:
        """``state`` with the episodes of ``rows`` begun anew, from ``instances`` or else each row's own stream."""
        if not len(rows):
            return state
        if instances is None:
            drawn = [self._next_instance(row) for row in rows]
            instances = Instances(torch.cat([d.tokens for d in drawn]), torch.cat([d.answers for d in drawn]))
        else:
            check_instances(self.task, instances, len(rows), "options['instances']")
        if not bool((instances.tokens == self.task.mask_id).any(1).all()):
            raise UnmaskError("every instance needs at least one mask; an episode without one would never end")
        return state.put(torch.as_tensor(rows, device=self.device), self.process.reset(instances))

    def action_mask(self, state: State) -> Tensor:
        """(N, A) bool: the entries that an action may contain; all of them on boards that are done."""
        fillable, remaskable = self.process.permitted(state)
        allowed = fillable if remaskable is None else torch.cat([fillable, remaskable], 1)
        return allowed | state.done.unsqueeze(1)

    @torch.no_grad()  # a learned policy may be the reference
    def observe(self, state: State) -> Seen:
        """One forward for all rows; of rows that were truncated as they were before."""
        observation = self.process.observe(replace(state, done=state.terminated))
        return Seen(observation, encode(observation, self.reference(observation).entry_log_probs(), self.extras))

    def step(self, state: State, observation: Observation, action: Tensor) -> tuple[State, Tensor]:
        """One action (N, A) bool per row; the state that follows and the reward (N,)."""
        return self.process.step(state, observation, action, self._uniform(state))

    def autoreset(self, state: State) -> Restarted:
        """Begin anew the rows that ended, and observe all boards, in one forward.

        Complete boards are not given to the denoiser; truncated ones, whose value a learner still needs, ride along.
        """
        rows = state.done.nonzero().flatten()
        ended = state[rows]
        last = encode_unseen(self.process, ended, self.extras)
        state = self.begin(state, rows.tolist())
        cut = ended.truncated.nonzero().flatten()
        if not len(cut):
            return Restarted(state, self.observe(state), rows, last)
        seen = self.observe(State.join([state, ended[cut]], torch.cat))
        last = {key: value.index_copy(0, cut, seen.arrays[key][self.n :]) for key, value in last.items()}
        arrays = {key: value[: self.n] for key, value in seen.arrays.items()}
        return Restarted(state, Seen(seen.observation[: self.n], arrays), rows, last)
