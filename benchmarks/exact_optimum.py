"""Do the learners reach the exact optimum of J(pi) = E[r] - beta * KL? On problems small enough to solve exactly.

    python benchmarks/exact_optimum.py --problem sudoku --threads 1 --out benchmarks/results/exact-optimum-sudoku.json

Problems: *sudoku*, a 4x4 board with 7 blanks and a denoiser stopped after 100 steps; *letters*, a correlated
distribution over four letters with its exact conditionals, rewarded by the likelihood of the finished word; *misled*,
five letters where the reference is wrong on purpose; and *sampled*, where filling is sampled, from a denoiser that sees
neighbours only, so that a reward is noisy and the two KLs part. Three betas, and every learner. The optimum, a policy's
value and its divergences are exact (unmask_env/exact.py). Runs that are already in the output are kept.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from common import report
from rich.console import Console
from torch import Tensor

from agents import policy_iteration, sb3_ppo, torchrl_ppo, upo
from agents.critic import new_critic
from agents.policy import OrderPolicy, PolicyConfig
from agents.policy_iteration import PolicyIterationConfig
from agents.sb3_ppo import SB3PPOConfig
from agents.setup import seeded, setup_on_policy
from agents.torchrl_ppo import TorchRLGRPOConfig, TorchRLPPOConfig
from agents.upo import UPOConfig
from pretrain.train import MDMConfig, pretrain
from tasks import Instances, Sudoku, Task
from unmask_env import exact
from unmask_env.denoiser import TableDenoiser, load_denoiser
from unmask_env.process import Unmasking
from unmask_env.reference import Reference, reference
from unmask_env.sb3_env import SB3VecEnv
from unmask_env.state import Denoised
from unmask_env.vector_env import UnmaskVectorEnv

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

    def __call__(self, tokens: Tensor, where: Tensor | None = None) -> Denoised:
        parts = []
        for position in range(self.length):
            near = torch.full_like(tokens, self.mask_id)
            for at in (position - 1, position + 1):
                if 0 <= at < self.length:
                    near[:, at] = tokens[:, at]
            parts.append(super().__call__(near).log_probs[:, position])
        self.calls -= self.length - 1
        return Denoised.of(torch.stack(parts, 1))


class Problem(NamedTuple):
    """``steps`` are those of two episodes: what the PPOs play per iteration, on as many boards as make about 1,000.
    ``continuations`` and ``kept``: how often policy iteration plays each candidate to the end, and the iterations whose
    states it fits: noise is averaged by either, and boards that play at length are better kept. ``fit``: steps of each
    fit."""

    process: Unmasking
    tau: float
    steps: int
    continuations: int = 16
    kept: int = 1
    fit: int = 200


def correlated(vocab_size: int, length: int, seed: int) -> Tensor:
    """(V,) * L probabilities far from independent."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn((vocab_size,) * length, generator=generator, dtype=torch.float64)).exp()


def sudoku(runs: Path, boards: int) -> Problem:
    size = {"dim": 48, "layers": 3, "batch": 128, "steps": 100, "lr": 3e-3, "warmup": 50, "ema": 0.95}
    settings = MDMConfig(task="sudoku4", out=str(runs / "denoiser"), resume="auto", **size)
    task = Sudoku(2, 2, blanks=7, reward="cell_accuracy")
    # Of the first three, the one where the reference does worst.
    board = Fixed(task, task.heldout(3)[2:] if boards == 1 else task.heldout(boards))
    return Problem(Unmasking(board, load_denoiser(pretrain(settings), board)), 0.05, 14, 4, 4)


def letters(runs: Path, boards: int) -> Problem:
    joint = correlated(3, 4, seed=3)
    task = Word(joint / joint.max())  # how likely the word is that an order ends with
    return Problem(Unmasking(task, TableDenoiser(joint, task)), 0.1, 8)


def sampled(runs: Path, boards: int) -> Problem:
    joint = correlated(3, 4, seed=0)
    likely = Word((joint >= joint.flatten().sort(descending=True).values[1]).float())  # the two likeliest words
    return Problem(Unmasking(likely, Neighbours(joint, likely), temperature=1.0), 0.2, 8, 256, 4)


def misled(runs: Path, boards: int) -> Problem:
    rewards = torch.zeros((3,) * 5)
    rewards[1, 0, 1, 0, 0] = 1.0  # the reference finishes with this word once in 25 times, some orders always
    task = Word(rewards)
    return Problem(Unmasking(task, Neighbours(correlated(3, 5, seed=27), task)), 0.1, 10)


PROBLEMS = {"sudoku": sudoku, "letters": letters, "misled": misled, "sampled": sampled}


# ---------------------------------------------------------------------- learners
def entropy_bonus(config: SB3PPOConfig, process: Unmasking) -> OrderPolicy:
    """MaskablePPO with stable-baselines3's own regulariser, ``ent_coef``, in place of the KL in the reward."""
    ready, steps = setup_on_policy(config, process)
    config, process, _, policy = ready
    played = {"task": process.task, "denoiser": process.denoiser, "temperature": process.temperature}
    envs = SB3VecEnv(UnmaskVectorEnv(config.num_envs, **played))
    model = sb3_ppo.make_model(replace(config, beta=0.0), envs, policy, new_critic(process.task, config.seed), steps)
    model.ent_coef = config.beta
    model.lr_schedule = lambda left: config.lr * left
    with seeded(torch.Generator().manual_seed(config.seed)) as seed:
        envs.seed(seed)
        model.learn(config.iterations * config.num_envs * steps)
    return policy


def recipes(
    common: dict[str, Any], posed: Problem, groups: int = 16
) -> dict[str, tuple[Callable[..., OrderPolicy], Any]]:
    """Per learner its function and settings."""
    steps = posed.steps
    ppo = common | {"num_envs": 64 if steps > 10 else 128, "steps": steps, "epochs": 4, "iterations": 120}
    ppo |= {"gae_lambda": 1.0}
    grouped = common | {"puzzles": groups, "group": 16, "epochs": 2, "iterations": 80}
    upos = grouped | {"imitation": 0}
    uniform = ppo | {"reference": "random"}
    own = {name: value for name, value in common.items() if name != "anneal"}
    iterated = own | {"labels": "values", "sampled": True, "iterations": 12, "puzzles": 128, "steps": posed.fit}
    iterated |= {"capacity": posed.kept * 128 * steps // 2, "levels": steps // 2, "states": 128 * steps}
    iterated |= {"continuations": posed.continuations, "validate_every": 0}
    return {
        "policy iteration": (policy_iteration.train, PolicyIterationConfig(**iterated)),
        "UPO, step_kl": (upo.train, UPOConfig(**upos, regulariser="step_kl")),
        "MaskablePPO": (sb3_ppo.train, SB3PPOConfig(**ppo)),
        "TorchRL PPO": (torchrl_ppo.train, TorchRLPPOConfig(**ppo)),
        "TorchRL, group-relative": (torchrl_ppo.train, TorchRLGRPOConfig(**grouped, steps=steps)),
        "UPO, trajectory_kl": (upo.train, UPOConfig(**upos, regulariser="trajectory_kl")),
        "UPO, terminal_kl": (upo.train, UPOConfig(**upos, regulariser="terminal_kl")),
        "MaskablePPO, uniform reference": (sb3_ppo.train, SB3PPOConfig(**uniform)),
        "MaskablePPO, entropy bonus": (entropy_bonus, SB3PPOConfig(**uniform)),
    }


# ---------------------------------------------------------------------- measuring
def measure(graph: exact.Graph, policy: OrderPolicy, g: Reference, beta: float) -> dict[str, float]:
    """Exact values of a policy beside the two optima, averaged over starts.

    ``kl_to_optimum`` is KL(pi || pi*) averaged over the boards that pi visits.
    """
    with torch.no_grad():
        table, log_reference = exact.tabulate(graph, policy), exact.tabulate(graph, g)
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
    means = {name: float((graph.weight * value).sum()) for name, value in mean.items()}
    return means | {"gap_percent": 100 * (1 - means["value"] / means["optimal_value"])}


def main(
    problem: Literal["sudoku", "letters", "misled", "sampled"],
    out: Path,
    learners: tuple[str, ...] = (),
    seed: int = 0,
    boards: int = 1,
    runs: Path = Path("runs/exact"),
    threads: int | None = None,
    betas: tuple[float, ...] = BETAS,
    dim: int = 32,
    fit: int | None = None,
    continuations: int | None = None,
) -> None:
    """Args: learners: names of learners; the default is all of them. boards: of Sudoku. dim: channels of the policies.
    fit, continuations: of policy iteration, in place of the problem's (:class:`Problem`)."""
    torch.set_num_threads(threads or torch.get_num_threads())
    console = Console(width=140)
    posed = PROBLEMS[problem](runs, boards)
    posed = posed._replace(fit=fit or posed.fit, continuations=continuations or posed.continuations)
    task = posed.process.task
    starts = task.instances if isinstance(task, Fixed) else task.sample(1, torch.Generator().manual_seed(0))
    graph = exact.enumerate_boards(posed.process, starts)
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.exists() else []
    known = {(row["learner"], row["beta"], row["seed"]) for row in rows}
    for beta in betas:
        common = {"beta": beta, "lr": 3e-3, "anneal": True, "seed": seed, "threads": threads}
        common |= {"fill_temperature": posed.process.temperature, "reference": f"softmax_confidence:tau={posed.tau}"}
        common |= {"policy": PolicyConfig(copy=False, dim=dim, layers=2, defer_above=2.0, num_passes=1)}
        # A sampled reward of 0 or 1 is noisy, and a small beta makes small differences count.
        groups = 64 if posed.process.temperature else 16
        for name in recipes({"out": "", **common}, posed):
            if (name, beta, seed) in known or (learners and name not in learners):
                continue
            folder = runs / f"{problem}{boards}" / f"{name} {beta} {seed}".replace(", ", "-").replace(" ", "-")
            shutil.rmtree(folder, ignore_errors=True)
            train, config = recipes({"out": str(folder), **common}, posed, groups)[name]
            started = time.perf_counter()
            policy = train(config, posed.process).eval()
            seconds = time.perf_counter() - started
            row = {"learner": name, "beta": beta, "seed": seed, "seconds": round(seconds, 1)}
            rows.append(row | measure(graph, policy, reference(config.reference), beta))
            report(out, problem=problem, boards=graph.boards, rows=rows)
            last = rows[-1]
            gap = 1 - last["value"] / last["optimal_value"]
            console.print(
                f"{problem} beta {beta} {name}: J {last['value']:.4f} of {last['optimal_value']:.4f} "
                f"({gap:.2%} short), KL to the optimum {last['kl_to_optimum']:.4f}, {seconds:.0f} s"
            )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
