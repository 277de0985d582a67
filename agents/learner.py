"""What the learners of an order share: settings that mean the same everywhere, and the start of a run.

The settings of the learners that rest on an RL library are here too, so that the command line need not import one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents.policy import Base, OrderPolicy, PolicyShape, load_policy, new_policy
from pretrain.run import require_at_least, require_seed, resolve_device
from tasks import Instances, Task, UnmaskError
from unmask_env import parallel, registration
from unmask_env import reference as references
from unmask_env.boards import default_reference
from unmask_env.core import SINGLE, Rules
from unmask_env.denoiser import Denoiser
from unmask_env.parallel import SetReference
from unmask_env.reference import Reference, require_full_support

ReferenceName = Literal[
    "random",
    "left_to_right",
    "max_confidence",
    "margin",
    "entropy",
    "softmax_confidence",
    "softmax_margin",
    "top_k",
    "learned",
    "soft_threshold",
    "threshold",
    "fixed_k",
    "factor",
    "entropy_bounded",
]
WARMUP = 5  # iterations over which the learning rate rises


@dataclass(frozen=True)
class LearnerConfig:
    """Settings that all learners share."""

    out: str
    """folder for the policy, the logs and the state to resume from"""
    env: str = "Unmask/Sudoku6x6-v0"
    denoiser: str | None = None
    """packaged name, folder or hub id; the default is the environment's"""
    reference: ReferenceName | None = None
    """the order to stay near, and to start from; ``learned``, the denoiser's own, is for upo. The default is
    softmax_confidence, and soft_threshold for sets"""
    beta: float = 1e-4
    """weight of the divergence from the reference (UPO's value); 0 switches it off"""
    tau: float = 0.05
    """temperature of the softmax references (UPO's value)"""
    top_k: int = 5
    """positions that the top_k reference, and then the policy, choose among (UPO's value)"""
    init: str | None = None
    """an order policy to start from; the default starts at the reference (at its softmax, or uniform, where it is
    deterministic). With it, ``shape`` and the temperature of the start are the loaded policy's"""
    rules: Rules = SINGLE
    """whether actions are single positions or sets, and what forwards cost"""
    fill_temperature: float = 0.0
    """0 fills greedily, as UPO's released code does; 1 samples the denoiser's distribution"""
    iterations: int = 100
    """rounds of sampling and updating; the first five warm the learning rate up"""
    epochs: int = 2
    """passes over each iteration's trajectories"""
    minibatches: int = 4
    clip: float = 0.2
    """of the probability ratios (UPO's is 0.5)"""
    lr: float | None = None
    """the default is 3e-5 with ``init``, where ten times more undoes what imitation learned, and 1e-3 without"""
    anneal: bool = False
    """let the learning rate fall linearly to 0 over the run"""
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    normalise: bool = False
    """divide advantages by their standard deviation (of the group, or for PPO of the minibatch). The reward is then in
    units of that deviation, and beta weighs against it"""
    shape: PolicyShape = field(default_factory=PolicyShape)
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    resume: bool = False
    """go on from the state in ``out``"""
    save_every: int = 10

    def learning_rate(self, iteration: int) -> float:
        """Of iteration 0, 1, ...: five to warm up, then constant or falling linearly to 0."""
        decay = 1.0 - iteration / self.iterations if self.anneal else 1.0
        return (self.lr or 0.0) * decay * min(1.0, (iteration + 1) / WARMUP)


@dataclass(frozen=True)
class PPOConfig(LearnerConfig):
    """Settings that the PPOs of both libraries share."""

    boards: int = 64
    """boards side by side"""
    steps: int | None = None
    """steps of each board per iteration; the default is the task's length, so that whole episodes fit"""
    gae_lambda: float = 0.95
    critic_weight: float = 0.5
    """of the value loss"""


@dataclass(frozen=True)
class SB3PPOConfig(PPOConfig):
    """PPO by stable-baselines3 (MaskablePPO), on KL-regularised rewards."""


@dataclass(frozen=True)
class TorchRLPPOConfig(PPOConfig):
    """PPO by TorchRL, on KL-regularised rewards."""


@dataclass(frozen=True)
class TorchRLGRPOConfig(LearnerConfig):
    """PPO by TorchRL without a critic: advantages are relative to the other boards of a group."""

    puzzles: int = 32
    """groups side by side"""
    group: int = 8
    """boards per group: they play the same instances"""
    steps: int | None = None
    """steps of each board per iteration; the default is the task's length. Episodes it cuts off teach nothing"""


class Prepared(NamedTuple):
    """A run's parts; ``config`` has its learning rate filled in."""

    config: LearnerConfig
    task: Task
    denoiser: Denoiser
    reference: Reference | SetReference
    policy: OrderPolicy
    device: torch.device


def prepare(config: LearnerConfig, task: Task | None, denoiser: Denoiser | None) -> Prepared:
    """Check ``config`` and make what it names.

    Args:
        task, denoiser: used instead of looking ``config.env`` and ``config.denoiser`` up.

    Raises:
        UnmaskError: names, sizes or settings that do not fit, before any long work starts.
    """
    device = resolve_device(config.device, config.threads)
    require_at_least(
        1,
        iterations=config.iterations,
        epochs=config.epochs,
        minibatches=config.minibatches,
        save_every=config.save_every,
    )
    require_at_least(
        0,
        beta=config.beta,
        lr=config.lr or 0.0,
        grad_clip=config.grad_clip,
        weight_decay=config.weight_decay,
        fill_temperature=config.fill_temperature,
    )
    if not 0 <= config.clip < 1:
        raise UnmaskError(f"clip must be at least 0 and below 1, not {config.clip}")
    if not math.isfinite((config.lr or 0.0) + config.beta):
        raise UnmaskError(f"lr and beta must be finite, not {config.lr} and {config.beta}")
    require_seed(config.seed)
    task, denoiser = registration.given_or_resolved(task, denoiser, config.env, config.denoiser, device)
    if config.lr is None:
        config = replace(config, lr=1e-3 if config.init is None else 3e-5)
    config = replace(config, reference=config.reference or default_reference(config.rules))
    reference = make_reference(config)
    if config.reference == "learned":
        references.require_learned(denoiser, task)
    return Prepared(config, task, denoiser, reference, start(config, task, denoiser).to(device), device)


def prepare_on_policy(
    config: LearnerConfig, boards: int, steps: int | None, task: Task | None, denoiser: Denoiser | None
) -> tuple[Prepared, int]:
    """:func:`prepare` for learners that play in an environment, and the number of steps per iteration.

    Raises:
        UnmaskError: as there; a KL to a deterministic reference; a policy that sees hidden states, which environments
            do not show; boards and steps that do not make ``minibatches`` equal parts.
    """
    require_at_least(1, boards=boards, steps=1 if steps is None else steps)
    if isinstance(config, PPOConfig):
        require_at_least(0, critic_weight=config.critic_weight)
        if not 0 <= config.gae_lambda <= 1:
            raise UnmaskError(f"gae_lambda must be between 0 and 1, not {config.gae_lambda}")
    ready = prepare(config, task, denoiser)
    steps = ready.task.length if steps is None else steps
    if config.beta > 0:
        require_full_support(ready.reference)
    if ready.policy.hidden is not None:
        raise UnmaskError(
            "this policy sees the denoiser's hidden states, which environments do not show; train it with upo, or use "
            "one without (--no-hidden)"
        )
    if isinstance(ready.policy.base, references.Learned):
        raise UnmaskError(
            "this policy starts at the order that the denoiser learned, which environments do not show; train it with "
            "upo, or start from another --init"
        )
    if ready.policy.sets == "plackett_luce":
        raise UnmaskError("the libraries' PPO know no Plackett-Luce sets; train them with upo, or take --law bernoulli")
    if boards * steps % config.minibatches:
        raise UnmaskError(f"{boards} boards x {steps} steps do not divide into {config.minibatches} minibatches")
    if config.normalise and boards * steps < 2 * config.minibatches:
        raise UnmaskError("normalise needs minibatches of 2 steps or more: one advantage has no standard deviation")
    return ready, steps


def require_groups(puzzles: int, group: int) -> None:
    """Raises :class:`tasks.UnmaskError` for groups that leave nothing to compare."""
    require_at_least(1, puzzles=puzzles)
    if group < 2:
        raise UnmaskError(f"group must be at least 2 to compare trajectories, not {group}")


def of_finished(done: Tensor) -> Tensor:
    """(N, T) bool: steps of episodes that end within the batch; ``done`` (N, T)."""
    return done.flip(1).cummax(1).values.flip(1)


def per_episode(reward: Tensor, done: Tensor, log_ratio: Tensor | None) -> dict[str, float]:
    """To log, per finished episode: the task's reward, and the sampled KL to the reference.

    Args:
        reward, done: (N, T). log_ratio: (N, T) log pi(a|s) - log g(a|s), or None where nothing is regularised.
    """
    episodes = max(1, int(done.sum()))
    scalars = {"reward": float(reward.sum()) / episodes}
    if log_ratio is not None:
        scalars["divergence/trajectory_kl"] = float(log_ratio[of_finished(done)].sum()) / episodes
    return scalars


def look_ahead(task: Task) -> Instances:
    """A few training instances, to see before a run whether its settings fit the task."""
    return task.sample(64, torch.Generator().manual_seed(0))


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[int]:
    """Torch's and numpy's global streams, which the RL libraries sample from, seeded by a draw from ``generator``.

    Hands out that seed, and puts the streams back afterwards.
    """
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    state = np.random.get_state()
    with torch.random.fork_rng(devices=[generator.device] if generator.device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield seed
        finally:
            np.random.set_state(state)


def make_reference(config: LearnerConfig) -> Reference | SetReference:
    """The reference policy that ``config`` names, with its temperature or size."""
    name = config.reference or default_reference(config.rules)
    if config.rules.actions != "single":
        return parallel.get(name)
    options: dict[str, float] = {}
    if name.startswith("softmax"):
        options["tau"] = config.tau
    if name == "top_k":
        options["k"] = config.top_k
    return references.get(name, **options)


def start(config: LearnerConfig, task: Task, denoiser: Denoiser) -> OrderPolicy:
    """``config.init``, or a policy that equals the reference: its softmax for max_confidence and margin, the uniform
    order for entropy and left_to_right, which have no softmax form here; over sets the soft threshold."""
    if config.init is not None:
        return load_policy(config.init, task, denoiser, config.rules.actions)
    if config.rules.actions != "single":
        return new_policy(config.shape, task, denoiser, config.seed, "soft_threshold", sets=True)
    base: Base = "none"
    name = config.reference or default_reference(config.rules)
    if name in ("max_confidence", "softmax_confidence"):
        base = "softmax_confidence"
    elif name in ("margin", "softmax_margin"):
        base = "softmax_margin"
    elif name == "learned":
        base = "learned"
    candidates = config.top_k if name == "top_k" else None
    # These references do not prefer sure positions, so a policy that starts as one of them reads every board.
    shape = replace(config.shape, sure=2.0) if base in ("none", "learned") else config.shape
    return new_policy(shape, task, denoiser, config.seed, base, config.tau, candidates)
