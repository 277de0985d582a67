"""Toys that tests share: small tasks, denoisers and policies, and short ways to observe, act and play."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unmask_env
from agents.critic import Critic, new_critic
from agents.policy import OrderPolicy
from pretrain.checkpoint import PACKAGED_DENOISERS, packaged
from tasks import Instances, Task
from tests.oracles.enumeration import TableTask, random_joint
from unmask_env import registration
from unmask_env.denoiser import Denoiser
from unmask_env.distributions import Bernoulli, Categorical, Distribution
from unmask_env.encoding import LOG_ZERO, encode
from unmask_env.process import Unmasking
from unmask_env.reference import Policy, SoftmaxConfidence
from unmask_env.state import SINGLE, Denoised, History, Observation, Rollout, Rules, State


def sweep(cases: Iterable[Any], checked: Callable[..., bool], id: Callable[[Any], str] | None = None) -> list[Any]:
    """Parameters that ``make test`` tries all; ``make check`` those for which ``checked`` holds. Cases of several
    parameters are tuples."""
    out = []
    for case in cases:
        values = case if type(case) is tuple else (case,)
        marks = () if checked(*values) else pytest.mark.slow
        out.append(pytest.param(*values, id=None if id is None else id(case), marks=marks))
    return out


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def observation(
    tokens: Tensor,
    fillable: Tensor,
    denoised: Denoised,
    remaskable: Tensor | None = None,
    remask_count: Tensor | None = None,
    history: History | None = None,
) -> Observation:
    """An observation whose masks are where ``tokens`` say."""
    return Observation(tokens, tokens == denoised.vocab_size, fillable, denoised, remaskable, remask_count, history)


def one_of(positions: list[int] | Tensor, length: int) -> Tensor:
    """(N, L) bool actions of single positions."""
    return torch.nn.functional.one_hot(torch.as_tensor(positions), length).bool()


def rollout(
    task: Task,
    denoiser: Denoiser,
    policy: Policy,
    instances: Instances,
    *,
    rules: Rules = SINGLE,
    generator: torch.Generator | None = None,
    temperature: float = 0.0,
    fill_generator: torch.Generator | None = None,
    record: bool = False,
) -> Rollout:
    process = Unmasking(task, denoiser, rules, temperature)
    return process.rollout(policy, instances, generator, fill_generator, record)


class FavouriteDenoiser:
    """Says at every position of row i which symbol it prefers, and how much: the same whatever the board.

    Args:
        symbols: (N, L) int64. log_probs: (N, L) of those symbols; the others share the rest.
    """

    hidden_dim: int | None = None
    device = torch.device("cpu")

    def __init__(self, symbols: Tensor, log_probs: Tensor, vocab_size: int) -> None:
        rest = (1 - log_probs.exp()) / (vocab_size - 1)
        table = rest.unsqueeze(-1).expand(*symbols.shape, vocab_size)
        self.log_probs = table.scatter(-1, symbols.unsqueeze(-1), log_probs.exp().unsqueeze(-1)).log()
        self.calls = 0

    def __call__(self, tokens: Tensor, where: Tensor | None = None) -> Denoised:
        self.calls += 1
        return Denoised.of(self.log_probs[: len(tokens)])


def stepped(process: Unmasking, state: State, action: Tensor, uniform: Tensor | None = None) -> tuple[State, Tensor]:
    """One step with a forward of its own."""
    return process.step(state, process.observe(state), action, uniform)


class PositionPolicy(Policy):
    """Single positions from a function of observations: (N, L) log-probabilities."""

    def __init__(self, log_probs: Callable[[Observation], Tensor]) -> None:
        self.log_probs = log_probs

    def __call__(self, seen: Observation) -> Distribution:
        return Categorical(self.log_probs(seen))


class FixedSets(Policy):
    """Always the same sets (N, A) bool."""

    actions = "set"

    def __init__(self, action: Tensor, actions: str = "set") -> None:
        self.action, self.actions = action, actions

    def __call__(self, seen: Observation) -> Distribution:
        sure = torch.zeros(self.action.shape).masked_fill(~self.action, -torch.inf)
        return Bernoulli(sure, seen.action_mask)


def codes(tokens: Tensor, base: int) -> Tensor:
    return (tokens * base ** torch.arange(tokens.shape[1])).sum(1)


class WrongDenoiser:
    """Random distributions per board, consistent with no joint, so that the order decides what is written."""

    hidden_dim, device, calls = None, torch.device("cpu"), 0

    def __init__(self, vocab_size: int, length: int, seed: int) -> None:
        self.base, generator = vocab_size + 1, torch.Generator().manual_seed(seed)
        shape = (self.base**length, length, vocab_size)
        self.table = (1.5 * torch.randn(shape, generator=generator)).log_softmax(-1)

    def __call__(self, tokens: Tensor) -> Denoised:
        return Denoised.of(self.table[codes(tokens, self.base)])


class RewardTask(TableTask):
    """A random reward per complete sequence, whatever the answer."""

    def __init__(self, vocab_size: int, length: int, seed: int = 0) -> None:
        super().__init__(random_joint(vocab_size, length, seed))
        self.rewards = torch.rand((vocab_size,) * length, generator=torch.Generator().manual_seed(seed))

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return self.rewards[tuple(tokens.T)]


IDS = [id for id in unmask_env.ids() if id.startswith("Unmask/")]


def legal(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One open position per row of (N, L), 0 where there is none."""
    return np.array([rng.choice(np.flatnonzero(row)) if row.any() else 0 for row in mask])


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Two observations are equal; log-probabilities up to float32 rounding between batch sizes."""
    assert a.keys() == b.keys()
    for name in a.keys() & {"tokens", "masked", "action_mask", "remaskable", "remask_count"}:
        np.testing.assert_array_equal(a[name], b[name])
    for name in ("top_log_probs", "entropy"):
        np.testing.assert_allclose(a[name], b[name], atol=1e-4)
    # A softmax reference divides differences of probabilities by its small temperature.
    np.testing.assert_array_equal(a["log_reference"] == LOG_ZERO, b["log_reference"] == LOG_ZERO)
    np.testing.assert_allclose(a["log_reference"], b["log_reference"], atol=1e-3)
    # Symbols whose probabilities all but tie may swap places.
    gaps = np.abs(np.diff(a["top_log_probs"], axis=-1)) > 1e-3
    edge = np.ones((*gaps.shape[:-1], 1), dtype=bool)
    clear = np.concatenate([edge, gaps], -1) & np.concatenate([gaps, edge], -1)
    np.testing.assert_array_equal(a["top_symbols"][clear], b["top_symbols"][clear])


def packaged_denoiser(id: str) -> str:
    """The denoiser that ``id`` was registered with, or its small version where only that is packaged."""
    denoiser = registration.lookup(id).denoiser
    if isinstance(denoiser, str) and denoiser not in packaged(PACKAGED_DENOISERS):
        denoiser = f"{denoiser}-tiny"
        if denoiser not in packaged(PACKAGED_DENOISERS):
            pytest.skip(f"no packaged denoiser for {id}")
    return denoiser


def shown(observation: Observation, order=None) -> dict[str, torch.Tensor]:
    return encode(observation, (order or SoftmaxConfidence())(observation).entry_log_probs())


def torchrun(*program: str) -> subprocess.CompletedProcess[str]:
    """A script, or ``-m`` and a module, in two processes on the CPU."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*launcher, *rendezvous, *program], env=env, capture_output=True, text=True, timeout=240)


# ---------------------------------------------------------------------- three positions whose order decides
JOINT = random_joint(3, 3, seed=23)
SEQUENCE_REWARD = torch.rand((3, 3, 3), generator=torch.Generator().manual_seed(1))


class FreePolicy(nn.Module, Policy):
    """One free logit per (board, position), any order policy of V symbols and L positions."""

    def __init__(self, vocab_size: int, length: int, seed: int | None = None) -> None:
        super().__init__()
        self.base = vocab_size + 1
        shape = (self.base**length, length)
        generator = torch.Generator().manual_seed(seed or 0)
        logits = torch.zeros(shape) if seed is None else torch.randn(shape, generator=generator)
        self.table = nn.Parameter(logits)

    def forward(self, observation: Observation) -> Categorical:
        powers = self.base ** torch.arange(observation.tokens.shape[1])
        return Categorical.of(self.table[(observation.tokens * powers).sum(1)], observation.fillable)


# ---------------------------------------------------------------------- networks far from where they start
def random_critic(task: Task) -> Critic:
    critic = new_critic(task, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for parameter in critic.parameters():
            nn.init.normal_(parameter, std=0.5)
    return critic


def random_order(task: Task, candidates: int | None = None, defer_above: float = 0.9) -> OrderPolicy:
    """Far from its base, and boards of both kinds: where the denoiser is sure and where it is not."""
    torch.manual_seed(6)
    shape = {"dim": 8, "layers": 1, "heads": 2, "state_head": True, "belief_weight": 2.0, "defer_above": defer_above}
    order = OrderPolicy(task.vocab_size, task.coordinates.tolist(), "softmax_confidence", 0.3, candidates, **shape)
    nn.init.normal_(order.head.feature_head.weight)
    nn.init.normal_(order.head.state_head.weight)
    return order
