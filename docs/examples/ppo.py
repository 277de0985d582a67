"""PPO in one file, in the manner of CleanRL, on regularised rewards: ``python docs/examples/ppo.py --help``.

Everything is here: the network, the rollout, generalised advantages, the clipped loss. It plays ``gym.make_vec`` with
:class:`unmask_env.vector_env.RegularisedReward`, whose rewards are r - beta * (log pi(a|s) - log g(a|s)). The policy's
logits begin as log g, so at first it is the reference policy g: by default the uniform one, an order at random. At the
end held-out instances are played by g, by the most confident position first, and by the policy, greedily.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical

import unmask_env  # noqa: F401 - registers the ids
from unmask_env.vector_env import RegularisedReward


@dataclass(frozen=True)
class Args:
    """Train an order policy by PPO."""

    env_id: str = "Unmask/Sudoku4x4-v0"
    task: str = "sudoku4:blanks=8,reward=cell_accuracy"
    denoiser: str = "runs/weak"
    reference: str = "random"
    beta: float = 1e-3
    """weight of the KL to the reference"""
    num_envs: int = 128
    num_steps: int = 8
    """of each environment per iteration"""
    iterations: int = 240
    epochs: int = 3
    minibatches: int = 2
    learning_rate: float = 2e-3
    """falls linearly to 0"""
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_weight: float = 0.5
    entropy_weight: float = 0.0
    max_grad_norm: float = 0.5
    dim: int = 32
    layers: int = 2
    limit: int = 1000
    """held-out instances"""
    seed: int = 0
    out: Path | None = None
    """JSON"""


class Agent(nn.Module):
    """Actor and critic: a transformer over the positions of the board.

    A position is its symbol, what the denoiser would write there, how sure it is, and where it stands.
    """

    def __init__(self, envs: VectorEnv, dim: int, layers: int) -> None:
        super().__init__()
        task = envs.unwrapped.task
        self.symbol = nn.Embedding(task.vocab_size + 1, dim)  # the last is the mask
        self.proposed = nn.Embedding(task.vocab_size, dim)
        self.register_buffer("coordinates", task.coordinates)  # (L, C): row, column, box
        self.places = nn.ModuleList(nn.Embedding(int(c.max()) + 1, dim) for c in task.coordinates.T)
        self.numbers = nn.Linear(3, dim)
        block = nn.TransformerEncoderLayer(dim, 4, 2 * dim, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.actor, self.critic = nn.Linear(dim, 1), nn.Linear(dim, 1)
        nn.init.zeros_(self.actor.weight)  # the policy is the reference
        nn.init.zeros_(self.critic.weight)

    def forward(self, obs: dict[str, Tensor]) -> tuple[Categorical, Tensor]:
        """The policy's distribution over positions, and values (N,)."""
        shares = obs["top_log_probs"].exp()  # (N, L, K)
        numbers = torch.stack([shares[..., 0], shares[..., 1], obs["entropy"]], -1)
        x = self.symbol(obs["tokens"]) + (shares.unsqueeze(-1) * self.proposed(obs["top_symbols"])).sum(2)
        x = x + self.numbers(numbers) + sum(e(c) for e, c in zip(self.places, self.coordinates.T, strict=True))
        x = self.blocks(x)  # (N, L, D)
        logits = obs["log_reference"] + self.actor(x).squeeze(-1)
        logits = logits.masked_fill(obs["action_mask"] == 0, -1e8)
        return Categorical(logits=logits), self.critic(x.mean(1)).squeeze(-1)


def tensors(obs: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value) for name, value in obs.items()}


def make(args: Args, num_envs: int, **more: object) -> VectorEnv:
    named = {"task": args.task, "denoiser": args.denoiser, "reference": args.reference}
    return gym.make_vec(args.env_id, num_envs=num_envs, **named, **more)


@torch.no_grad()
def evaluate(args: Args, choose: Callable[[dict[str, Tensor]], Tensor]) -> float:
    """Mean reward of held-out instances, each played once; ``choose`` maps observations to positions (N,)."""
    envs = make(args, args.limit, split="test")
    obs, _ = envs.reset(seed=0, options={"index": list(range(args.limit))})
    reward, playing = np.zeros(args.limit), np.ones(args.limit, dtype=bool)
    while playing.any():
        obs, earned, terminated, truncated, _ = envs.step(choose(tensors(obs)).numpy())
        reward += earned * playing
        playing &= ~(terminated | truncated)
    return float(reward.mean())


def most_confident(obs: dict[str, Tensor]) -> Tensor:
    """The heuristic to compare with: the position of which the denoiser is surest."""
    return obs["top_log_probs"][..., 0].masked_fill(obs["action_mask"] == 0, -torch.inf).argmax(1)


def advantages_of(
    rewards: Tensor, dones: Tensor, values: Tensor, following: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """(T, N) generalised advantages (Schulman et al. 2016, equation 16); ``following`` (N,) are the values after the
    last step, and a finished row's next value is 0."""
    advantages, running = torch.zeros_like(rewards), torch.zeros_like(following)
    for step in reversed(range(len(rewards))):
        alive = (~dones[step]).float()
        delta = rewards[step] + gamma * following * alive - values[step]
        running = delta + gamma * gae_lambda * alive * running
        advantages[step], following = running, values[step]
    return advantages


def update(args: Args, agent: Agent, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> None:
    """``args.epochs`` passes over a batch, with the clipped loss (Schulman et al. 2017, equation 7)."""
    for _ in range(args.epochs):
        for rows in torch.randperm(len(batch["action"])).chunk(args.minibatches):
            policy, value = agent({name: part[rows] for name, part in batch["obs"].items()})
            advantage = batch["advantage"][rows]
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            ratio = (policy.log_prob(batch["action"][rows]) - batch["log_prob"][rows]).exp()
            clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
            loss = -torch.min(advantage * ratio, advantage * clipped).mean()
            loss = loss + args.value_weight * (value - batch["return"][rows]).square().mean()
            loss = loss - args.entropy_weight * policy.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()


def train(args: Args) -> tuple[Agent, list[float]]:
    """The trained agent, and the mean reward of the episodes of every iteration."""
    torch.manual_seed(args.seed)
    envs = RegularisedReward(make(args, args.num_envs), args.beta)
    agent = Agent(envs, args.dim, args.layers)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    first, _ = envs.reset(seed=args.seed)
    obs, curve = tensors(first), []
    for iteration in range(args.iterations):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / args.iterations)
        seen, steps, earned = [], [], []
        for _ in range(args.num_steps):
            with torch.no_grad():
                policy, value = agent(obs)
            action = policy.sample()
            log_prob = policy.log_prob(action)
            after, reward, terminated, truncated, info = envs.step(action.numpy(), log_prob.numpy())
            done = terminated | truncated
            seen.append(obs)
            steps.append((action, log_prob, torch.as_tensor(reward), torch.as_tensor(done), value))
            earned.extend(info["task_reward"][done].tolist())
            obs = tensors(after)
        curve.append(sum(earned) / len(earned) if earned else math.nan)
        actions, log_probs, rewards, dones, values = (torch.stack(part) for part in zip(*steps, strict=True))  # (T, N)
        with torch.no_grad():
            following = agent(obs)[1]
        advantages = advantages_of(rewards, dones, values, following, args.gamma, args.gae_lambda)
        batch = {"action": actions, "log_prob": log_probs, "advantage": advantages, "return": advantages + values}
        flat = {name: part.flatten() for name, part in batch.items()}
        update(args, agent, optimizer, flat | {"obs": {name: torch.cat([step[name] for step in seen]) for name in obs}})
        if iteration % 10 == 0 or iteration + 1 == args.iterations:
            print(f"iteration {iteration + 1}: reward {curve[-1]:.3f}", flush=True)
    return agent, curve


def main(args: Args) -> dict[str, object]:
    """Train, and play held-out instances before and after."""
    torch.set_num_threads(1)
    started = time.process_time()
    agent, curve = train(args)
    seconds = time.process_time() - started
    result = {
        "reference": evaluate(args, lambda obs: Categorical(logits=obs["log_reference"]).sample()),
        "max_confidence": evaluate(args, most_confident),
        "policy": evaluate(args, lambda obs: agent(obs)[0].logits.argmax(1)),
        "cpu_seconds": round(seconds, 1),
    }
    print(", ".join(f"{name} {value:.3f}" for name, value in result.items()))
    if args.out is not None:
        args.out.write_text(json.dumps(result | {"iterations": args.iterations, "curve": curve}))
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))
