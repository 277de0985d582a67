"""PPO and group-relative PPO by TorchRL: ``ClipPPOLoss`` with an order policy, on KL-regularised rewards.

Read from top to bottom: the policy as TorchRL sees it, advantages, the loop; the settings are in learner.py. Each
iteration collects freshly seeded boards, so a run that was cut off goes on exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv
from torchrl.modules import MaskedCategorical, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from agents.critic import Critic, new_critic
from agents.learner import (
    TorchRLGRPOConfig,
    TorchRLPPOConfig,
    look_ahead,
    of_finished,
    per_episode,
    prepare_on_policy,
    require_groups,
    seeded,
)
from agents.policy import OrderPolicy
from pretrain.checkpoint import save_model, step_generator
from pretrain.run import Run, decayed_groups, set_learning_rate
from tasks import Task, UnmaskError
from unmask_env.boards import LOG_ZERO, log_reference_of, read
from unmask_env.core import Observation
from unmask_env.denoiser import Denoiser
from unmask_env.torchrl import KLReward, UnmaskTorchEnv

SHOWN = ["tokens", "action_mask", "top_tokens", "top_log_probs", "reopened"]  # what policy and critic read


# ---------------------------------------------------------------------- the policy as TorchRL sees it
class _Reading(nn.Module):
    """Calls a module of observations on the shown keys, with any leading dimensions."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def observe(self, *shown: Tensor) -> tuple[Observation, torch.Size]:
        lead = shown[0].shape[:-1]
        flat = (value.reshape(-1, *value.shape[len(lead) :]) for value in shown)
        return read(dict(zip(SHOWN, flat, strict=True)), self.vocab_size), lead


class _Logits(_Reading):
    def __init__(self, order: OrderPolicy) -> None:
        super().__init__(order.vocab_size)
        self.order = order

    def forward(self, *shown: Tensor) -> Tensor:
        observation, lead = self.observe(*shown)
        single = self.order.sets == "none"
        logits = self.order.log_prob(observation) if single else self.order.log_odds(observation)
        return logits.clamp(min=LOG_ZERO).view(*lead, -1)


class _Value(_Reading):
    def __init__(self, critic: Critic) -> None:
        super().__init__(critic.likely.num_embeddings)
        self.critic = critic

    def forward(self, *shown: Tensor) -> Tensor:
        observation, lead = self.observe(*shown)
        return self.critic(observation).view(*lead, 1)


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


def make_actor(order: OrderPolicy) -> ProbabilisticActor:
    """``order`` as a TorchRL actor: samples legal positions or sets, writes ``action`` and ``action_log_prob``."""
    single = order.sets == "none"
    return ProbabilisticActor(
        TensorDictModule(_Logits(order), in_keys=SHOWN, out_keys=["logits"]),
        in_keys={"logits": "logits", "mask": "action_mask"},
        distribution_class=MaskedCategorical if single else MaskedBernoullis,
        # A finished board's mask is empty, and must not raise.
        distribution_kwargs={"neg_inf": -1e8} if single else {},
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
    return advantage.view_as(reward), of_finished(done)


# ---------------------------------------------------------------------- the loop
def train(
    config: TorchRLPPOConfig | TorchRLGRPOConfig, task: Task | None = None, denoiser: Denoiser | None = None
) -> OrderPolicy:
    """Train an order policy with TorchRL's ``ClipPPOLoss`` and save it in ``config.out``.

    With a :class:`TorchRLPPOConfig`, advantages are generalised ones from a critic; with a :class:`TorchRLGRPOConfig`
    they are group-relative.

    Args:
        task, denoiser: used instead of looking ``config.env`` and ``config.denoiser`` up.

    Raises:
        UnmaskError: names, sizes or settings that do not fit, an ``out`` that cannot be used or resumed.
        Interrupted: after Ctrl-C, with the state saved.
    """
    grouped = isinstance(config, TorchRLGRPOConfig)
    if grouped:
        require_groups(config.puzzles, config.group)
    group = config.group if grouped else 1
    boards = config.puzzles * group if grouped else config.boards
    ready, steps = prepare_on_policy(config, boards, config.steps, task, denoiser)
    config, task, denoiser, reference, policy, device = ready
    if grouped:
        least = int((look_ahead(task).tokens == task.mask_id).sum(1).min())
        if steps < least:
            raise UnmaskError(
                f"no episode ends within {steps} steps, as the task has {least} holes and more; raise --steps"
            )
    env = UnmaskTorchEnv(
        num_envs=boards,
        task=task,
        denoiser=denoiser,
        reference=reference,
        temperature=config.fill_temperature,
        group=group,
        seed=config.seed,
        device=device,
        **vars(config.rules),
    )
    actor = make_actor(policy)
    parts: dict[str, nn.Module | torch.optim.Optimizer] = {"policy": policy}
    groups = decayed_groups(policy, config.weight_decay)
    if grouped:
        loss = ClipPPOLoss(actor, None, critic_coeff=None, clip_epsilon=config.clip, entropy_bonus=False)
    else:
        critic = new_critic(task, config.seed).to(device)
        parts["critic"] = critic
        groups += decayed_groups(critic, config.weight_decay)
        value = ValueOperator(_Value(critic), in_keys=SHOWN)
        # J has no discount.
        advantages = GAE(gamma=1.0, lmbda=config.gae_lambda, value_network=value, deactivate_vmap=True)
        loss = ClipPPOLoss(
            actor,
            value,
            clip_epsilon=config.clip,
            entropy_bonus=False,
            critic_coeff=config.critic_weight,
            loss_critic_type="l2",
            normalize_advantage=config.normalise,
        )
    optimizer = parts["optimizer"] = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99))
    collector = Collector(
        TransformedEnv(env, KLReward(config.beta)) if config.beta > 0 else env,
        actor,
        frames_per_batch=boards * steps,
        total_frames=-1,
        reset_at_each_iter=True,
        auto_register_policy_transforms=False,  # the policy has no state to track
    )
    batches = iter(collector)
    run = Run(config, config.iterations, parts, f"{'grpo' if grouped else 'ppo'}-torchrl {task.name}")
    try:
        with run:
            for iteration in run.loop():
                generator = step_generator(device, config.seed, iteration, 5 << 16)
                set_learning_rate(optimizer, config.learning_rate(iteration))
                with seeded(generator) as seed:
                    env.set_seed(seed)
                    data = next(batches)  # (boards, steps)
                done = data["next", "done"].squeeze(-1)
                if grouped:
                    reward = data["next", "reward"].squeeze(-1)
                    data["advantage"], counts = group_relative(reward, done, group, config.normalise)
                    data["advantage"] = data["advantage"].unsqueeze(-1)
                    frames = data[counts]
                else:
                    with torch.no_grad():
                        advantages(data)
                    frames = data.reshape(-1)
                if not len(frames):
                    run.note("no episode ended")
                    continue
                logged: dict[str, list[float]] = {}
                for _ in range(config.epochs):
                    shuffled = torch.randperm(len(frames), generator=generator, device=device)
                    for rows in shuffled.chunk(config.minibatches):
                        terms = loss(frames[rows])
                        total = sum(term for name, term in terms.items() if name.startswith("loss_"))
                        for name, term in terms.items():
                            logged.setdefault(f"train/{name}", []).append(float(term.detach().mean()))
                        if not total.requires_grad:  # the denoiser was sure throughout: there was nothing to decide
                            continue
                        optimizer.zero_grad(set_to_none=True)
                        total.backward()
                        nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], config.grad_clip)
                        optimizer.step()
                scalars = {name: sum(values) / len(values) for name, values in logged.items()} | summary(
                    data, config.beta
                )
                run.log(scalars, f"reward {scalars['reward']:.3f}")
    finally:
        collector.shutdown()
    policy.eval()
    save_model(policy, Path(config.out))
    return policy


def summary(data: TensorDictBase, beta: float) -> dict[str, float]:
    """Per finished episode: the task's reward, and, where beta is above 0, the sampled KL to the reference."""
    reward, done = data["next", "reward"].squeeze(-1), data["next", "done"].squeeze(-1)
    if beta == 0:
        return per_episode(reward, done, None)
    shape = reward.shape
    log_reference = log_reference_of(data["log_reference"].flatten(0, 1), data["action"].flatten(0, 1)).view(shape)
    ratio = data["action_log_prob"] - log_reference
    return per_episode(reward + beta * ratio, done, ratio)
