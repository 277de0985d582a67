"""The Markov decision process, in torch alone: states, observations, transitions, rollouts.

Time runs from the instance with holes to the complete sequence. In a state, ``open`` marks the undecided positions.
An action names one open position; the frozen denoiser fills it; a finished sequence is rewarded. Nothing here knows
Gymnasium, tensordict or which heuristic or network chooses.

Shapes: N rows (independent boards), L positions, V symbols, D hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from pretrain.processes import gumbel
from tasks import Instances, Task, UnmaskError

OnIllegal = Literal["noop", "terminate", "raise"]


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


@dataclass(frozen=True)
class Observation:
    """All that an order may look at. The answers are not here.

    Attributes:
        tokens: (N, L) int64.
        open: (N, L) bool, the positions that may be chosen.
        denoised: the denoiser's output for ``tokens``.
    """

    tokens: Tensor
    open: Tensor
    denoised: Denoised

    def __getitem__(self, rows: Tensor | slice) -> Observation:
        denoised = Denoised.join([self.denoised], lambda part: part[0][rows])
        return Observation(self.tokens[rows], self.open[rows], denoised)


@dataclass(frozen=True)
class State:
    """N boards in play.

    Attributes:
        tokens: (N, L) int64. open: (N, L) bool.
        instances: the problems, with their answers, that the rows came from.
        steps: (N,) int64, actions taken so far in the episode.
    """

    tokens: Tensor
    open: Tensor
    instances: Instances
    steps: Tensor


class Transition(NamedTuple):
    """Result of a step: ``reward`` (N,) float32; ``terminated``, ``truncated``, ``illegal`` (N,) bool."""

    state: State
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    illegal: Tensor


class Order(Protocol):
    """Anything that chooses positions: reference policies and learned policies alike."""

    def log_prob(self, observation: Observation) -> Tensor:
        """(N, L) log-probabilities: they sum to one over the open positions and are -inf elsewhere."""
        ...


def begin(instances: Instances, mask_id: int) -> State:
    """The first state of each instance: its holes are open."""
    n = len(instances)
    hole = instances.tokens == mask_id
    return State(instances.tokens, hole, instances, torch.zeros(n, dtype=torch.long, device=hole.device))


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
    )


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
    *,
    on_illegal: OnIllegal = "noop",
    max_steps: int | None = None,
) -> Transition:
    """Fill position ``action[i]`` of row i with its symbol; reward rows that became complete.

    An illegal action (a closed position, or out of range) changes nothing and counts as a step (``noop``), ends the
    episode with reward 0 (``terminate``), or raises. Rows that are already complete stay as they are.

    Args:
        symbols: (N, L) what each position would become, from :func:`fill`.
        action: (N,) int64 positions.
        max_steps: truncate episodes that are still open after this many actions.

    Raises:
        InvalidActionError: an illegal action under ``on_illegal="raise"``.
    """
    n, length = state.tokens.shape
    done_before = ~state.open.any(1)
    in_range = (action >= 0) & (action < length)
    position = action.clamp(0, length - 1).unsqueeze(1)  # (N, 1)
    legal = in_range & state.open.gather(1, position).squeeze(1)
    illegal = ~legal & ~done_before
    if on_illegal == "raise" and bool(illegal.any()):
        row = int(illegal.nonzero()[0])
        choices = state.open[row].nonzero().flatten().tolist()
        raise InvalidActionError(f"row {row}: position {int(action[row])} is not open; open are {choices}")
    chosen = torch.zeros_like(state.open).scatter(1, position, legal.unsqueeze(1))
    tokens = torch.where(chosen, symbols, state.tokens)
    still_open = state.open & ~chosen
    steps = state.steps + (~done_before).long()

    complete = ~still_open.any(1) & ~done_before
    terminated = complete | (illegal if on_illegal == "terminate" else torch.zeros_like(illegal))
    truncated = torch.zeros_like(terminated) if max_steps is None else (steps >= max_steps) & ~terminated & ~done_before
    reward = torch.zeros(n, device=tokens.device)
    if bool(complete.any()):
        reward = torch.where(complete, task.reward(tokens, state.instances), reward)
    return Transition(State(tokens, still_open, state.instances, steps), reward, terminated, truncated, illegal)


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
    """One recorded step of a rollout: the observation, where it acted, which rows were alive, log pi(action)."""

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
    order: Order,
    instances: Instances,
    *,
    order_generator: torch.Generator | None = None,
    temperature: float = 0.0,
    fill_generator: torch.Generator | None = None,
    record: bool = False,
) -> Rollout:
    """Fill every hole of ``instances``, one denoiser forward per step for all rows together.

    Rows with fewer holes finish earlier and idle until the batch is done.

    Args:
        order: chooses positions; an order that needs the answers (``with_answers``) is given them here.
        order_generator: sample positions from the order; without it the most likely position is taken, ties by
            lowest index.
        temperature, fill_generator: as in :func:`fill`; both or neither, greedy by default.
        record: keep the observations and actions (for training).
    """
    if (temperature > 0) != (fill_generator is not None):
        raise UnmaskError("sampled filling needs both a temperature above 0 and a fill_generator")
    if hasattr(order, "with_answers"):
        order = order.with_answers(instances.answers)
    state = begin(instances, task.mask_id)
    reward = torch.zeros(len(instances), device=state.tokens.device)
    steps: list[Step] = []
    for _ in range(int(state.open.sum(1).max())):
        observation = Observation(state.tokens, state.open, denoiser(state.tokens))
        log_prob = order.log_prob(observation)
        action = choose(log_prob, order_generator)
        if record:
            taken = log_prob.gather(1, action.unsqueeze(1)).squeeze(1)
            steps.append(Step(observation, action, state.open.any(1), taken))
        uniform = None
        if fill_generator is not None:
            uniform = torch.rand(state.tokens.shape, generator=fill_generator, device=state.tokens.device)
        symbols = fill(observation.denoised.log_probs, temperature, uniform)
        state, gained, *_ = step(task, state, symbols, action)
        reward += gained
    return Rollout(state, reward, state.steps, steps)
