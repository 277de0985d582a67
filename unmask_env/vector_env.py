"""The native vector interface: N boards, one denoiser forward per step for all of them."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from tasks import UnmaskError
from tasks.settings import AtLeast1, NotNegative, check
from unmask_env import render
from unmask_env.distributions import regularised_reward
from unmask_env.encoding import (
    DENOISED,
    LOG_ZERO,
    Arrays,
    action_space,
    as_numpy,
    for_maskable_ppo,
    for_sampling,
    log_reference_of,
    observation_space,
    read_actions,
    require_possible,
    to_action,
    to_numpy,
)
from unmask_env.process import checked_metrics
from unmask_env.reference import require_full_support
from unmask_env.state import State
from unmask_env.streams import Seen, Streams, read_options, read_seeds, whole

ROUNDING = 1e-3  # that a log-probability may be above 0


class UnmaskVectorEnv(VectorEnv):
    """N boards of :class:`unmask_env.gym_env.UnmaskEnv`; ``gym.make_vec(id, num_envs=N)`` makes it.

    Row i seeded with ``seed + i`` plays the same episodes as a single environment with that seed.

    Args:
        autoreset_mode: ``SAME_STEP`` (default): a finished row starts anew in the same step; its last observation is
            ``info["final_obs"][i]`` and its last info ``info["final_info"]``. ``NEXT_STEP``: the row shows its
            finished board with an all-ones action mask, and the next action is ignored and resets it. ``DISABLED``:
            call ``reset(options={"reset_mask": bool[N]})``; stepping a finished row raises.
        The others are those of the single environment.
    """

    metadata: ClassVar[dict[str, Any]] = {
        "render_modes": render.MODES,
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        env_id: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
        **options: Any,
    ) -> None:
        modes = {mode.name: mode for mode in AutoresetMode} | {mode.value: mode for mode in AutoresetMode}
        mode = autoreset_mode if isinstance(autoreset_mode, AutoresetMode) else modes.get(str(autoreset_mode))
        if mode is None:
            raise UnmaskError(f"autoreset_mode must be SAME_STEP, NEXT_STEP or DISABLED, not {autoreset_mode!r}")
        self.autoreset_mode = mode
        self.metadata = {**self.metadata, "autoreset_mode": mode}
        self.render_mode, self.num_envs = render.checked_mode(render_mode), num_envs
        check("max_episode_steps", max_episode_steps := whole(max_episode_steps), AtLeast1 | None)
        if max_episode_steps is not None:
            options["nfe_budget"] = min(max_episode_steps, options.get("nfe_budget") or max_episode_steps)
        self.streams = Streams(num_envs, env_id=env_id, **options)
        self.process, self.task = self.streams.process, self.streams.task
        self.state = self.streams.empty()
        self._seen: Seen | None = None
        self.single_observation_space = observation_space(self.process, self.streams.extras)
        self.single_action_space = action_space(self.process)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start all rows anew, or those of ``options["reset_mask"]``; from ``options["instances"]``, one per row that
        starts, or from the held-out ones of ``options["index"]``: a list with one index per row that starts, or one
        index for all of them."""
        seeds = None if seed is None else read_seeds(seed, self.num_envs)
        given = read_options(options, ("index", "instances", "reset_mask"))
        chosen = given.get("reset_mask")
        if chosen is None:
            chosen = np.ones(self.num_envs, dtype=bool)
        if (
            not isinstance(chosen, np.ndarray)
            or chosen.dtype != bool
            or chosen.shape != (self.num_envs,)
            or not chosen.any()
        ):
            raise UnmaskError(
                f"options['reset_mask'] must be a numpy bool array of shape ({self.num_envs},) with a True in it"
            )
        rows = np.flatnonzero(chosen).tolist()
        instances = self.streams.chosen(given, len(rows))
        super().reset(seed=seeds[0] if seeds and not np.ndim(seed) else None)
        if seeds or not self.streams.seeded:
            seeds = seeds or read_seeds(int(self.np_random.integers(2**31)), self.num_envs)
            self.streams.seed(seeds, rows if self.streams.seeded else None)
        self.state = self.streams.begin(self.state, rows, instances)
        self._seen = self.streams.observe(self.state)
        observation = self._observation()
        return observation, self._info(observation)

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        encoded = read_actions(actions, self.process, self.num_envs)
        if self._seen is None:
            raise UnmaskError("call reset() before step()")
        stale = to_numpy(self.state.done)  # NEXT_STEP: rows that ended before; whatever the action, they restart
        if self.autoreset_mode == AutoresetMode.DISABLED and stale.any():
            rows = np.flatnonzero(stale).tolist()
            raise UnmaskError(f"rows {rows} are finished; reset them with options={{'reset_mask': ...}} first")
        encoded[self.state.done] = 0
        state, reward = self.streams.step(self.state, self._seen.observation, to_action(encoded, self.process))
        state = self.streams.begin(state, np.flatnonzero(stale).tolist())
        terminated, truncated, illegal = (to_numpy(x) for x in (state.terminated, state.truncated, state.illegal))
        done = terminated | truncated
        info: dict[str, Any] = self._ended(state, done) if done.any() else {}
        if self.autoreset_mode == AutoresetMode.SAME_STEP and done.any():
            self.state, self._seen, rows, last = self.streams.autoreset(state)
            info = self._final(rows.tolist(), last) | {"final_info": info, "_final_info": done.copy()}
        else:
            self.state, self._seen = state, self.streams.observe(state)
        observation = self._observation()
        info |= self._info(observation) | {"illegal": illegal}
        return observation, to_numpy(reward), terminated, truncated, info

    def action_masks(self) -> np.ndarray:
        """(N, L) bool: the positions that may be chosen; all True on finished rows, where any action is ignored. For
        sets (N, 2 A), as sb3-contrib has it: per entry whether it may be out and whether it may be in."""
        return for_maskable_ppo(to_numpy(self.streams.action_mask(self.state)), self.process.rules)

    def render(self) -> tuple[str | np.ndarray, ...] | None:
        if self.render_mode is None:
            return None
        return tuple(render.board(self.task, self.state, row, self.render_mode) for row in range(self.num_envs))

    # ------------------------------------------------------------------ parts
    def _observation(self) -> dict[str, np.ndarray]:
        shown = as_numpy(self._seen.arrays)
        done, terminated = (x.numpy(force=True) for x in (self.state.done, self.state.terminated))
        if done.any():  # in the modes that leave finished boards to be seen
            shown["action_mask"][done] = 1
            for key in shown.keys() & DENOISED:
                shown[key][terminated] = 0
            shown["log_reference"][terminated] = LOG_ZERO
        return shown

    def _info(self, observation: dict[str, np.ndarray]) -> dict[str, Any]:
        return {
            "action_mask": for_sampling(observation["action_mask"], self.process.rules),
            "log_reference": observation["log_reference"].copy(),
            "nfe": to_numpy(self.state.steps),
        }

    def _ended(self, state: State, done: np.ndarray) -> dict[str, Any]:
        """The task's metrics of finished rows, in Gymnasium's vector layout (value and ``_`` mask)."""
        shown = checked_metrics(self.task, state.tokens, state.instances)
        metrics = {name: to_numpy(value) for name, value in shown.items()}
        metrics |= {"nfe": to_numpy(state.steps), "illegal": to_numpy(state.illegal)}
        out: dict[str, Any] = {}
        for name, value in metrics.items():
            out[name], out[f"_{name}"] = np.where(done, value, np.zeros_like(value)), done.copy()
        return out

    def _final(self, rows: list[int], last: Arrays) -> dict[str, Any]:
        shown = as_numpy(last)
        final = np.full(self.num_envs, None, dtype=object)
        for at, row in enumerate(rows):
            final[row] = {name: value[at] for name, value in shown.items()}
        present = np.zeros(self.num_envs, dtype=bool)
        present[rows] = True
        return {"final_obs": final, "_final_obs": present}


class RegularisedReward(VectorWrapper):
    """Rewards of the KL-regularised problem for training loops that know their policy's log-probabilities.

    ``step(actions, log_prob)`` takes (N,) log pi(a|s) of the distribution that the actions were sampled from and
    returns r - beta * (log pi(a|s) - log g(a|s)) (:func:`unmask_env.distributions.regularised_reward`); the
    task's own reward is ``info["task_reward"]``.

    Args:
        envs: a :class:`UnmaskVectorEnv`, wrapped or not, that resets in the same step or is reset by hand.
        beta: weight of the KL.

    Raises:
        UnmaskError: the reference is deterministic (its KL would be infinite), or the mode is ``NEXT_STEP``, whose
            resetting steps belong to no episode; in a step, an action to which the reference gives probability 0, or a
            ``log_prob`` that is no log-probability.
    """

    def __init__(self, envs: VectorEnv, beta: float) -> None:
        super().__init__(envs)
        require_full_support(envs.unwrapped.streams.reference)
        if envs.unwrapped.autoreset_mode == AutoresetMode.NEXT_STEP:
            raise UnmaskError("RegularisedReward needs autoreset_mode SAME_STEP or DISABLED, not NEXT_STEP")
        if isinstance(beta, int | float) and beta < 0:
            raise UnmaskError(f"beta must be at least 0, not {beta}")
        check("beta", beta, NotNegative)
        self.beta = beta
        self._log_reference: np.ndarray | None = None

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._log_reference = observation["log_reference"]
        return observation, info

    def step(
        self, actions: np.ndarray, log_prob: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        if self._log_reference is None:
            raise UnmaskError("call reset() before step()")
        encoded = to_numpy(read_actions(actions, self.unwrapped.process, self.num_envs))
        at_actions = log_reference_of(self._log_reference, encoded)
        require_possible(at_actions)
        log_prob = to_numpy(log_prob) if isinstance(log_prob, torch.Tensor) else log_prob
        log_prob = np.asarray(log_prob, dtype=np.float32)
        if log_prob.shape != (self.num_envs,):
            raise UnmaskError(f"log_prob must be of shape ({self.num_envs},), not {log_prob.shape}")
        if not (np.isfinite(log_prob) & (log_prob < ROUNDING)).all():
            shown = f"{log_prob.tolist()!r:.60}"
            raise UnmaskError(f"log_prob must be finite and at most 0, as of actions that were drawn, not {shown}")
        observation, reward, terminated, truncated, info = self.env.step(actions)
        regularised = regularised_reward(reward, log_prob, at_actions, self.beta)
        self._log_reference = observation["log_reference"]
        return observation, regularised, terminated, truncated, info | {"task_reward": reward}
