"""PPO and group-relative PPO by TorchRL: ``ClipPPOLoss`` with an order policy, on KL-regularised rewards.

Each iteration collects freshly seeded boards, so a run that was cut off goes on exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent

from agents.cards import publisher
from agents.critic import Critic, new_critic
from agents.policy import OrderPolicy
from agents.setup import (
    PPOConfig,
    RLConfig,
    Setup,
    episode_ends_within,
    look_ahead,
    make_optimizer,
    minibatch_epochs,
    per_episode,
    seeded,
    setup_on_policy,
)
from agents.validation import Validation
from pretrain.checkpoint import step_generator
from pretrain.run import Run, set_learning_rate
from tasks import UnmaskError
from tasks.errors import optional
from tasks.settings import AtLeast1, AtLeast2
from unmask_env.encoding import LOG_ZERO, decode, log_reference_of
from unmask_env.process import Unmasking
from unmask_env.state import Observation
from unmask_env.torchrl_env import KLReward, UnmaskTorchEnv

with optional("PPO by TorchRL", "unmask[torchrl]"):
    from tensordict import TensorDictBase
    from tensordict.nn import TensorDictModule
    from torchrl.collectors import Collector
    from torchrl.envs import TransformedEnv
    from torchrl.modules import MaskedCategorical, ProbabilisticActor, ValueOperator
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE


# ---------------------------------------------------------------------- settings
@dataclass(frozen=True)
class TorchRLPPOConfig(PPOConfig):
    """PPO by TorchRL, on KL-regularised rewards."""


@dataclass(frozen=True)
class TorchRLGRPOConfig(RLConfig):
    """PPO by TorchRL without a critic: advantages are relative to the other boards of a group."""

    puzzles: AtLeast1 = 32
    """groups side by side"""
    group: AtLeast2 = 8
    """boards per group: they play the same instances"""
    steps: AtLeast1 | None = None
    """steps of each board per iteration; default: the task's length. Episodes it cuts off teach nothing"""

    @property
    def num_envs(self) -> int:
        """Boards that play side by side: a group for each instance."""
        return self.puzzles * self.group


# ---------------------------------------------------------------------- the policy as TorchRL sees it
class _Reading(nn.Module):
    """``answer`` of a network and the observation in the environment's ``keys``, with any leading dimensions."""

    def __init__(self, keys: Sequence[str], network: nn.Module, answer: Callable[[Any, Observation], Tensor]) -> None:
        super().__init__()
        self.keys, self.network, self.answer = keys, network, answer

    def forward(self, *values: Tensor) -> Tensor:
        lead = values[0].shape[:-1]
        flat = (value.reshape(-1, *value.shape[len(lead) :]) for value in values)
        seen = decode(dict(zip(self.keys, flat, strict=True)), self.network.vocab_size)
        return self.answer(self.network, seen).view(*lead, -1)


def _logits(policy: OrderPolicy, seen: Observation) -> Tensor:
    return policy(seen).logits().clamp(min=LOG_ZERO)


class MaskedBernoullis(Independent):
    """Sets: each entry is in with the odds of its logit, and never where ``mask`` is False."""

    def __init__(self, logits: Tensor, mask: Tensor) -> None:
        super().__init__(Bernoulli(logits=logits.masked_fill(~mask, -1e8)), 1, validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return super().sample(torch.Size(sample_shape)).bool()

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value.float())

    @property
    def deterministic_sample(self) -> Tensor:
        return self.base_dist.logits > 0


def make_actor(policy: OrderPolicy, keys: Sequence[str]) -> ProbabilisticActor:
    """``policy`` as a TorchRL actor: samples legal positions or sets, writes ``action`` and ``action_log_prob``.

    Args:
        keys: of the environment, which the policy reads.
    """
    single = policy.actions == "single"
    return ProbabilisticActor(
        TensorDictModule(_Reading(keys, policy, _logits), in_keys=list(keys), out_keys=["logits"]),
        in_keys={"logits": "logits", "mask": "action_mask"},
        distribution_class=MaskedCategorical if single else MaskedBernoullis,
        distribution_kwargs={"neg_inf": -1e8} if single else {},  # a finished board's mask is empty, and must not raise
        return_log_prob=True,
    )


# ---------------------------------------------------------------------- advantages without a critic
def group_relative(reward: Tensor, done: Tensor, group: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """(N, T) reward still to come, minus that of the others in the group at the same step; and which steps count.

    The boards of a group play the same instances and so stay in step. Steps of episodes that the batch cut off do not
    count: their reward is not known. The mean is that of the *other* boards, which keeps the policy gradient unbiased.

    Args:
        reward, done: (N, T); rows in groups of ``group``. normalise: divide by the group's standard deviation.
    """
    to_go = torch.zeros_like(reward)
    running = torch.zeros_like(reward[:, 0])
    for step in reversed(range(reward.shape[1])):
        running = reward[:, step] + running * ~done[:, step]
        to_go[:, step] = running
    grouped = to_go.view(-1, group, reward.shape[1])
    advantage = (grouped - grouped.mean(1, keepdim=True)) * group / (group - 1)
    if normalise:
        advantage = advantage / (grouped.std(1, keepdim=True) + 1e-4)
    return advantage.view_as(reward), episode_ends_within(done)


# ---------------------------------------------------------------------- the loop
def train(config: TorchRLPPOConfig | TorchRLGRPOConfig, process: Unmasking | None = None) -> OrderPolicy:
    """Train an order policy with TorchRL's ``ClipPPOLoss`` and save it in ``config.out``.

    With a :class:`TorchRLPPOConfig`, advantages are generalised ones from a critic; with a :class:`TorchRLGRPOConfig`
    they are group-relative. ``process`` and what is raised are as in :func:`agents.upo.train`.
    """
    grouped = isinstance(config, TorchRLGRPOConfig)
    ready, steps = setup_on_policy(config, process)
    config, process, policy = ready.config, ready.process, ready.policy
    if grouped:
        least = int((look_ahead(process.task).tokens == process.task.mask_id).sum(1).min())
        if steps < least:
            raise UnmaskError(
                f"no episode ends within {steps} steps, as the task has {least} masks and more; raise --steps"
            )
    group = getattr(config, "group", 1)
    env = UnmaskTorchEnv(num_envs=config.num_envs, group=group, seed=config.seed, **ready.environment)
    keys = observation_keys(env)
    actor = make_actor(policy, keys)
    loss, advantages, parts = make_loss(ready, actor, keys)
    optimizer = parts["optimizer"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    collector = Collector(
        TransformedEnv(env, KLReward(config.beta)) if config.beta > 0 else env,
        actor,
        frames_per_batch=config.num_envs * steps,
        total_frames=-1,
        reset_at_each_iter=True,
        auto_register_policy_transforms=False,  # the policy has no state to track
        track_traj_ids=False,  # nobody reads them, and they would lie on the CPU beside data on CUDA
    )
    batches = iter(collector)
    title = f"{'grpo' if grouped else 'ppo'}-torchrl {process.task.name}"
    monitor = Validation(config, process, ready.reference, title)
    parts |= {"validation": monitor}
    run = Run(config, config.iterations, parts, title, publish=publisher(policy, monitor))
    try:
        with run:
            for iteration in run.loop():
                generator = step_generator(ready.device, config.seed, iteration, 5 << 16)
                rate = config.learning_rate(iteration)
                set_learning_rate(optimizer, rate)
                with seeded(generator) as seed:
                    env.set_seed(seed)
                    data = next(batches)  # (num_envs, steps)
                frames = advantages(data)
                if not len(frames):
                    run.log({}, "no episode ended")
                    continue
                losses = partial(loss_of, loss, frames)
                scalars = minibatch_epochs(config, optimizer, parameters, len(frames), losses, generator)
                scalars |= summary(data, config.beta, group) | {"learning_rate": rate}
                said = f"reward {scalars['reward']:.3f}"
                if grouped:
                    said += f" informative {scalars['groups/informative']:.0%}"
                monitor.report(run, policy, scalars, said, config.num_envs * steps)
    finally:
        collector.shutdown()
    return policy.eval()


def observation_keys(env: UnmaskTorchEnv) -> list[str]:
    """What policy and critic read: all that the environment shows but what is its own."""
    shown = env.observation_spec.keys()
    return [key for key in shown if key not in ("state", "log_reference")]


def make_loss(
    ready: Setup, actor: ProbabilisticActor, keys: Sequence[str]
) -> tuple[ClipPPOLoss, Callable[[TensorDictBase], TensorDictBase], dict[str, Any]]:
    """The loss; what writes advantages into collected data (num_envs, steps) and returns the frames to learn from; and
    the parts of the run's state."""
    config, policy = ready.config, ready.policy
    parts: dict[str, Any] = {"policy": policy}
    if isinstance(config, TorchRLGRPOConfig):
        loss = ClipPPOLoss(actor, None, critic_coeff=None, clip_epsilon=config.clip, entropy_bonus=False)

        def advantages(data: TensorDictBase) -> TensorDictBase:
            reward, done = data["next", "reward"].squeeze(-1), data["next", "done"].squeeze(-1)
            advantage, counts = group_relative(reward, done, config.group, config.normalise)
            data["advantage"] = advantage.unsqueeze(-1)
            return data[counts]
    else:
        parts["critic"] = critic = new_critic(ready.process.task, config.seed).to(ready.device)
        value = ValueOperator(_Reading(keys, critic, Critic.__call__), in_keys=list(keys))
        # J has no discount.
        gae = GAE(gamma=1.0, lmbda=config.gae_lambda, value_network=value, deactivate_vmap=True)
        of_values = {"critic_coeff": config.critic_weight, "loss_critic_type": "l2"}
        scaled = {"normalize_advantage": config.normalise}
        loss = ClipPPOLoss(actor, value, clip_epsilon=config.clip, entropy_bonus=False, **of_values, **scaled)

        @torch.no_grad()
        def advantages(data: TensorDictBase) -> TensorDictBase:
            gae(data)
            return data.reshape(-1)

    parts["optimizer"] = make_optimizer(config, *parts.values())
    return loss, advantages, parts


def loss_of(loss: ClipPPOLoss, frames: TensorDictBase, rows: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The loss of these rows of the frames, and what to log."""
    terms = loss(frames[rows])
    total = sum(term for name, term in terms.items() if name.startswith("loss_"))
    return total, {f"train/{name}": float(term.detach().mean()) for name, term in terms.items()}


def summary(data: TensorDictBase, beta: float, group: int = 1) -> dict[str, float]:
    """:func:`agents.setup.per_episode` of a batch of frames (num_envs, steps), and of groups the share that earned
    unequally."""
    reward, done = data["next", "reward"].squeeze(-1), data["next", "done"].squeeze(-1)
    ratio = None
    if beta > 0:
        log_reference = log_reference_of(data["log_reference"].flatten(0, 1), data["action"].flatten(0, 1))
        ratio = data["action_log_prob"] - log_reference.view_as(reward)
        reward = reward + beta * ratio  # the task's own
    scalars = per_episode(reward, done, ratio)
    if group > 1:
        earned = reward.sum(1).view(-1, group)
        scalars["groups/informative"] = ((earned - earned[:, :1]).abs() > 1e-4).any(1).float().mean().item()
    return scalars
