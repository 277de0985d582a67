"""Do the learners reach the exact optimum of J(pi) = E[r] - beta * KL? On problems small enough to solve exactly.

    python benchmarks/exact_optimum.py --problem sudoku --threads 1 --out benchmarks/results/exact-optimum-sudoku.json

Problems: *sudoku*, a 4x4 board with 7 blanks and a denoiser stopped after 100 steps; *letters*, a correlated
distribution over four letters with its exact conditionals, rewarded by the likelihood of the finished word; *misled*,
five letters where the reference is wrong on purpose; and *sampled*, where filling is sampled, from a denoiser that sees
neighbours only, so that a reward is noisy and the two KLs part. Three betas, and every learner. The optimum, a policy's
value and its divergences are exact (unmask_env/exact.py). Runs that are already in the output are kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from agents.learner import (
    SB3PPOConfig,
    TorchRLGRPOConfig,
    TorchRLPPOConfig,
    make_reference,
    prepare_on_policy,
    seeded,
)
from rich.console import Console
from torch import Tensor
from unmask_env.sb3 import SB3VecEnv
from unmask_env.vector import UnmaskVectorEnv

from agents import sb3_ppo, torchrl_ppo, upo
from agents.critic import new_critic
from agents.policy import OrderPolicy, PolicyShape
from agents.upo import UPOConfig
from pretrain.checkpoint import write_json
from pretrain.train import PretrainConfig, pretrain
from tasks import Instances, Sudoku, Task
from unmask_env import exact
from unmask_env.core import Denoised
from unmask_env.denoiser import Denoiser, TableDenoiser, load_denoiser
from unmask_env.reference import Reference

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
    """``steps`` are those of two episodes: what the PPOs play per iteration, on as many boards as make about 1,000."""

    task: Task
    denoiser: Denoiser
    tau: float
    fill_temperature: float
    steps: int

    def graph(self) -> exact.Graph:
        start = self.task.sample(1, torch.Generator().manual_seed(0))
        return exact.enumerate_boards(self.task, self.denoiser, start, self.fill_temperature)


def correlated(vocab_size: int, length: int, seed: int) -> Tensor:
    """(V,) * L probabilities far from independent."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn((vocab_size,) * length, generator=generator, dtype=torch.float64)).exp()


def sudoku(runs: Path) -> Problem:
    out = runs / "denoiser"
    settings = PretrainConfig(
        task="sudoku4",
        steps=100,
        batch=128,
        dim=48,
        layers=3,
        lr=3e-3,
        warmup=50,
        ema=0.95,
        out=str(out),
        resume=(out / "state.safetensors").exists(),
    )
    task = Sudoku(2, 2, blanks=7, reward="cell_accuracy")
    board = Fixed(task, task.heldout(3)[2:])  # of the first three, the one where the reference does worst
    return Problem(board, load_denoiser(pretrain(settings), board), 0.05, 0.0, 14)


def letters(runs: Path) -> Problem:
    joint = correlated(3, 4, seed=3)
    task = Word(joint / joint.max())  # how likely the word is that an order ends with
    return Problem(task, TableDenoiser(joint, task), 0.1, 0.0, 8)


def sampled(runs: Path) -> Problem:
    joint = correlated(3, 4, seed=0)
    likely = Word((joint >= joint.flatten().sort(descending=True).values[1]).float())  # the two likeliest words
    return Problem(likely, Neighbours(joint, likely), 0.2, 1.0, 8)


def misled(runs: Path) -> Problem:
    rewards = torch.zeros((3,) * 5)
    rewards[1, 0, 1, 0, 0] = 1.0  # the reference finishes with this word once in 25 times, some orders always
    task = Word(rewards)
    return Problem(task, Neighbours(correlated(3, 5, seed=27), task), 0.1, 0.0, 10)


PROBLEMS: dict[str, Callable[[Path], Problem]] = {
    "sudoku": sudoku,
    "letters": letters,
    "misled": misled,
    "sampled": sampled,
}


# ---------------------------------------------------------------------- learners
def entropy_bonus(config: SB3PPOConfig, task: Task, denoiser: Denoiser) -> OrderPolicy:
    """MaskablePPO with stable-baselines3's own regulariser, ``ent_coef``, in place of the KL in the reward."""
    ready, steps = prepare_on_policy(config, config.boards, config.steps, task, denoiser)
    config, policy = ready.config, ready.policy
    envs = SB3VecEnv(UnmaskVectorEnv(config.boards, task=task, denoiser=denoiser, temperature=config.fill_temperature))
    model = sb3_ppo.make_model(replace(config, beta=0.0), envs, policy, new_critic(task, config.seed), steps)
    model.ent_coef = config.beta
    model.lr_schedule = lambda left: config.lr * left
    with seeded(torch.Generator().manual_seed(config.seed)) as seed:
        envs.seed(seed)
        model.learn(config.iterations * config.boards * steps)
    return policy


def learners(common: dict[str, Any], steps: int, groups: int = 16) -> dict[str, tuple[Callable[..., OrderPolicy], Any]]:
    """Per learner its function and settings."""
    ppo = common | {
        "boards": 64 if steps > 10 else 128,
        "steps": steps,
        "epochs": 4,
        "iterations": 120,
        "gae_lambda": 1.0,
    }
    grouped = common | {"puzzles": groups, "group": 16, "epochs": 2, "iterations": 80}
    uniform = ppo | {"reference": "random"}
    return {
        "UPO, step_kl": (upo.train, UPOConfig(**grouped, regulariser="step_kl", mine=0.0)),
        "MaskablePPO": (sb3_ppo.train, SB3PPOConfig(**ppo)),
        "TorchRL PPO": (torchrl_ppo.train, TorchRLPPOConfig(**ppo)),
        "TorchRL, group-relative": (torchrl_ppo.train, TorchRLGRPOConfig(**grouped, steps=steps)),
        "UPO, trajectory_kl": (upo.train, UPOConfig(**grouped, regulariser="trajectory_kl", mine=0.0)),
        "UPO, terminal_kl": (upo.train, UPOConfig(**grouped, regulariser="terminal_kl", mine=0.0)),
        "MaskablePPO, uniform reference": (sb3_ppo.train, SB3PPOConfig(**uniform)),
        "MaskablePPO, entropy bonus": (entropy_bonus, SB3PPOConfig(**uniform)),
    }


# ---------------------------------------------------------------------- measuring
def measure(graph: exact.Graph, policy: OrderPolicy, reference: Reference, beta: float) -> dict[str, float]:
    """Exact values of a policy beside the two optima, averaged over starts.

    ``kl_to_optimum`` is KL(pi || pi*) averaged over the boards that pi visits.
    """
    with torch.no_grad():
        table, log_reference = exact.tabulate(graph, policy), exact.tabulate(graph, reference)
    best, far = exact.soft_optimal(graph, log_reference, beta), exact.terminal_optimal(graph, log_reference, beta)
    own, start = exact.evaluate(graph, table, log_reference), exact.evaluate(graph, log_reference)
    to_best = exact.evaluate(graph, table, best.policy).trajectory_kl
    steps = sum(float(v[~level.complete].sum()) for v, level in zip(own.visits, graph.levels, strict=True))
    mean = {
        "reference_reward": start.reward,
        "optimal_value": best.value,
        "value": own.reward - beta * own.trajectory_kl,
        "optimal_terminal_value": far.value,
        "terminal_value": own.reward - beta * own.terminal_kl,
        "reward": own.reward,
        "trajectory_kl": own.trajectory_kl,
        "terminal_kl": own.terminal_kl,
        "kl_to_optimum": to_best * graph.starts / steps,
    }
    return {name: float((graph.weight * value).sum()) for name, value in mean.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=list(PROBLEMS), required=True)
    parser.add_argument("--learners", nargs="+", help="names of learners; the default is all of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/exact"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console(width=140)
    problem = PROBLEMS[args.problem](args.runs)
    graph = problem.graph()
    rows: list[dict[str, Any]] = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    known = {(row["learner"], row["beta"], row["seed"]) for row in rows}
    for beta in BETAS:
        common = {
            "reference": "softmax_confidence",
            "tau": problem.tau,
            "beta": beta,
            "fill_temperature": problem.fill_temperature,
            "lr": 3e-3,
            "anneal": True,
            "shape": PolicyShape(copy=False, dim=32, layers=2, sure=2.0, readings=1),
            "seed": args.seed,
            "threads": args.threads,
        }
        # A sampled reward of 0 or 1 is noisy, and a small beta makes small differences count.
        groups = 64 if problem.fill_temperature else 16
        for name in learners({"out": "", **common}, problem.steps):
            if (name, beta, args.seed) in known or (args.learners and name not in args.learners):
                continue
            out = args.runs / args.problem / f"{name} {beta} {args.seed}".replace(", ", "-").replace(" ", "-")
            shutil.rmtree(out, ignore_errors=True)
            train, config = learners({"out": str(out), **common}, problem.steps, groups)[name]
            started = time.perf_counter()
            policy = train(config, problem.task, problem.denoiser).eval()
            seconds = time.perf_counter() - started
            row = {"learner": name, "beta": beta, "seed": args.seed, "seconds": round(seconds, 1)}
            rows.append(row | measure(graph, policy, make_reference(config), beta))
            command = "python benchmarks/exact_optimum.py " + " ".join(sys.argv[1:])
            date = datetime.date.today().isoformat()
            write_json(
                args.out,
                {"command": command, "date": date, "problem": args.problem, "boards": graph.boards, "rows": rows},
            )
            last = rows[-1]
            gap = 1 - last["value"] / last["optimal_value"]
            console.print(
                f"{args.problem} beta {beta} {name}: J {last['value']:.4f} of {last['optimal_value']:.4f} "
                f"({gap:.2%} short), KL to the optimum {last['kl_to_optimum']:.4f}, {seconds:.0f} s"
            )


if __name__ == "__main__":
    main()
