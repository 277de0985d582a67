"""PPO by stable-baselines3: ``MaskablePPO`` with an order policy, on KL-regularised rewards.

The loop calls ``model.learn`` once per iteration on freshly seeded boards, so a run that was cut off goes on exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from agents.cards import publisher
from agents.critic import Critic, new_critic
from agents.policy import OrderPolicy
from agents.setup import PPOConfig, per_episode, seeded, setup_on_policy
from agents.validation import Validation
from pretrain.checkpoint import step_generator
from pretrain.run import Run, decayed_groups
from tasks.errors import optional
from unmask_env.encoding import LOG_ZERO, decode
from unmask_env.process import Unmasking
from unmask_env.sb3_env import KLRolloutBuffer, SB3VecEnv
from unmask_env.vector_env import UnmaskVectorEnv

with optional("PPO by stable-baselines3", "unmask[sb3]"):
    from sb3_contrib import MaskablePPO
    from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor


@dataclass(frozen=True)
class SB3PPOConfig(PPOConfig):
    """PPO by stable-baselines3 (MaskablePPO), on KL-regularised rewards."""


# ---------------------------------------------------------------------- the policy as stable-baselines3 sees it
class PerPosition(BaseFeaturesExtractor):
    """The features are the policy's logits as the action space wants them, and the critic's value: of single positions
    the log-probabilities (N, L + 1); of sets two per entry, that it is out and that it is in: (N, 2 A + 1)."""

    def __init__(self, observation_space: spaces.Dict, policy: OrderPolicy, critic: Critic, logits: int) -> None:
        super().__init__(observation_space, features_dim=logits + 1)
        self.policy, self.critic = policy, critic

    def forward(self, arrays: dict[str, Tensor]) -> Tensor:
        seen = decode(arrays, self.policy.vocab_size)
        logits = self.policy(seen).sb3_logits().clamp(min=LOG_ZERO)
        return torch.cat([logits, self.critic(seen).unsqueeze(1)], 1)


class _Split(nn.Module):
    """Hands the two parts of the features to the two heads."""

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        return features[:, :-1]

    def forward_critic(self, features: Tensor) -> Tensor:
        return features[:, -1:]


class OrderActorCritic(MaskableActorCriticPolicy):
    """An order policy and a critic as ``MaskablePPO``'s policy.

    Nothing is learned on top of them: the action logits are the policy's log-probabilities. ``policy_kwargs``:
    ``policy``, ``critic`` and ``weight_decay``.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Discrete | spaces.MultiBinary,
        lr_schedule: Any,
        policy: OrderPolicy,
        critic: Critic,
        weight_decay: float = 0.0,
        **_: Any,
    ) -> None:
        self._weight_decay = weight_decay
        logits = action_space.n if isinstance(action_space, spaces.Discrete) else 2 * action_space.n
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            ortho_init=False,
            features_extractor_class=PerPosition,
            features_extractor_kwargs={"policy": policy, "critic": critic, "logits": logits},
        )

    def _build(self, lr_schedule: Any) -> None:
        self.mlp_extractor, self.action_net, self.value_net = _Split(), nn.Identity(), nn.Identity()
        groups = decayed_groups(self, self._weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=lr_schedule(1), betas=(0.9, 0.99))


# ---------------------------------------------------------------------- the model
def make_model(config: PPOConfig, envs: SB3VecEnv, policy: OrderPolicy, critic: Critic, steps: int) -> MaskablePPO:
    """A ``MaskablePPO`` that maximises J(pi) = E[r] - beta * KL; its policy trains ``policy`` and ``critic``."""
    return MaskablePPO(
        OrderActorCritic,
        envs,
        learning_rate=config.lr,
        n_steps=steps,
        batch_size=steps * envs.num_envs // config.minibatches,
        n_epochs=config.epochs,
        gamma=1.0,  # J has no discount
        gae_lambda=config.gae_lambda,
        clip_range=config.clip,
        normalize_advantage=config.normalise,
        vf_coef=config.critic_weight,
        max_grad_norm=config.grad_clip,
        rollout_buffer_class=KLRolloutBuffer,
        rollout_buffer_kwargs={"beta": config.beta},
        policy_kwargs={"policy": policy, "critic": critic, "weight_decay": config.weight_decay},
        device=envs.envs.unwrapped.process.device,
    )


class Tally(BaseCallback):
    """Keeps the task's own rewards and where episodes ended, (N,) per step, which the rollout buffer does not know."""

    def _init_callback(self) -> None:
        self.rewards: list[np.ndarray] = []
        self.dones: list[np.ndarray] = []

    def _on_step(self) -> bool:
        self.rewards.append(self.locals["rewards"].copy())
        self.dones.append(self.locals["dones"])
        return True

    def summary(self, log_ratios: list[np.ndarray]) -> dict[str, float]:
        """What :func:`agents.setup.per_episode` says; ``log_ratios`` (N,) per step, or nothing."""
        rewards, dones = (torch.as_tensor(np.stack(part, 1)) for part in (self.rewards, self.dones))
        return per_episode(rewards, dones, torch.as_tensor(np.stack(log_ratios, 1)) if log_ratios else None)


def gradient_norm(model: nn.Module) -> float:
    """Of the last minibatch, as the library left it: clipped."""
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


# ---------------------------------------------------------------------- the loop
def train(config: SB3PPOConfig, process: Unmasking | None = None) -> OrderPolicy:
    """Train an order policy with ``MaskablePPO`` and save it in ``config.out``.

    ``process`` and what is raised are as in :func:`agents.upo.train`.
    """
    ready, steps = setup_on_policy(config, process)
    config, process, _, policy = ready
    vec = SB3VecEnv(UnmaskVectorEnv(config.num_envs, **ready.environment))
    critic = new_critic(process.task, config.seed).to(ready.device)
    model = make_model(config, vec, policy, critic, steps)
    model.set_logger(Logger(folder=None, output_formats=[]))
    parts = {"policy": policy, "critic": critic, "optimizer": model.policy.optimizer}
    title = f"ppo-sb3 {process.task.name}"
    monitor = Validation(config, process, ready.reference, title)
    parts |= {"validation": monitor}
    run = Run(config, config.iterations, parts, title, publish=publisher(policy, monitor))
    with run:
        for iteration in run.loop():
            rate = config.learning_rate(iteration)
            model.lr_schedule = lambda _, rate=rate: rate
            tally = Tally()
            with seeded(step_generator(ready.device, config.seed, iteration, 4 << 16)) as seed:
                vec.seed(seed)
                model.set_env(vec, force_reset=True)
                model.learn(config.num_envs * steps, tally, log_interval=None, reset_num_timesteps=False)
            scalars = tally.summary(model.rollout_buffer.log_ratios)
            scalars |= {name: float(value) for name, value in model.logger.name_to_value.items()}
            scalars |= {"learning_rate": rate, "gradient/clipped_norm": gradient_norm(model.policy)}
            monitor.report(run, policy, scalars, f"reward {scalars['reward']:.3f}", config.num_envs * steps)
    return policy.eval()
