"""What a UPO rollout costs beside its denoiser forwards, in boards x steps per second.

    python benchmarks/rollouts.py [--denoiser sudoku6-tiny --policy sudoku6-tiny-upo]

Two loops over the same boards, taken in turn: a UPO rollout (denoiser, order policy, sampling, transition, recording),
and a bare loop of the same number of denoiser forwards of the same size. The ratio is the share of a rollout that the
denoiser itself takes; the median over the repeats is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import tasks
from agents.policy import load_policy
from agents.upo import Tempered
from unmask_env.denoiser import load_denoiser
from unmask_env.process import Unmasking


def measure(
    task_name: str, denoiser_name: str, policy_name: str, boards: int, repeats: int
) -> tuple[float, float, float]:
    """(rollout, bare loop, ratio): boards x steps per second of each, medians over ``repeats``."""
    task = tasks.get(task_name)
    denoiser = load_denoiser(denoiser_name, task)
    policy = Tempered(load_policy(policy_name, task), 1.0)
    process, generator = Unmasking(task, denoiser), torch.Generator().manual_seed(0)
    instances = task.sample(boards, generator)
    steps = int((instances.tokens == task.mask_id).sum(1).max())

    def play() -> None:
        process.rollout(policy, instances, generator, record=True)

    def bare() -> None:
        for _ in range(steps):
            denoiser(instances.tokens)

    seconds: dict[str, list[float]] = {"play": [], "bare": []}
    for repeat in range(repeats + 1):
        for name, loop in (("play", play), ("bare", bare)):
            started = time.perf_counter()
            loop()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    ratio = statistics.median(b / p for b, p in zip(seconds["bare"], seconds["play"], strict=True))
    work = boards * steps
    return work / statistics.median(seconds["play"]), work / statistics.median(seconds["bare"]), ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sudoku6")
    parser.add_argument("--denoiser", default="sudoku6-tiny")
    parser.add_argument("--policy", default="sudoku6-tiny-upo")
    parser.add_argument("--boards", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    play, bare, ratio = measure(args.task, args.denoiser, args.policy, args.boards, args.repeats)
    print(f"{args.denoiser} with {args.policy}, {args.boards} boards, {args.threads} threads")
    print(f"UPO rollout          {play:10,.0f} boards x steps / s")
    print(f"bare denoiser loop   {bare:10,.0f} boards x steps / s")
    print(f"ratio                {ratio:10.2f}")


if __name__ == "__main__":
    main()
