"""What the golden cases call of the package: the one file to change when its interfaces do."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

import tasks
from agents.policy import PACKAGED_POLICIES, load_policy
from pretrain.backbone import Backbone
from pretrain.checkpoint import packaged
from tests.golden.cases import Case
from unmask_env.denoiser import Denoiser, load_denoiser
from unmask_env.process import Unmasking
from unmask_env.reference import Policy, reference
from unmask_env.sb3_env import SB3VecEnv
from unmask_env.state import Rules
from unmask_env.torchrl_env import UnmaskTorchEnv
from unmask_env.vector_env import UnmaskVectorEnv

ID = "Unmask/Sudoku4x4-v0"


def digest(values: Any) -> str:
    """A short hash of an array of whole numbers or flags."""
    return hashlib.sha256(np.ascontiguousarray(np.asarray(values).astype(np.int64)).tobytes()).hexdigest()[:12]


def rounded(values: Any, decimals: int) -> str:
    """A short hash of floats, insensitive to their last bits."""
    scaled = np.asarray(values, dtype=np.float64).clip(-1e4, None) * 10**decimals
    return digest(np.round(scaled))


@cache
def _task(name: str) -> tasks.Task:
    return tasks.get(name)


@cache
def _denoiser(name: str, task: str) -> Denoiser:
    if name != "learned order":
        return load_denoiser(name, _task(task))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Backbone(4, _task(task).coordinates.tolist(), dim=16, layers=1, heads=2, order="context")
        torch.nn.init.normal_(model.order.revealing[-1].weight)
    return load_denoiser(model, _task(task))


def _policy(case: Case) -> Policy:
    if case.policy not in packaged(PACKAGED_POLICIES):
        return reference(case.policy)
    policy = load_policy(case.policy)
    return policy if case.at is None else policy.at(case.at)


def play(case: Case) -> dict[str, str]:
    """Hashes of the finished tokens, rewards, forwards, and the log-probabilities of the live actions."""
    task, denoiser = _task(case.task), _denoiser(case.denoiser, case.task)
    process = Unmasking(task, denoiser, Rules(**case.rules), case.temperature)
    generator = torch.Generator().manual_seed(3) if case.sampled else None
    fill_generator = torch.Generator().manual_seed(7) if case.temperature else None
    instances = task.heldout(case.instances)[: case.instances]
    played = process.rollout(_policy(case), instances, generator, fill_generator, record=True)
    log_prob = torch.cat([step.log_prob[step.alive] for step in played.steps])
    return {
        "tokens": digest(played.tokens),
        "reward": rounded(played.reward, 5),
        "nfe": digest(played.nfe),
        "log_prob": rounded(log_prob, 2),
    }


def actions_of(mask: np.ndarray, single: bool, draws: np.random.Generator) -> np.ndarray:
    """(N,) positions or (N, A) sets among what the masks (N, A) allow."""
    scores = draws.random(mask.shape) * mask
    return scores.argmax(1) if single else (scores > 0.6).astype(np.int64)


def play_interface(interface: str, actions: str, temperature: float) -> dict[str, str]:
    """Hashes of what three rows show: tokens, rewards, ends, and the reference's log-probabilities."""
    single, options = actions == "single", {"actions": actions, "temperature": temperature}
    seen: dict[str, list[np.ndarray]] = {"tokens": [], "reward": [], "ends": [], "log_reference": []}

    def note(observation: dict[str, np.ndarray], reward: Any, terminated: Any, truncated: Any) -> None:
        seen["tokens"].append(np.array(observation["tokens"]))
        seen["log_reference"].append(np.array(observation["log_reference"]))
        seen["reward"].append(np.array(reward))
        seen["ends"].append(np.stack([terminated, truncated]))

    draws = np.random.default_rng(0)
    if interface == "gym":
        for row in range(3):
            _one_row(row, single, options, note)
    elif interface == "torchrl":
        _torchrl(single, options, note, draws)
    else:
        envs = UnmaskVectorEnv(3, ID, **options)
        vec = SB3VecEnv(envs) if interface == "sb3" else None
        if vec is not None:
            vec.seed(5)
            observation = vec.reset()
        else:
            observation, _ = envs.reset(seed=5)
        for _ in range(30):
            action = actions_of(observation["action_mask"], single, draws)
            if vec is not None:
                observation, reward, done, infos = vec.step(action)
                cut = np.array([info.get("TimeLimit.truncated", False) for info in infos])
                note(observation, reward, done & ~cut, cut)
            else:
                observation, reward, terminated, truncated, _ = envs.step(action)
                note(observation, reward, terminated, truncated)
    return {
        "tokens": digest(np.stack(seen["tokens"])),
        "reward": rounded(np.stack(seen["reward"]), 5),
        "ends": digest(np.stack(seen["ends"])),
        "log_reference": rounded(np.stack(seen["log_reference"]), 2),
    }


def _one_row(row: int, single: bool, options: dict[str, Any], note: Any) -> None:
    draws = np.random.default_rng(row)
    env = gymnasium.make(ID, **options)
    observation, _ = env.reset(seed=5 + row)
    for _ in range(30):
        action = actions_of(observation["action_mask"][None], single, draws)[0]
        observation, reward, terminated, truncated, _ = env.step(action)
        note(observation, reward, terminated, truncated)
        if terminated or truncated:
            observation, _ = env.reset()


def _torchrl(single: bool, options: dict[str, Any], note: Any, draws: np.random.Generator) -> None:
    env = UnmaskTorchEnv(ID, 3, seed=5, **options)
    data = env.reset()
    for _ in range(30):
        action = actions_of(data["action_mask"].numpy(), single, draws)
        data["action"] = torch.as_tensor(action) if single else torch.as_tensor(action).bool()
        stepped, data = env.step_and_maybe_reset(data)
        after = stepped["next"]
        arrays = {key: _numpy(after[key]) for key in ("tokens", "log_reference")}
        ends = [_numpy(after[key])[:, 0] for key in ("terminated", "truncated")]
        note(arrays, _numpy(after["reward"])[:, 0], *ends)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.numpy(force=True)
