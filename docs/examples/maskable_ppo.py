"""MaskablePPO of stable-baselines3 on regularised rewards: ``python docs/examples/maskable_ppo.py --help``.

``KLRolloutBuffer`` stores r - beta * (log pi(a|s) - log g(a|s)) in place of r. ``OrderActorCritic`` makes an order
policy, which reads positions and not a flat vector, MaskablePPO's network. ``unmask train ppo-sb3`` does the same with
logs, resuming and validation.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from sb3_contrib import MaskablePPO

from agents.critic import new_critic
from agents.evaluate import Comparison, compare
from agents.policy import PolicyConfig, new_policy
from agents.sb3_ppo import OrderActorCritic
from unmask_env.sb3_env import KLRolloutBuffer, SB3VecEnv


@dataclass(frozen=True)
class Args:
    """Train an order policy by MaskablePPO, from an order at random."""

    env_id: str = "Unmask/Sudoku4x4-v0"
    task: str = "sudoku4:blanks=8,reward=cell_accuracy"
    denoiser: str = "runs/weak"
    beta: float = 1e-3
    """weight of the KL to the reference, the uniform order"""
    num_envs: int = 64
    num_steps: int = 8
    """of each environment per iteration"""
    iterations: int = 150
    epochs: int = 3
    learning_rate: float = 2e-3
    limit: int = 1000
    """held-out instances"""
    seed: int = 0
    out: Path | None = None
    """JSON"""


def main(args: Args) -> Comparison:
    """Train, and play held-out instances."""
    torch.set_num_threads(1)
    started = time.process_time()
    envs = SB3VecEnv(args.env_id, num_envs=args.num_envs, task=args.task, denoiser=args.denoiser, reference="random")
    process = envs.envs.unwrapped.process
    shape = PolicyConfig(layers=1, num_passes=1, defer_above=2.0)  # it reads every board
    order = new_policy(shape, process.task, process.denoiser, args.seed, base="none")  # at first the uniform order
    steps = args.num_envs * args.num_steps
    model = MaskablePPO(
        OrderActorCritic,
        envs,
        learning_rate=lambda left: args.learning_rate * left,
        n_steps=args.num_steps,
        batch_size=steps // 2,
        n_epochs=args.epochs,
        gamma=1.0,  # the objective has no discount
        rollout_buffer_class=KLRolloutBuffer,
        rollout_buffer_kwargs={"beta": args.beta},
        policy_kwargs={"policy": order, "critic": new_critic(process.task, args.seed)},
        seed=args.seed,
        device="cpu",
    )
    model.learn(args.iterations * steps)
    seconds = round(time.process_time() - started, 1)
    compared = compare(
        process, {"random": "random", "max_confidence": "max_confidence", "learned": order.eval()}, limit=args.limit
    )
    print(f"{compared}\n{seconds} CPU seconds of training")
    if args.out is not None:
        written = {"iterations": args.iterations, "cpu_seconds": seconds, "rows": compared.rows}
        args.out.write_text(json.dumps(written))
    return compared


if __name__ == "__main__":
    main(tyro.cli(Args))
