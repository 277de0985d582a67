"""The Markov decision process, in torch alone: states, observations, transitions, rollouts.

Time runs from the instance with holes to the complete sequence. In a state, ``open`` marks the undecided positions.
An action names one open position, or a set of them; the frozen denoiser fills them; a finished sequence is rewarded.
Nothing here knows Gymnasium, tensordict or which heuristic or network chooses.

Shapes: N rows (independent boards), L positions, V symbols, D hidden channels; A entries of a set: L, or 2 L where
positions may also be opened again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from pretrain.processes import gumbel
from tasks import Instances, Task, UnmaskError

Actions = Literal["single", "set", "set+remask"]
OnIllegal = Literal["noop", "terminate", "raise"]


@dataclass(frozen=True)
class Rules:
    """What an action may do, and when an episode is cut off.

    Attributes:
        actions: ``single``: an action is (N,) int64, one open position per row. ``set``: (N, L) bool, the positions to
            close in one forward. ``set+remask``: (N, 2 L) bool, the positions to close and, behind those, the closed
            ones to open again; what an instance gives stays closed. **A set that closes nothing closes the open
            position that the denoiser is surest of**, so every forward decides something.
        on_illegal: an illegal action (a position that may not be chosen, or more re-openings than are left) changes
            nothing and costs its forward (``noop``), ends the episode with reward 0 (``terminate``), or raises.
        nfe_budget: episodes that are still open after this many forwards are truncated; None: never.
        block_length: positions behind the task's prompt are filled block by block of this many (LLaDA's
            semi-autoregressive decoding, arXiv 2502.09992); within a block the order is free. None: one block.
        remask_budget: positions that an episode may open again; None: any number.
        speed: exponent alpha of rewards r ((H - NFE + 1) / H)^alpha of instances with H holes (Jazbec et al. 2025,
            arXiv 2512.09106); 0 does not care for forwards.
        speed_form: ``sum`` adds alpha (H - NFE + 1) / H instead, whatever r is: known to collapse into haste.

    Raises:
        UnmaskError: a setting that is not allowed.
    """

    actions: Actions = "single"
    on_illegal: OnIllegal = "noop"
    nfe_budget: int | None = None
    block_length: int | None = None
    remask_budget: int | None = None
    speed: float = 0.0
    speed_form: Literal["product", "sum"] = "product"

    @classmethod
    def of(cls, options: dict[str, Any]) -> Rules:
        """Rules from keyword arguments. Raises :class:`tasks.UnmaskError` naming those that are none of theirs."""
        unknown = sorted(options.keys() - {field.name for field in fields(cls)})
        if unknown:
            known = ", ".join(field.name for field in fields(cls))
            raise UnmaskError(f"environments do not take {', '.join(unknown)}; beside their own arguments: {known}")
        return cls(**options)

    def shaped(self, reward: Tensor, nfe: Tensor, holes: Tensor) -> Tensor:
        """(N,) rewards of complete rows with their forwards counted in; ``holes`` (N,) at the start."""
        left = ((holes - nfe + 1) / holes.clamp(min=1)).clamp(min=0.0)
        return reward * left**self.speed if self.speed_form == "product" else reward + self.speed * left

    def __post_init__(self) -> None:
        if not (isinstance(self.speed, int | float) and 0 <= self.speed < math.inf):
            raise UnmaskError(f"speed must be at least 0 and finite, not {self.speed!r}")
        if self.speed_form not in ("product", "sum"):
            raise UnmaskError(f"speed_form must be product or sum, not {self.speed_form!r}")
        if self.actions not in get_args(Actions):
            raise UnmaskError(f"actions must be one of {', '.join(get_args(Actions))}, not {self.actions!r}")
        if self.on_illegal not in get_args(OnIllegal):
            raise UnmaskError(f"on_illegal must be noop, terminate or raise, not {self.on_illegal!r}")
        for name, least in (("nfe_budget", 1), ("block_length", 1), ("remask_budget", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise UnmaskError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if self.remask_budget is not None and self.actions != "set+remask":
            raise UnmaskError(f"remask_budget is for actions 'set+remask', not {self.actions!r}")


SINGLE = Rules()


class InvalidActionError(UnmaskError):
    """An action outside the open positions, where the environment was told to raise."""


class IncompatibleDenoiserError(UnmaskError):
    """A denoiser that cannot serve the task: its vocabulary or length is another, or it fills no holes."""


class Denoised(NamedTuple):
    """One denoiser forward: ``log_probs`` (N, L, V) float32 at every position; ``hidden`` (N, L, D), where it gives
    some; ``exponents`` (N, L), where it has learned an order: the larger, the sooner a position is revealed.
    """

    log_probs: Tensor
    hidden: Tensor | None = None
    exponents: Tensor | None = None

    @classmethod
    def join(cls, outputs: Sequence[Denoised], how: Callable[[Sequence[Tensor]], Tensor]) -> Denoised:
        """One output of several: ``how`` (for example ``torch.cat``) of each of their parts."""
        return cls(*(None if part[0] is None else how(part) for part in zip(*outputs, strict=True)))


class Memory(NamedTuple):
    """What a rollout remembers of its episodes, for rules that look back; environments show none of it.

    ``steps`` (N,) int64 forwards before this one; ``chosen_with`` (N, L) the probability that each closed position's
    symbol had when it was chosen, 1 of given ones; ``previous`` (N, L, V) the last forward's log-probabilities, None
    before the second one; ``reopenings`` (N,) int64 how many the ``remask_budget`` leaves, None without one.
    """

    steps: Tensor
    chosen_with: Tensor
    previous: Tensor | None = None
    reopenings: Tensor | None = None


@dataclass(frozen=True)
class Observation:
    """All that an order may look at. The answers are not here.

    Attributes:
        tokens: (N, L) int64; V where a position is undecided.
        open: (N, L) bool, the positions that may be closed now: the undecided ones, or those of the current block.
        denoised: the denoiser's output for ``tokens``.
        reopenable: (N, L) bool, the positions that may be opened again; None where the rules have none.
        reopened: (N, L) int64, how often each position was opened again in this episode; None likewise.
        memory: of sets in rollouts.
    """

    tokens: Tensor
    open: Tensor
    denoised: Denoised
    reopenable: Tensor | None = None
    reopened: Tensor | None = None
    memory: Memory | None = None

    def __getitem__(self, rows: Tensor | slice) -> Observation:
        denoised = Denoised.join([self.denoised], lambda part: part[0][rows])
        reopenable, reopened = (None if part is None else part[rows] for part in (self.reopenable, self.reopened))
        memory = None
        if self.memory is not None:
            memory = Memory(*[None if part is None else part[rows] for part in self.memory])
        return Observation(self.tokens[rows], self.open[rows], denoised, reopenable, reopened, memory)

    @property
    def choices(self) -> Tensor:
        """(N, A) bool: the entries that an action may contain."""
        return self.open if self.reopenable is None else torch.cat([self.open, self.reopenable], 1)


@dataclass(frozen=True)
class State:
    """N boards in play.

    Attributes:
        tokens: (N, L) int64. open: (N, L) bool.
        instances: the problems, with their answers, that the rows came from.
        steps: (N,) int64, actions taken so far in the episode: its denoiser forwards (NFE).
        reopened: (N, L) int64, how often each position was opened again so far in the episode.
    """

    tokens: Tensor
    open: Tensor
    instances: Instances
    steps: Tensor
    reopened: Tensor


class Transition(NamedTuple):
    """Result of a step: ``reward`` (N,) float32; ``terminated``, ``truncated``, ``illegal`` (N,) bool."""

    state: State
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    illegal: Tensor


class Order(Protocol):
    """Anything that chooses one position at a time: reference policies and learned policies alike."""

    def log_prob(self, observation: Observation) -> Tensor:
        """(N, L) log-probabilities: they sum to one over the open positions and are -inf elsewhere."""
        ...


class SetOrder(Protocol):
    """Anything that chooses sets of positions."""

    def sample(self, observation: Observation, generator: torch.Generator | None) -> Tensor:
        """(N, A) bool: a set per row; without a generator the order's most likely choice."""
        ...

    def log_prob_of(self, observation: Observation, action: Tensor) -> Tensor:
        """(N,) log-probabilities of the sets ``action`` (N, A)."""
        ...


def begin(instances: Instances, mask_id: int) -> State:
    """The first state of each instance: its holes are open."""
    hole = instances.tokens == mask_id
    zeros = torch.zeros(len(instances), dtype=torch.long, device=hole.device)
    return State(instances.tokens, hole, instances, zeros, torch.zeros_like(instances.tokens))


def reset_rows(state: State, rows: Tensor, instances: Instances, mask_id: int) -> State:
    """``state`` with the rows ``rows`` (indices) begun anew from ``instances``; the other rows are untouched."""
    fresh = begin(instances, mask_id)

    def put(old: Tensor, new: Tensor) -> Tensor:
        out = old.clone()
        out[rows] = new
        return out

    return State(
        put(state.tokens, fresh.tokens),
        put(state.open, fresh.open),
        Instances(put(state.instances.tokens, instances.tokens), put(state.instances.answers, instances.answers)),
        put(state.steps, fresh.steps),
        put(state.reopened, fresh.reopened),
    )


def choices(task: Task, state: State, rules: Rules) -> tuple[Tensor, Tensor | None]:
    """(N, L) bool, the positions that may be closed now, and those that may be opened again, if the rules have such."""
    within = torch.ones_like(state.open)
    if rules.block_length is not None:
        index = torch.arange(task.length, device=state.open.device) - task.prompt_length
        block = index.clamp(min=0) // rules.block_length  # (L,)
        current = block.expand_as(state.open).masked_fill(~state.open, task.length).min(1, keepdim=True).values
        within = block == current
    open = state.open & within
    if rules.actions != "set+remask":
        return open, None
    may = torch.ones_like(open)
    if rules.remask_budget is not None:
        may = state.reopened.sum(1, keepdim=True) < rules.remask_budget
    # A finished board has no current block, and nothing to open again.
    undone = state.open.any(1, keepdim=True)
    return open, ~state.open & (state.instances.tokens == task.mask_id) & within & may & undone


def fill(log_probs: Tensor, temperature: float = 0.0, uniform: Tensor | None = None) -> Tensor:
    """(N, L) the symbol that each position becomes if it is chosen: the most likely one (the lowest where several tie)
    at temperature 0, else a sample of p^(1/temperature) by inversion of its distribution function.

    Args:
        log_probs: (N, L, V). uniform: (N, L) in [0, 1), needed above temperature 0.
    """
    if temperature == 0 or uniform is None:
        return log_probs.argmax(-1)
    cumulative = (log_probs / temperature).softmax(-1).cumsum(-1)
    # The total is 1 up to rounding; staying below it keeps symbols of probability 0 out.
    at = (uniform * (1 - 1e-6)).unsqueeze(-1) * cumulative[..., -1:]
    return (cumulative <= at).sum(-1).clamp(max=log_probs.shape[-1] - 1)


def step(
    task: Task,
    state: State,
    symbols: Tensor,
    action: Tensor,
    rules: Rules = SINGLE,
    confidence: Tensor | None = None,
) -> Transition:
    """Close the positions of ``action`` with their symbols, open again those that it says; reward complete rows.

    Rows that are already complete stay as they are.

    Args:
        symbols: (N, L) what each position would become, from :func:`fill`.
        action: (N,) int64 or (N, A) bool, see :class:`Rules`.
        confidence: (N, L), how sure the denoiser is of each position, in any monotone form; for sets alone.

    Raises:
        InvalidActionError: an illegal action under ``on_illegal="raise"``, or one of the wrong shape.
    """
    n, length = state.tokens.shape
    done_before = ~state.open.any(1)
    open, reopenable = choices(task, state, rules)
    reopen = torch.zeros_like(open)
    if rules.actions == "single":
        if action.shape != (n,) or action.dtype == torch.bool or action.is_floating_point():
            raise InvalidActionError(f"actions must be {n} integers, not {action.dtype} of shape {tuple(action.shape)}")
        in_range = (action >= 0) & (action < length)
        close = torch.zeros_like(open).scatter(1, action.clamp(0, length - 1).unsqueeze(1), True)
        legal = in_range & (close & open).any(1)
    else:
        entries = length if reopenable is None else 2 * length
        if action.shape != (n, entries) or confidence is None:
            raise InvalidActionError(f"actions must be sets of shape ({n}, {entries}), not {tuple(action.shape)}")
        action = action.bool()
        close = action[:, :length]
        legal = ~(close & ~open).any(1)
        surest = confidence.masked_fill(~open, -torch.inf).argmax(1, keepdim=True)
        nothing = ~close.any(1, keepdim=True)
        close = torch.where(nothing, torch.zeros_like(close).scatter(1, surest, True) & open, close)
        if reopenable is not None:
            reopen = action[:, length:]
            legal &= ~(reopen & ~reopenable).any(1)
            if rules.remask_budget is not None:
                legal &= state.reopened.sum(1) + reopen.sum(1) <= rules.remask_budget
    illegal = ~legal & ~done_before
    if rules.on_illegal == "raise" and bool(illegal.any()):
        raise InvalidActionError(_why_illegal(int(illegal.nonzero()[0]), action, open, reopenable, state, rules))
    acts = (legal & ~done_before).unsqueeze(1)
    close, reopen = close & acts, reopen & acts
    tokens = torch.where(close, symbols, state.tokens).masked_fill(reopen, task.mask_id)
    still_open = (state.open & ~close) | reopen
    steps = state.steps + (~done_before).long()

    complete = ~still_open.any(1) & ~done_before
    terminated = complete | (illegal if rules.on_illegal == "terminate" else torch.zeros_like(illegal))
    truncated = torch.zeros_like(terminated)
    if rules.nfe_budget is not None:
        truncated = (steps >= rules.nfe_budget) & ~terminated & ~done_before
    reward = torch.zeros(n, device=tokens.device)
    if bool(complete.any()):
        reward = torch.where(complete, task.reward(tokens, state.instances), reward)
        if rules.speed > 0:
            holes = (state.instances.tokens == task.mask_id).sum(1)
            reward = torch.where(complete, rules.shaped(reward, steps, holes), reward)
    following = State(tokens, still_open, state.instances, steps, state.reopened + reopen.long())
    return Transition(following, reward, terminated, truncated, illegal)


def _why_illegal(row: int, action: Tensor, open: Tensor, reopenable: Tensor | None, state: State, rules: Rules) -> str:
    """One line on why row ``row`` of ``action`` is illegal."""
    allowed = open[row].nonzero().flatten().tolist()
    if rules.actions == "single":
        return f"row {row}: position {int(action[row])} is not open; open are {allowed}"
    length = open.shape[1]
    wrong = (action[row, :length] & ~open[row]).nonzero().flatten().tolist()
    if wrong:
        return f"row {row}: positions {wrong} are not open; open are {allowed}"
    again = action[row, length:]
    wrong = [] if reopenable is None else (again & ~reopenable[row]).nonzero().flatten().tolist()
    if wrong:
        return f"row {row}: positions {wrong} cannot be opened again: given, not closed, or no budget left"
    left = (rules.remask_budget or 0) - int(state.reopened[row].sum())
    return f"row {row}: {int(again.sum())} positions to open again, where the budget leaves {left}"


def masked_log_softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """(N, L) log-probabilities over ``allowed``, -inf elsewhere; rows with nothing allowed are -inf throughout."""
    log_probs = scores.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    return log_probs.masked_fill(~allowed, -torch.inf)


def regularised_reward(reward: Tensor, log_prob: Tensor, log_reference: Tensor, beta: float) -> Tensor:
    """reward - beta * (log pi(a|s) - log g(a|s)): summed over an episode, its mean is J(pi) = E[r] - beta * KL.

    KL is the divergence between the paths of pi and g (the chain rule of KL). The policy gradient of this reward, taken
    as a constant, is exactly that of J, since E[grad log pi] = 0; so any on-policy method maximises J.

    Args:
        log_prob: log pi(a|s) of the distribution that the action was sampled from. log_reference: log g(a|s).
    """
    return reward - beta * (log_prob - log_reference)


def choose(log_prob: Tensor, generator: torch.Generator | None) -> Tensor:
    """(N,) positions sampled from (N, L) log-probabilities; the most likely one if ``generator`` is None.

    Rows without any open position (all -inf) give position 0, which a step ignores.
    """
    if generator is None:
        return log_prob.argmax(1)
    return (log_prob + gumbel(log_prob, generator)).argmax(1)


class Step(NamedTuple):
    """One recorded step of a rollout: the observation, the action taken, which rows were alive, log pi(action)."""

    observation: Observation
    action: Tensor
    alive: Tensor
    log_prob: Tensor


class Rollout(NamedTuple):
    """A finished batch of episodes: final ``state``, ``reward`` (N,), ``nfe`` (N,) forwards, recorded ``steps``."""

    state: State
    reward: Tensor
    nfe: Tensor
    steps: list[Step]


@torch.no_grad()
def rollout(
    task: Task,
    denoiser: Callable[[Tensor], Denoised],
    order: Order | SetOrder,
    instances: Instances,
    *,
    rules: Rules = SINGLE,
    order_generator: torch.Generator | None = None,
    temperature: float = 0.0,
    fill_generator: torch.Generator | None = None,
    record: bool = False,
) -> Rollout:
    """Fill every hole of ``instances``, one denoiser forward per step for all rows together.

    Rows that end earlier idle until the batch is done. Rows whose budget ran out keep their holes.

    Args:
        order: chooses positions, or sets where ``rules`` say so; an order that needs the answers (``with_answers``) is
            given them here.
        rules: without an ``nfe_budget``, episodes end after 2 L forwards.
        order_generator: sample from the order; without it the most likely position is taken, ties by lowest index.
        temperature, fill_generator: as in :func:`fill`; both or neither, greedy by default.
        record: keep the observations and actions (for training).
    """
    if (temperature > 0) != (fill_generator is not None):
        raise UnmaskError("sampled filling needs both a temperature above 0 and a fill_generator")
    if hasattr(order, "with_answers"):
        order = order.with_answers(task.all_answers(instances))
    rules = replace(rules, nfe_budget=rules.nfe_budget or 2 * task.length)
    state = begin(instances, task.mask_id)
    reward = torch.zeros(len(instances), device=state.tokens.device)
    steps: list[Step] = []
    memory = Memory(state.steps, torch.ones(state.tokens.shape, device=state.tokens.device))
    while bool(state.open.any()):
        open, reopenable = choices(task, state, rules)
        reopened = None if reopenable is None else state.reopened
        observation = Observation(state.tokens, open, denoiser(state.tokens), reopenable, reopened)
        if rules.actions == "single":
            log_prob = order.log_prob(observation)
            action = choose(log_prob, order_generator)
        else:
            if rules.remask_budget is not None:
                memory = memory._replace(reopenings=rules.remask_budget - state.reopened.sum(1))
            observation = replace(observation, memory=memory)
            action = order.sample(observation, order_generator)
        if record:
            single = rules.actions == "single"
            taken = log_prob.gather(1, action.unsqueeze(1))[:, 0] if single else order.log_prob_of(observation, action)
            steps.append(Step(observation, action, state.open.any(1), taken))
        uniform = None
        if fill_generator is not None:
            uniform = torch.rand(state.tokens.shape, generator=fill_generator, device=state.tokens.device)
        log_probs = observation.denoised.log_probs
        symbols = fill(log_probs, temperature, uniform)
        before = state.open
        state, gained, terminated, truncated, _ = step(task, state, symbols, action, rules, log_probs.max(-1).values)
        if rules.actions != "single":
            chance = log_probs.gather(-1, symbols.unsqueeze(-1)).squeeze(-1).exp()
            kept = memory.chosen_with.where(~(before & ~state.open), chance)
            memory = Memory(state.steps, kept, log_probs)
        state = replace(state, open=state.open & ~(terminated | truncated).unsqueeze(1))
        reward += gained
    return Rollout(state, reward, state.steps, steps)
