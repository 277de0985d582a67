"""Do the learners reach the exact optimum of J(pi) = E[r] - beta * KL? On problems small enough to solve exactly.

    python benchmarks/exact_optimum.py --threads 1 --out benchmarks/results/exact-optimum.json

Three problems (three 4x4 Sudoku boards with 7 blanks and a denoiser stopped after 100 steps; a correlated distribution
over four letters, filled by sampling from a denoiser that sees neighbours only; a reference that is wrong on purpose),
three betas, and every learner. The optimum, a policy's value and its divergences are exact (unmask_env/exact.py).
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from agents import sb3_ppo, torchrl_ppo, upo
from agents.policy import OrderPolicy, PolicyShape
from agents.upo import UPOConfig
from agents.sb3_ppo import SB3PPOConfig
from agents.torchrl_ppo import TorchRLGRPOConfig, TorchRLPPOConfig
from pretrain.checkpoint import write_json
from pretrain.train import PretrainConfig, pretrain
from tasks import Instances, Sudoku, Task
from unmask_env import exact
from unmask_env.core import Denoised
from unmask_env.denoiser import Denoiser, TableDenoiser, load_denoiser
from unmask_env.reference import Reference, SoftmaxConfidence
from unmask_env import reference as references

BETAS = (0.01, 0.1, 1.0)


# ---------------------------------------------------------------------- problems
class Fixed(Task):
    """The same few instances of another task, over and over."""

    def __init__(self, task: Task, instances: Instances) -> None:
        self.task, self.instances = task, instances
        self.name, self.symbols, self.shape, self.box = task.name, task.symbols, task.shape, task.box

    @property
    def coordinates(self) -> Tensor:
        return self.task.coordinates

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        rows = torch.randint(len(self.instances), (n,), generator=generator, device=generator.device)
        return self.instances.to(generator.device)[rows]

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return self.task.reward(tokens, instances)


class Word(Task):
    """A word of L letters from nothing; its reward is a given table's, (V,) * L."""

    def __init__(self, rewards: Tensor) -> None:
        self.name, self.rewards = "word", rewards
        self.symbols, self.shape = tuple("abcdefgh"[: rewards.shape[0]]), (1, rewards.ndim)

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        holes = torch.full((n, self.length), self.mask_id, device=generator.device)
        return Instances(holes, torch.zeros_like(holes))

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return self.rewards.to(tokens.device)[tuple(tokens.unbind(1))].float()


class Neighbours(TableDenoiser):
    """p(x_i | the visible neighbours of i): each conditional is right, but they are not those of one joint."""

    def __call__(self, tokens: Tensor) -> Denoised:
        parts = []
        for position in range(self.length):
            near = torch.full_like(tokens, self.mask_id)
            for at in (position - 1, position + 1):
                if 0 <= at < self.length:
                    near[:, at] = tokens[:, at]
            parts.append(super().__call__(near).log_probs[:, position])
        self.calls -= self.length - 1
        return Denoised(torch.stack(parts, 1))


class Problem(NamedTuple):
    name: str
    task: Task
    denoiser: Denoiser
    reference: Reference
    tau: float
    fill_temperature: float


def correlated(vocab_size: int, length: int, seed: int) -> Tensor:
    """(V,) * L probabilities far from independent."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn((vocab_size,) * length, generator=generator, dtype=torch.float64)).exp()


def problems(runs: Path) -> list[Problem]:
    out = runs / "denoiser"
    trained = PretrainConfig(
        task="sudoku4", steps=100, batch=128, dim=48, layers=3, lr=3e-3, warmup=50, ema=0.95, out=str(out),
        resume=(out / "state.safetensors").exists(),
    )  # fmt: skip
    sudoku = Sudoku(2, 2, blanks=7, reward="cell_accuracy")
    boards = Fixed(sudoku, sudoku.heldout(3))
    weak = load_denoiser(pretrain(trained), boards)

    joint = correlated(3, 4, seed=0)
    likely = Word((joint >= joint.flatten().sort(descending=True).values[1]).float())
    word = torch.zeros((3,) * 5)
    word[1, 0, 1, 0, 0] = 1.0  # the reference finishes with it once in 25 times, some orders always
    misled = Word(word)
    return [
        Problem("4x4 Sudoku, 7 blanks", boards, weak, SoftmaxConfidence(0.05), 0.05, 0.0),
        Problem("correlated letters, sampled", likely, Neighbours(joint, likely), SoftmaxConfidence(0.2), 0.2, 1.0),
        Problem(
            "wrong reference", misled, Neighbours(correlated(3, 5, seed=27), misled), SoftmaxConfidence(0.1), 0.1, 0.0
        ),
    ]


# ---------------------------------------------------------------------- learners
def learners(scale: float) -> dict[str, Callable[[dict[str, Any]], tuple[Any, Callable]]]:
    """Per learner: the settings that a run's common ones make, and the function that trains with them."""
    ppo = {"boards": 256, "epochs": 4, "iterations": int(200 * scale), "gae_lambda": 1.0}
    groups = {"puzzles": 16, "group": 16, "epochs": 2, "iterations": int(300 * scale)}
    return {
        "UPO, step_kl": lambda c: (UPOConfig(**c, **groups, regulariser="step_kl", mine=0.0), upo.train),
        "UPO, trajectory_kl": lambda c: (UPOConfig(**c, **groups, regulariser="trajectory_kl", mine=0.0), upo.train),
        "MaskablePPO (SB3)": lambda c: (SB3PPOConfig(**c, **ppo), sb3_ppo.train),
        "TorchRL PPO": lambda c: (TorchRLPPOConfig(**c, **ppo), torchrl_ppo.train),
        "TorchRL, group-relative": lambda c: (TorchRLGRPOConfig(**c, **groups), torchrl_ppo.train),
    }
