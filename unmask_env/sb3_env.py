"""The stable-baselines3 interface: a ``VecEnv`` over the vector environment, and a buffer of regularised rewards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, VectorEnv

from tasks import UnmaskError
from tasks.errors import optional
from unmask_env.distributions import regularised_reward
from unmask_env.encoding import log_reference_of, require_possible
from unmask_env.streams import read_seeds
from unmask_env.vector_env import RegularisedReward

with optional("the interface of stable-baselines3", "unmask[sb3]"):
    from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer
    from stable_baselines3.common.vec_env import VecEnv
    from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn


class SB3VecEnv(VecEnv):
    """:class:`unmask_env.vector_env.UnmaskVectorEnv` as stable-baselines3 wants it.

    A finished row starts anew in the same step; its last observation is ``infos[i]["terminal_observation"]``, and
    ``infos[i]`` holds the task's metrics. Masks: ``env_method("action_masks")``, which ``MaskablePPO`` calls by itself.

    Args:
        envs: the vector environment, in autoreset mode ``SAME_STEP``.

    Raises:
        UnmaskError: another autoreset mode; a :class:`unmask_env.vector_env.RegularisedReward`.
    """

    def __init__(self, envs: VectorEnv) -> None:
        if isinstance(envs, RegularisedReward):
            raise UnmaskError("stable-baselines3 hands no log-probabilities to a wrapper; use KLRolloutBuffer instead")
        mode = envs.unwrapped.autoreset_mode
        if mode != AutoresetMode.SAME_STEP:
            raise UnmaskError(f"stable-baselines3 needs autoreset_mode SAME_STEP, not {mode.name}")
        self.envs = envs
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def seed(self, seed: int | None = None) -> list[int | None]:
        return super().seed(None if seed is None else read_seeds(seed, self.num_envs)[0])

    def reset(self) -> dict[str, np.ndarray]:
        if any(self._options):
            raise UnmaskError("SB3VecEnv takes no options; call reset(options=...) of the vector environment")
        seeds = None if all(seed is None for seed in self._seeds) else list(self._seeds)
        observation, _ = self.envs.reset(seed=seeds)
        self._reset_seeds()
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        observation, reward, terminated, truncated, info = self.envs.step(self._actions)
        done = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if done.any():
            ended = {name: value for name, value in info["final_info"].items() if not name.startswith("_")}
            for row in np.flatnonzero(done):
                infos[row] = {name: value[row] for name, value in ended.items()}
                infos[row]["terminal_observation"] = info["final_obs"][row]
                infos[row]["TimeLimit.truncated"] = bool(truncated[row])
        return observation, reward, done, infos

    def close(self) -> None:
        self.envs.close()

    def get_images(self) -> list[np.ndarray | None]:
        return list(self.envs.render() or [None] * self.num_envs)

    # ------------------------------------------------------------------ what SB3 asks of "each environment"
    def has_attr(self, attr_name: str) -> bool:
        return hasattr(self.envs.unwrapped, attr_name)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self.envs.unwrapped, attr_name) for _ in self._rows(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        setattr(self.envs.unwrapped, attr_name, value)  # the boards share one environment

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        if method_name not in ("action_masks", "render"):
            raise UnmaskError(f"the boards share one environment; per row there are action_masks, not {method_name!r}")
        rows = getattr(self.envs.unwrapped, method_name)(*args, **kwargs)
        return [rows[row] for row in self._rows(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        return [False for _ in self._rows(indices)]

    def _rows(self, indices: VecEnvIndices) -> Iterable[int]:
        return self._get_indices(indices)


class KLRolloutBuffer(MaskableDictRolloutBuffer):
    """Stores r - beta * (log pi(a|s) - log g(a|s)) in place of r: ``MaskablePPO`` then maximises J(pi).

    ``MaskablePPO(..., rollout_buffer_class=KLRolloutBuffer, rollout_buffer_kwargs={"beta": 0.01}, gamma=1.0)``. The
    log-probabilities are those of the distribution that the actions were sampled from, and g's are in the observation.

    Raises:
        UnmaskError: a beta below 0; an action to which the reference gives probability 0, when it is added.

    Attributes:
        log_ratios: log pi(a|s) - log g(a|s) of the steps since the last reset, (N,) each; their mean times the episode
            length estimates the KL. Empty where beta is 0.
    """

    def __init__(self, *args: Any, beta: float = 0.0, **kwargs: Any) -> None:
        if not beta >= 0:
            raise UnmaskError(f"beta must be at least 0, not {beta}")
        self.beta = beta
        super().__init__(*args, **kwargs)

    def reset(self) -> None:
        self.log_ratios: list[np.ndarray] = []
        super().reset()

    def add(
        self,
        obs: dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: torch.Tensor,
        log_prob: torch.Tensor,
        action_masks: np.ndarray | None = None,
    ) -> None:
        if self.beta > 0:  # otherwise any reference will do, also one that excludes the action
            encoded = action.reshape(-1) if isinstance(self.action_space, Discrete) else action.astype(np.int64)
            log_reference = log_reference_of(obs["log_reference"], encoded)
            require_possible(log_reference)
            log_pi = log_prob.numpy(force=True)
            self.log_ratios.append(log_pi - log_reference)
            reward = regularised_reward(reward, log_pi, log_reference, self.beta)
        super().add(obs, action, reward, episode_start, value, log_prob, action_masks=action_masks)
