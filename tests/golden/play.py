"""What the golden cases call of the package: the one file to change when its interfaces do.

Everything goes in as names and options and comes out as plain tensors, so that cases, hashes and tests stay as they
are when the package's own types change. Shapes: N rows, L positions, A entries of an action (L, or 2 L with remasking).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

import tasks
from agents.policy import load_policy
from pretrain.backbone import Backbone
from pretrain.checkpoint import packaged
from tasks import Task
from unmask_env.denoiser import Denoiser, load_denoiser
from unmask_env.process import Unmasking
from unmask_env.reference import Policy, reference
from unmask_env.sb3_env import SB3VecEnv
from unmask_env.state import Rules
from unmask_env.torchrl_env import UnmaskTorchEnv

ENV, ROWS, SEED, STEPS = "Unmask/Sudoku4x4-v0", 3, 5, 40
ORDER_SEED, FILL_SEED = 3, 7
POLICIES = Path(__file__).parent / "policies"  # those of the time when the values were recorded
SHOWN = ("tokens", "log_reference")

Arrays = dict[str, np.ndarray]
Stepped = tuple[Arrays, Arrays, np.ndarray, np.ndarray, np.ndarray]


def play(
    task: str,
    denoiser: str,
    policy: str,
    rules: dict[str, Any],
    sampled: bool,
    temperature: float,
    instances: int,
    threshold: float | None = None,
) -> dict[str, Tensor]:
    """Fill the holes of a task's first held-out instances, and say how.

    Args:
        task, denoiser: names, the task's with its options; ``learned order`` is :func:`_learned_order`.
        policy: a reference with its options (``threshold:theta=0.8``) or a packaged policy; oracles get the answers.
        rules: the rules' settings, by name.
        sampled: draw actions from a generator seeded with ``ORDER_SEED``; otherwise the mode.
        temperature: of filling, from a generator seeded with ``FILL_SEED``; 0 is greedy.
        threshold: from which on a packaged policy over sets fills positions when not sampled; its own by default.

    Returns:
        ``tokens`` (N, L) int64 at the end, the mask being V; ``reward`` (N,); ``nfe`` (N,) int64 forwards; ``log_prob``
        (M,) of the actions taken, step after step, at each step of the rows that were not done.
    """
    loaded = _task(task)
    process = Unmasking(loaded, _denoiser(denoiser, task), Rules(**rules), temperature)
    played = process.rollout(
        _policy(policy, threshold),
        loaded.heldout(instances)[:instances],
        torch.Generator().manual_seed(ORDER_SEED) if sampled else None,
        torch.Generator().manual_seed(FILL_SEED) if temperature > 0 else None,
        record=True,
    )
    log_prob = torch.cat([step.log_prob[step.alive] for step in played.steps])
    return {"tokens": played.tokens, "reward": played.reward, "nfe": played.nfe, "log_prob": log_prob}


@cache
def _task(name: str) -> Task:
    return tasks.get(name)


@cache
def _denoiser(name: str, task: str) -> Denoiser:
    loaded = _task(task)
    return load_denoiser(_learned_order(loaded) if name == "learned order" else name, loaded)


def _learned_order(task: Task) -> Backbone:
    """A small untrained backbone whose order depends on the sequence: the last weights of its network are not 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Backbone(task.vocab_size, task.coordinates.tolist(), dim=16, layers=1, heads=2, order="context")
        torch.nn.init.normal_(model.order.revealing[-1].weight)
    return model


def _policy(name: str, threshold: float | None) -> Policy:
    if name not in packaged(POLICIES):
        return reference(name)
    policy = load_policy(POLICIES / name)
    return policy if threshold is None else policy.at(threshold)


def play_interface(kind: str, rules: dict[str, Any], temperature: float) -> dict[str, Tensor]:
    """Play ``ROWS`` rows for ``STEPS`` steps; those that end start anew at once. The actions depend only on the masks.

    Args:
        kind: ``gym`` (single environments side by side), ``vector`` (SAME_STEP), ``sb3`` or ``torchrl``. Row i is
            seeded with ``SEED`` + i.
        rules: the environment's settings, by name. temperature: of filling.

    Returns:
        ``tokens`` (2 T + 1, N, L) and ``log_reference`` (2 T + 1, N, A): at the reset; then of each step first as it
        ended, then as play goes on, which differ in rows that start anew. ``reward`` (T, N); ``ends`` (T, 2, N):
        terminated, truncated.
    """
    begin = {"gym": _gym, "vector": _vector, "sb3": _sb3, "torchrl": _torchrl}[kind]
    observation, step = begin({"temperature": temperature} | rules)
    draws, shown, rewards, ends = np.random.default_rng(0), [observation], [], []
    for _ in range(STEPS):
        action = _action(observation, rules["actions"], draws)
        last, observation, reward, terminated, truncated = step(action)
        shown += [last, observation]
        rewards.append(reward)
        ends.append([terminated, truncated])
    stacked = {key: np.stack([arrays[key] for arrays in shown]) for key in SHOWN}
    stacked |= {"reward": np.stack(rewards), "ends": np.array(ends)}
    return {key: torch.from_numpy(values) for key, values in stacked.items()}


def _action(observation: Arrays, actions: str, draws: np.random.Generator) -> np.ndarray:
    """(N,) positions, or (N, A) sets, among what the masks allow; some sets are empty. Seldom a position to remask."""
    mask, length = observation["action_mask"], observation["tokens"].shape[1]
    scores = draws.random(mask.shape) * mask
    if actions == "single":
        return scores.argmax(1)
    return (scores > np.where(np.arange(mask.shape[1]) < length, 0.6, 0.9)).astype(np.int64)


# Each of these takes the environment's options and gives the first observation and a step: from actions to the rows as
# the step left them, the rows as play goes on, (N,) reward, terminated, truncated.


def _gym(options: dict[str, Any]) -> tuple[Arrays, Callable[[np.ndarray], Stepped]]:
    envs = [gymnasium.make(ENV, **options) for _ in range(ROWS)]

    def step(action: np.ndarray) -> Stepped:
        results = [env.step(row) for env, row in zip(envs, action, strict=True)]
        last, reward, terminated, truncated, _ = zip(*results, strict=True)
        ended = np.logical_or(terminated, truncated)
        following = [env.reset()[0] if ended[row] else last[row] for row, env in enumerate(envs)]
        return _stack(last), _stack(following), *(np.array(values) for values in (reward, terminated, truncated))

    return _stack([env.reset(seed=SEED + row)[0] for row, env in enumerate(envs)]), step


def _vector(options: dict[str, Any]) -> tuple[Arrays, Callable[[np.ndarray], Stepped]]:
    envs = gymnasium.make_vec(ENV, num_envs=ROWS, **options)

    def step(action: np.ndarray) -> Stepped:
        following, reward, terminated, truncated, info = envs.step(action)
        last = _with_final(following, info.get("final_obs", [None] * ROWS))
        return last, _arrays(following), reward, terminated, truncated

    return _arrays(envs.reset(seed=SEED)[0]), step


def _sb3(options: dict[str, Any]) -> tuple[Arrays, Callable[[np.ndarray], Stepped]]:
    envs = SB3VecEnv(gymnasium.make_vec(ENV, num_envs=ROWS, **options))
    envs.seed(SEED)

    def step(action: np.ndarray) -> Stepped:
        following, reward, done, infos = envs.step(action)
        truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        last = _with_final(following, [info.get("terminal_observation") for info in infos])
        return last, _arrays(following), reward, done & ~truncated, truncated

    return _arrays(envs.reset()), step


def _torchrl(options: dict[str, Any]) -> tuple[Arrays, Callable[[np.ndarray], Stepped]]:
    env = UnmaskTorchEnv(ENV, ROWS, seed=SEED, **options)
    data = env.reset()

    def step(action: np.ndarray) -> Stepped:
        nonlocal data
        data["action"] = torch.from_numpy(action).to(env.action_spec.dtype)
        stepped, data = env.step_and_maybe_reset(data)
        last = stepped["next"]
        flags = (last[key].squeeze(1).numpy() for key in ("reward", "terminated", "truncated"))
        return _arrays(last), _arrays(data), *flags

    return _arrays(data), step


def _arrays(shown: Any) -> Arrays:
    return {key: np.asarray(shown[key]).copy() for key in (*SHOWN, "action_mask")}


def _stack(rows: Sequence[Arrays]) -> Arrays:
    return {key: np.stack([row[key] for row in rows]) for key in (*SHOWN, "action_mask")}


def _with_final(following: Arrays, final: Sequence[Arrays | None]) -> Arrays:
    """The rows as a step left them: of those that ended the ``final`` observation."""
    rows = [{key: values[row] for key, values in following.items()} for row in range(ROWS)]
    return _stack([row if last is None else last for row, last in zip(rows, final, strict=True)])
