"""PPO of TorchRL on regularised rewards: ``python docs/examples/torchrl_ppo.py --help``.

``KLReward`` makes rewards r - beta * (log pi(a|s) - log g(a|s)). Boards come in groups that play the same instance, and
advantages are relative to the others of the group, so there is no critic. ``unmask train ppo-torchrl`` (with a critic)
and ``grpo-torchrl`` do the same with logs, resuming and validation.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv
from torchrl.objectives import ClipPPOLoss

from agents.evaluate import Comparison, compare
from agents.policy import PolicyConfig, new_policy
from agents.torchrl_ppo import group_relative, make_actor, observation_keys
from unmask_env.torchrl_env import KLReward, UnmaskTorchEnv


@dataclass(frozen=True)
class Args:
    """Train an order policy by TorchRL's ClipPPOLoss, from an order at random."""

    task: str = "sudoku4:blanks=8,reward=cell_accuracy"
    denoiser: str = "runs/weak"
    beta: float = 1e-3
    """weight of the KL to the reference, the uniform order"""
    num_envs: int = 64
    group: int = 8
    """boards that play the same instance"""
    num_steps: int = 8
    """of each board per iteration"""
    iterations: int = 150
    epochs: int = 3
    minibatches: int = 2
    learning_rate: float = 2e-3
    """falls linearly to 0"""
    clip: float = 0.2
    limit: int = 1000
    """held-out instances"""
    seed: int = 0
    out: Path | None = None
    """JSON"""


def main(args: Args) -> Comparison:
    """Train, and play held-out instances."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    started = time.process_time()
    named = {"task": args.task, "denoiser": args.denoiser, "reference": "random"}
    env = UnmaskTorchEnv(num_envs=args.num_envs, group=args.group, seed=args.seed, **named)
    shape = PolicyConfig(layers=1, num_passes=1, defer_above=2.0)  # it reads every board
    order = new_policy(shape, env.task, env.process.denoiser, args.seed, base="none")  # at first the uniform order
    actor = make_actor(order, observation_keys(env))
    steps = args.num_envs * args.num_steps
    collector = Collector(
        TransformedEnv(env, KLReward(args.beta)),
        actor,
        frames_per_batch=steps,
        total_frames=args.iterations * steps,
        reset_at_each_iter=True,
        auto_register_policy_transforms=False,  # the policy has no state
    )
    loss = ClipPPOLoss(actor, None, critic_coeff=None, clip_epsilon=args.clip, entropy_bonus=False)
    optimizer = torch.optim.AdamW(order.parameters(), lr=args.learning_rate)
    for iteration, batch in enumerate(collector):  # (num_envs, num_steps)
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / args.iterations)
        reward, done = batch["next", "reward"].squeeze(-1), batch["next", "done"].squeeze(-1)
        advantage, counts = group_relative(reward, done, args.group, normalise=True)
        batch["advantage"] = advantage.unsqueeze(-1)
        frames = batch[counts]  # of episodes that ended
        for _ in range(args.epochs):
            for rows in torch.randperm(len(frames)).chunk(args.minibatches):
                optimizer.zero_grad()
                loss(frames[rows])["loss_objective"].backward()
                torch.nn.utils.clip_grad_norm_(order.parameters(), 1.0)
                optimizer.step()
    collector.shutdown()
    seconds = round(time.process_time() - started, 1)
    compared = compare(
        env.process, {"random": "random", "max_confidence": "max_confidence", "learned": order.eval()}, limit=args.limit
    )
    print(f"{compared}\n{seconds} CPU seconds of training")
    if args.out is not None:
        written = {"iterations": args.iterations, "cpu_seconds": seconds, "rows": compared.rows}
        args.out.write_text(json.dumps(written))
    return compared


if __name__ == "__main__":
    main(tyro.cli(Args))
