"""What the learners of an order policy share: settings that mean the same everywhere, and the start of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from agents.policy import Base, OrderPolicy, PolicyConfig, load_policy, new_policy
from agents.remask_policy import RemaskPolicy
from pretrain import processes
from pretrain.run import decayed_groups, resolve_device
from tasks import Instances, Task, UnmaskError
from tasks.settings import (
    AtLeast0,
    AtLeast1,
    NotNegative,
    Positive,
    Seed,
    Share,
    ShareBelow1,
    Temperature,
    Threads,
    validate,
)
from unmask_env import make_process
from unmask_env.process import Unmasking
from unmask_env.reference import Learned, Reference, default_reference, reference, require_full_support, require_learned
from unmask_env.state import SINGLE, Rules

WARMUP = 5  # iterations over which the learning rate rises


@dataclass(frozen=True)
class TrainConfig:
    """Settings that everything that trains an order policy shares."""

    out: str
    """folder for the policy, the logs and the state to resume from"""
    env: str = "Unmask/Sudoku6x6-v0"
    """an environment's id, or a task with its options; a task of your own as file.py:Class or package.module:Class;
    --task means the same"""
    denoiser: str | None = None
    """packaged name, folder or hub id; default: the environment's"""
    init: str | None = None
    """an order policy to start from, in place of ``policy``"""
    rules: Rules = SINGLE
    """whether actions are single positions or sets, and what forwards cost"""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    weight_decay: NotNegative = 0.0
    grad_clip: Positive = 1.0
    seed: Seed = 0
    device: str = "cpu"
    threads: Threads | None = None
    forward_batch: AtLeast1 | None = None
    """the most boards per forward of the denoiser, which bounds its memory; default: all that play"""
    resume: Literal["never", "must", "auto"] = "never"
    """auto: go on from the state in ``out`` if there is one; must: there has to be one"""
    save_every: AtLeast1 = 10
    validate_every: AtLeast0 = 10
    """iterations (imitation and policy iteration: steps of the optimiser) between two looks at validation instances,
    and one at the end; 0: none"""
    validation_puzzles: AtLeast1 = 200
    """instances of each look, played greedily"""
    wandb: str | None = None
    """a project of Weights & Biases to log to, too (the extra wandb)"""


@dataclass(frozen=True)
class RLConfig(TrainConfig):
    """Settings that the reinforcement learners share."""

    reference: str | None = None
    """the reference policy to stay near, and to start from, with its options: softmax_confidence:tau=0.05, top_k:k=5
    (the policy, too, then chooses among the k), ``learned``, the denoiser's own. Default: softmax_confidence, and
    soft_threshold for sets"""
    beta: NotNegative = 1e-4
    """weight of the divergence from the reference (UPO's value); 0 switches it off"""
    fill_temperature: Temperature | None = None
    """0 fills greedily, as UPO's released code does; 1 samples the denoiser's distribution; default: the task's"""
    iterations: AtLeast1 = 100
    """rounds of sampling and updating; the first five warm the learning rate up"""
    epochs: AtLeast1 = 2
    """passes over each iteration's trajectories"""
    minibatches: AtLeast1 = 4
    clip: ShareBelow1 = 0.2
    """of the probability ratios (UPO's is 0.5)"""
    lr: NotNegative | None = None
    """default: 1e-3; 3e-5 with ``init`` (larger rates undo imitation)"""
    anneal: bool = False
    """let the learning rate fall linearly to 0 over the run"""
    normalise: bool = False
    """divide advantages by their standard deviation (of the group, or for PPO of the minibatch). The reward is then in
    units of that deviation, and beta weighs against it"""

    def learning_rate(self, iteration: int) -> float:
        """Of iteration 0, 1, ...: five to warm up, then constant or falling linearly to 0."""
        decay = 1.0 - iteration / self.iterations if self.anneal else 1.0
        return (self.lr or 0.0) * decay * min(1.0, (iteration + 1) / WARMUP)


@dataclass(frozen=True)
class PPOConfig(RLConfig):
    """Settings that the PPOs of both libraries share."""

    num_envs: AtLeast1 = 64
    """boards side by side"""
    steps: AtLeast1 | None = None
    """steps of each board per iteration; default: the task's length, so that whole episodes fit"""
    gae_lambda: Share = 0.95
    critic_weight: NotNegative = 0.5
    """of the value loss"""


class Setup(NamedTuple):
    """The parts of a run; ``config`` has its learning rate and reference filled in."""

    config: RLConfig
    process: Unmasking
    reference: Reference
    policy: OrderPolicy | RemaskPolicy

    @property
    def device(self) -> torch.device:
        """Where the denoiser and the policy are."""
        return self.process.device

    @property
    def environment(self) -> dict[str, Any]:
        """The arguments that the environments of all libraries share; they show what the policy reads."""
        process, policy = self.process, self.policy
        base = getattr(policy.head, "base", None) if isinstance(policy, OrderPolicy) else None
        return {
            "task": process.task,
            "denoiser": process.denoiser,
            "reference": self.reference,
            "temperature": process.temperature,
            "device": str(self.device),
            "show": ("hidden",) * policy.reads_hidden + ("order_weights",) * isinstance(base, Learned),
        } | vars(self.config.rules)


def process_of(config: TrainConfig, process: Unmasking | None, temperature: float | None = None) -> Unmasking:
    """The decision process that ``config`` names, or the task and denoiser of ``process`` under its rules. Where
    ``torchrun`` has started several processes, this one joins them."""
    device = resolve_device(config.device, config.threads)
    device = processes.join(device if process is None else process.device)
    if process is not None:
        return Unmasking(process.task, process.denoiser, config.rules, temperature, config.forward_batch)
    more = {"temperature": temperature, "device": device, "forward_batch": config.forward_batch}
    return make_process(config.env, config.denoiser, **more, **vars(config.rules))


def setup(
    config: RLConfig,
    process: Unmasking | None = None,
    make: Callable[[TrainConfig, Unmasking], OrderPolicy | RemaskPolicy] | None = None,
    **start: Any,
) -> Setup:
    """Check ``config`` and make what it names.

    Args:
        make: makes the policy; default: ``config.init``, or one that equals the reference.
        start: more arguments of :func:`agents.policy.new_policy`, for policies of single positions. Without a
            ``belief_weight`` these equal their reference.
        process: its task and denoiser are used instead of looking ``config.env`` and ``config.denoiser`` up.

    Raises:
        UnmaskError: names, sizes or settings that do not fit, before any long work starts.
    """
    validate(config)
    process = process_of(config, process, config.fill_temperature)
    name = config.reference or default_reference(config.rules.actions)
    g = reference(name)
    if g.sees_answers or (g.actions == "single") != (config.rules.actions == "single"):
        suited = default_reference(config.rules.actions)
        raise UnmaskError(f"{name} is no reference for actions {config.rules.actions!r}; take {suited}, for example")
    if isinstance(g, Learned):
        require_learned(process)
    lr = config.lr if config.lr is not None else 1e-3 if config.init is None else 3e-5
    config = replace(config, lr=lr, reference=name, fill_temperature=process.temperature)
    policy = _start(config, g, process, **start) if make is None else make(config, process)
    return Setup(config, process, g, policy.to(process.device))


def require_masks(rules: Rules) -> None:
    """Raises :class:`tasks.UnmaskError` where the rules are those of a canvas."""
    if rules.actions == "accept":
        raise UnmaskError("this algorithm is for masks; policies of actions 'accept' are trained with upo")


def load_init(config: TrainConfig, process: Unmasking) -> OrderPolicy | RemaskPolicy:
    """The policy ``config.init``. Raises :class:`tasks.UnmaskError` if it chooses other actions than the rules have, or
    its values were shrunk to 0, so that nothing could change it."""
    policy = load_policy(config.init, process.task, process.denoiser)
    if isinstance(policy, OrderPolicy) and policy.values_are_zero:
        raise UnmaskError(f"order policy {config.init} has values of 0: it is its reference; leave --init out")
    if (policy.actions == "single") != (config.rules.actions == "single"):
        raise UnmaskError(f"order policy {config.init} is for actions {policy.actions!r}, not {config.rules.actions!r}")
    return policy


def _start(config: RLConfig, g: Reference, process: Unmasking, **start: Any) -> OrderPolicy | RemaskPolicy:
    """``config.init``, or a policy that equals the reference: its softmax for max_confidence and margin, the uniform
    order for entropy and left_to_right, which have no softmax form here; over sets the soft threshold."""
    if config.init is not None:
        return load_init(config, process)
    arguments = (process.task, process.denoiser, config.seed)
    if config.rules.actions != "single":
        return new_policy(config.policy, *arguments, base="soft_threshold", sets=True)
    softmax = {"max_confidence": "softmax_confidence", "margin": "softmax_margin"}.get(g.name, g.name)
    base: Base = softmax if softmax in ("softmax_confidence", "softmax_margin", "learned") else "none"
    # Some references do not prefer confident positions, so a policy that starts as one of them reads every board.
    shape = replace(config.policy, defer_above=2.0) if base in ("none", "learned") else config.policy
    return new_policy(shape, *arguments, base, getattr(g, "tau", 0.05), getattr(g, "k", None), **start)


def setup_on_policy(config: RLConfig, process: Unmasking | None) -> tuple[Setup, int]:
    """:func:`setup` for learners that play in an environment, and the number of steps per iteration.

    Raises:
        UnmaskError: as there; a KL to a deterministic reference; boards and steps that do not make ``minibatches``
            equal parts.
    """
    processes.require_one("the libraries' PPO")
    ready = setup(config, process)
    policy, num_envs = ready.policy, config.num_envs
    steps = ready.process.task.length if config.steps is None else config.steps
    if config.beta > 0:
        require_full_support(ready.reference)
    if isinstance(policy, OrderPolicy) and policy.config.distribution == "plackett_luce":
        raise UnmaskError("the libraries' PPO know no Plackett-Luce sets; train them with upo, or take bernoulli")
    if num_envs * steps % config.minibatches:
        raise UnmaskError(f"{num_envs} boards x {steps} steps do not divide into {config.minibatches} minibatches")
    if config.normalise and num_envs * steps < 2 * config.minibatches:
        raise UnmaskError("normalise needs minibatches of 2 steps or more: one advantage has no standard deviation")
    return ready, steps


def episode_ends_within(done: Tensor) -> Tensor:
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
        scalars["divergence/trajectory_kl"] = float(log_ratio[episode_ends_within(done)].sum()) / episodes
    return scalars


def look_ahead(task: Task) -> Instances:
    """A few training instances, to see before a run whether its settings fit the task."""
    return task.sample(64, torch.Generator().manual_seed(0))


def make_optimizer(config: TrainConfig, *models: nn.Module) -> torch.optim.Optimizer:
    """AdamW over ``models``, which decays their matrices."""
    groups = [group for model in models for group in decayed_groups(model, config.weight_decay)]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99))


def annealed(lr: float, step: int, steps: int) -> float:
    """Learning rate of fits to labels: 50 steps of warm-up, and a cosine from ``lr`` down to a twenty-fifth of it."""
    return lr * (0.52 + 0.48 * math.cos(math.pi * step / steps)) * min(1.0, (step + 1) / 50)


def descend(
    config: TrainConfig, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], loss: Tensor
) -> float:
    """One step down the gradient, averaged over the processes, its norm over ``parameters`` clipped; the norm before
    that."""
    optimizer.zero_grad(set_to_none=True)
    if loss.requires_grad:
        loss.backward()
    processes.average_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
    optimizer.step()
    return float(norm)


def minibatch_epochs(
    config: RLConfig,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    count: int,
    loss_of: Callable[[Tensor], tuple[Tensor, dict[str, float]]],
    generator: torch.Generator,
) -> dict[str, float]:
    """``config.epochs`` passes over ``count`` items in shuffled minibatches; what to log, averaged.

    Args:
        loss_of: the loss of the items with these indices, and what to log.
    """
    logged: dict[str, list[float]] = {}
    for _ in range(config.epochs):
        shuffled = torch.randperm(count, generator=generator, device=generator.device)
        chunks = shuffled.chunk(config.minibatches)
        for number in range(processes.most(len(chunks))):  # another process may have more
            loss, parts = loss_of(chunks[number]) if number < len(chunks) else (torch.zeros(()), {})
            if processes.any_of(loss.requires_grad):  # else the denoiser was confident: there was nothing to decide
                parts["gradient/norm"] = descend(config, optimizer, parameters, loss)
            for name, value in parts.items():
                logged.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in logged.items()}


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
