"""What a UPO rollout costs beside its denoiser forwards, in boards x steps per second.

    python benchmarks/rollouts.py [--denoiser sudoku6-tiny --policy sudoku6-tiny-rewards]

Two loops over the same boards, taken in turn: a UPO rollout (denoiser, order policy, sampling, transition, recording),
and a bare loop of the same number of denoiser forwards of the same size. The ratio is the share of a rollout that the
denoiser itself takes; the median over the repeats is printed.
"""

from __future__ import annotations

import statistics

import torch
import tyro
from common import interleaved, median_ratio

import tasks
from agents.policy import load_policy
from agents.upo import Tempered
from unmask_env.denoiser import load_denoiser
from unmask_env.process import Unmasking


def main(
    task: str = "sudoku6",
    denoiser: str = "sudoku6-tiny",
    policy: str = "sudoku6-tiny-rewards",
    boards: int = 256,
    repeats: int = 5,
    threads: int | None = None,
) -> None:
    torch.set_num_threads(threads or torch.get_num_threads())
    game = tasks.get(task)
    frozen, tempered = load_denoiser(denoiser, game), Tempered(load_policy(policy, game), 1.0)
    process, generator = Unmasking(game, frozen), torch.Generator().manual_seed(0)
    instances = game.sample(boards, generator)
    steps = int((instances.tokens == game.mask_id).sum(1).max())

    def play() -> None:
        process.rollout(tempered, instances, generator, record=True)

    def bare() -> None:
        for _ in range(steps):
            frozen(instances.tokens)

    spent = interleaved({"UPO rollout": play, "bare denoiser loop": bare}, repeats)
    print(f"{denoiser} with {policy}, {boards} boards, {torch.get_num_threads()} threads")
    for name, seconds in spent.items():
        print(f"{name:20s} {boards * steps / statistics.median(seconds):10,.0f} boards x steps / s")
    print(f"{'ratio':20s} {median_ratio(spent['bare denoiser loop'], spent['UPO rollout']):10.2f}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
