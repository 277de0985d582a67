"""What the interfaces cost beside the denoiser: CPU time of a vector step, on one thread, as ratios taken in one run.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json

64 boards of 81 positions and 10 symbols, with a denoiser that returns a constant array. *Bare* is the same transition
written out in plain torch: forward, sorted symbols, entropy, reference log-probabilities, filling, legality, reward,
fresh boards for the finished ones, arrays for the host. Repeats are interleaved; the median of the ratios is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from tasks import Instances, Task
from unmask_env.state import Denoised
from unmask_env.vector_env import UnmaskVectorEnv

TARGETS = {"native / bare": 1.0, "SB3 / native": 1.3, "TorchRL step / bare": 3.0, "TorchRL Collector / bare": 7.0}


class Letters(Task):
    """Complete 81 letters from nothing; the reward is the share that agrees with the answer."""

    name, symbols, shape = "letters", tuple("abcdefghij"), (9, 9)

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        answers = torch.randint(10, (n, 81), generator=generator, device=generator.device)
        return Instances(torch.full_like(answers, self.mask_id), answers)

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return (tokens == instances.answers).float().mean(1)


class Constant:
    """A denoiser that costs nothing."""

    hidden_dim, device, calls = None, torch.device("cpu"), 0

    def __init__(self, n: int) -> None:
        self.log_probs = torch.randn(n, 81, 10, generator=torch.Generator().manual_seed(0)).log_softmax(-1)

    def __call__(self, tokens: Tensor, where: Tensor | None = None) -> Denoised:
        return Denoised.of(self.log_probs[: len(tokens)])


def bare(task: Task, denoiser: Constant, n: int) -> Callable[[np.ndarray], None]:
    """The transition in plain torch."""
    pool = task.sample(4096, torch.Generator().manual_seed(0))
    state = {"tokens": pool.tokens[:n], "fillable": torch.ones(n, 81, dtype=torch.bool), "answers": pool.answers[:n]}
    state["log_probs"] = denoiser(state["tokens"]).log_probs
    at = n

    def step(action: np.ndarray) -> None:
        nonlocal at
        position = torch.as_tensor(action).unsqueeze(1)
        legal = state["fillable"].gather(1, position)
        chosen = torch.zeros_like(state["fillable"]).scatter(1, position, legal)
        tokens = torch.where(chosen, state["log_probs"].argmax(-1), state["tokens"])
        left = state["fillable"] & ~chosen
        done = ~left.any(1)
        reward = torch.where(done, task.reward(tokens, Instances(tokens, state["answers"])), 0.0)
        if bool(done.any()):
            rows = done.nonzero().flatten()
            fresh = pool[torch.arange(at, at + len(rows)) % len(pool)]
            at += len(rows)
            tokens, left, answers = tokens.clone(), left.clone(), state["answers"].clone()
            tokens[rows], left[rows], answers[rows] = fresh.tokens, True, fresh.answers
            state["answers"] = answers
        log_probs = denoiser(tokens).log_probs
        top = log_probs.sort(dim=-1, descending=True, stable=True)
        probabilities = top.values.exp()
        entropy = -torch.xlogy(probabilities, probabilities).sum(-1)
        score = (log_probs.max(-1).values.exp() / 0.05).masked_fill(~left, -torch.inf)
        log_reference = score.log_softmax(-1).masked_fill(~left, -torch.inf).clamp(min=-1e4)
        state.update(tokens=tokens, fillable=left, log_probs=log_probs)
        shown = (tokens, left, top.indices, top.values.clamp(-20.0, 0.0), entropy, log_reference, reward, done)
        _ = [part.numpy().copy() for part in shown]

    return step


def loops(n: int, seed: int = 0) -> dict[str, Callable[[], int]]:
    """Per path a function that makes 81 vector steps and returns how many it made."""
    from torchrl.collectors import Collector

    from unmask_env.sb3_env import SB3VecEnv
    from unmask_env.torchrl_env import UnmaskTorchEnv

    task, denoiser = Letters(), Constant(n)
    rng = np.random.default_rng(seed)
    orders = np.stack([rng.permutation(81) for _ in range(n)])
    # Rows end at different times, as boards with clues do.
    ahead = [orders[np.arange(n), (step + np.arange(n)) % 81] for step in range(81)]

    plain = bare(task, denoiser, n)
    native = UnmaskVectorEnv(n, task=task, denoiser=denoiser)
    native.reset(seed=seed)
    adapted = SB3VecEnv(UnmaskVectorEnv(n, task=task, denoiser=denoiser))
    adapted.seed(seed)
    adapted.reset()
    env = UnmaskTorchEnv(num_envs=n, task=task, denoiser=denoiser, seed=seed)
    carried = {"td": env.reset()}

    def along(step: Callable[[np.ndarray], object]) -> Callable[[], int]:
        def run() -> int:
            for action in ahead:
                step(action)
            return 81

        return run

    def torchrl_step(action: np.ndarray) -> None:
        _, carried["td"] = env.step_and_maybe_reset(carried["td"].set("action", torch.as_tensor(action)))

    def first_fillable(td):
        return td.set("action", td["action_mask"].int().argmax(-1))

    collected = iter(
        Collector(
            UnmaskTorchEnv(num_envs=n, task=task, denoiser=denoiser, seed=seed),
            first_fillable,
            frames_per_batch=81 * n,
            total_frames=-1,
            auto_register_policy_transforms=False,
        )
    )

    def collect() -> int:
        next(collected)
        return 81

    return {
        "bare": along(plain),
        "native": along(native.step),
        "SB3": along(adapted.step),
        "TorchRL step": along(torchrl_step),
        "TorchRL Collector": collect,
    }


def measure(n: int = 64, repeats: int = 7) -> tuple[dict[str, float], dict[str, float]]:
    """(microseconds of CPU time per vector step, ratios), medians over ``repeats``."""
    paths = loops(n)
    spent: dict[str, list[float]] = {name: [] for name in paths}
    for repeat in range(repeats + 1):
        for name, path in paths.items():
            started = time.process_time()
            steps = path()
            if repeat:  # the first round warms up
                spent[name].append(1e6 * (time.process_time() - started) / steps)
    ratios = {}
    for name in TARGETS:
        above, below = name.split(" / ")
        ratios[name] = statistics.median(a / b for a, b in zip(spent[above], spent[below], strict=True))
    return {name: statistics.median(values) for name, values in spent.items()}, ratios


def main(boards: int = 64, repeats: int = 7, out: Path | None = None) -> None:
    from common import report

    torch.set_num_threads(1)
    microseconds, ratios = measure(boards, repeats)
    for name, value in microseconds.items():
        print(f"{name:28s}{value:10.0f} us of CPU per step of {boards} boards")
    for name, value in ratios.items():
        print(f"{name:28s}{value:10.2f} (at most {TARGETS[name]})")
    report(out, microseconds=microseconds, ratios=ratios)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
