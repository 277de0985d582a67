"""The stable-baselines3 interface: a ``VecEnv`` over the vector environment, and a buffer of regularised rewards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, VectorEnv

from tasks import UnmaskError
from tasks.errors import optional
from unmask_env.distributions import regularised_reward
from unmask_env.encoding import log_reference_of, require_possible
from unmask_env.registration import lookup
from unmask_env.streams import read_options, read_seeds
from unmask_env.vector_env import RegularisedReward, UnmaskVectorEnv

with optional("the interface of stable-baselines3", "unmask[sb3]"):
    from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer
    from stable_baselines3.common.vec_env import VecEnv
    from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn


class SB3VecEnv(VecEnv):
    """:class:`unmask_env.vector_env.UnmaskVectorEnv` as stable-baselines3 wants it.

    A finished row starts anew in the same step; its last observation is ``infos[i]["terminal_observation"]``, and
    ``infos[i]`` holds the task's metrics. Masks: ``env_method("action_masks")``, which ``MaskablePPO`` calls by itself.

    ``set_options({"index": 3})``, or a list with an index per environment (``[{"index": 3}, {"index": 4}]``), chooses
    the held-out instances of the next reset, where the split is ``test`` or ``validation``.

    Args:
        envs: an environment's id, or a vector environment in autoreset mode ``SAME_STEP``.
        num_envs: with an id, how many boards. options: with an id, what ``gymnasium.make_vec`` takes beside them.

    Raises:
        UnknownNameError: an id that is not registered. UnmaskError: another autoreset mode; a
            :class:`unmask_env.vector_env.RegularisedReward`; ``num_envs`` or options beside an environment.
    """

    def __init__(self, envs: str | VectorEnv, num_envs: int | None = None, **options: Any) -> None:
        if isinstance(envs, str):
            lookup(envs)
            envs = gymnasium.make_vec(envs, num_envs=1 if num_envs is None else num_envs, **options)
        elif num_envs is not None or options:
            named = ", ".join((["num_envs"] if num_envs is not None else []) + list(options))
            raise UnmaskError(f"{named}: only with an environment's id; this environment is made already")
        if not isinstance(envs, VectorEnv) or not isinstance(envs.unwrapped, UnmaskVectorEnv):
            raise UnmaskError(f"SB3VecEnv takes an environment's id or an UnmaskVectorEnv, not {type(envs).__name__}")
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
        options = self._read_options()
        seeds = None if all(seed is None for seed in self._seeds) else list(self._seeds)
        observation, _ = self.envs.reset(seed=seeds, options=options)
        self._reset_seeds()
        self._reset_options()
        return observation

    def _read_options(self) -> dict[str, list[Any]] | None:
        """Those of ``set_options``, as the vector environment takes them."""
        given = [read_options(each, ("index",)) for each in self._options]
        if not any(given):
            return None
        if len(given) != self.num_envs or not all(given):
            raise UnmaskError(f"set_options takes an index for each of the {self.num_envs} environments, or for none")
        return {"index": [each["index"] for each in given]}

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
