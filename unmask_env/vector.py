"""The native vector face: N boards, one denoiser forward per step for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from pretrain.backbone import Backbone
from tasks import Task, UnmaskError
from unmask_env import render
from unmask_env.boards import Boards, to_numpy
from unmask_env.core import Denoised, OnIllegal, Transition
from unmask_env.denoiser import Denoiser


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
        "render_modes": ["ansi", "rgb_array"],
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        env_id: str | None = None,
        task: str | Task | None = None,
        denoiser: str | Path | Backbone | Denoiser | None = None,
        on_illegal: OnIllegal = "noop",
        temperature: float = 0.0,
        device: str = "cpu",
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        if num_envs < 1:
            raise UnmaskError(f"num_envs must be at least 1, not {num_envs}")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise UnmaskError(f"render_mode must be one of {self.metadata['render_modes']}, not {render_mode!r}")
        modes = {mode.name: mode for mode in AutoresetMode} | {mode.value: mode for mode in AutoresetMode}
        mode = autoreset_mode if isinstance(autoreset_mode, AutoresetMode) else modes.get(autoreset_mode)
        if mode is None:
            raise UnmaskError(f"autoreset_mode must be SAME_STEP, NEXT_STEP or DISABLED, not {autoreset_mode!r}")
        self.autoreset_mode = mode
        self.metadata = {**self.metadata, "autoreset_mode": mode}
        self.render_mode, self.num_envs = render_mode, num_envs
        self.boards = Boards(num_envs, env_id, task, denoiser, on_illegal, temperature, device)
        if max_episode_steps is not None:
            self.boards.max_steps = max_episode_steps
        self.task = self.boards.task
        self.single_observation_space, self.single_action_space = self.boards.spaces()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._done = np.ones(num_envs, dtype=bool)
        self._terminated = np.zeros(num_envs, dtype=bool)  # of those: their boards show no features

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start all rows anew, or those of ``options["reset_mask"]``, from ``options["instances"]`` if given."""
        options = options or {}
        if isinstance(seed, int | np.integer):
            seed = int(seed)
        super().reset(seed=seed if isinstance(seed, int) else None)
        chosen = options.get("reset_mask")
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
        if seed is not None or not self.boards.seeded:
            if seed is None:
                seed = int(self.np_random.integers(2**31))
            seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
            self.boards.seed(seeds, np.flatnonzero(chosen).tolist() if self.boards.seeded else None)
        self.boards.begin(np.flatnonzero(chosen).tolist(), options.get("instances"))
        self._done[chosen] = self._terminated[chosen] = False
        self.boards.observe()
        return self._observation(), self._info()

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        actions = np.array(actions)
        if actions.shape != (self.num_envs,) or not np.issubdtype(actions.dtype, np.integer):
            raise UnmaskError(f"actions must be {self.num_envs} integers, not {actions.dtype} of shape {actions.shape}")
        if self.autoreset_mode == AutoresetMode.DISABLED and self._done.any():
            rows = np.flatnonzero(self._done).tolist()
            raise UnmaskError(f"rows {rows} are finished; reset them with options={{'reset_mask': ...}} first")
        stale = self._done.copy()  # NEXT_STEP: finished in the step before; whatever the action, they restart now
        # Complete boards idle by themselves; a truncated one is kept from an illegal action, its step is dropped.
        actions = np.where(stale, to_numpy(self.boards.state.open.int().argmax(1)), actions)
        transition = self.boards.step(actions, idle=stale)
        if stale.any():
            restarted = torch.as_tensor(stale, device=self.boards.device)
            transition = Transition(
                transition.state,
                transition.reward.masked_fill(restarted, 0.0),
                transition.terminated & ~restarted,
                transition.truncated & ~restarted,
                transition.illegal & ~restarted,
            )
            self.boards.begin(np.flatnonzero(stale).tolist())
        terminated, truncated = to_numpy(transition.terminated), to_numpy(transition.truncated)
        done = terminated | truncated
        info: dict[str, Any] = {}
        if self.autoreset_mode == AutoresetMode.SAME_STEP and done.any():
            final = self.boards.state
            rows, cut = np.flatnonzero(done), torch.as_tensor(truncated, device=self.boards.device)
            self.boards.begin(rows.tolist())
            extra = self.boards.observe(final.tokens[cut])  # only truncated boards need the denoiser's last word
            info = self._final(final.tokens, final.open, rows, cut, extra) | {
                "final_info": self._ended(transition, done)
            }
        else:
            self.boards.observe()
            self._done, self._terminated = done, terminated.copy()
            if done.any():
                info = self._ended(transition, done)
        info |= self._info() | {"illegal": to_numpy(transition.illegal)}
        return self._observation(), to_numpy(transition.reward), terminated, truncated, info

    def action_masks(self) -> np.ndarray:
        """(N, L) bool: the open positions; all True on finished rows, where any action is ignored."""
        return to_numpy(self.boards.state.open) | self._done[:, None]

    def render(self) -> tuple[str | np.ndarray, ...] | None:
        if self.render_mode is None:
            return None
        return tuple(render.board(self.task, self.boards.state, row, self.render_mode) for row in range(self.num_envs))

    # ------------------------------------------------------------------ parts
    def _observation(self) -> dict[str, np.ndarray]:
        state = self.boards.state
        arrays = self.boards.arrays(state.tokens, state.open, self.boards.denoised)
        arrays["action_mask"] = self.action_masks().astype(np.int8)
        for name in ("top_tokens", "top_log_probs"):
            arrays[name][self._terminated] = 0
        return arrays

    def _info(self) -> dict[str, Any]:
        return {"action_mask": self.action_masks().astype(np.int8), "nfe": to_numpy(self.boards.state.steps)}

    def _ended(self, transition: Transition, done: np.ndarray) -> dict[str, Any]:
        """The task's metrics of finished rows, in Gymnasium's vector layout (value and ``_`` mask)."""
        state = transition.state
        measured = {k: to_numpy(v) for k, v in self.task.metrics(state.tokens, state.instances).items()}
        measured["nfe"] = to_numpy(state.steps)
        measured["illegal"] = to_numpy(transition.illegal)
        out: dict[str, Any] = {}
        for name, value in measured.items():
            out[name], out[f"_{name}"] = np.where(done, value, np.zeros_like(value)), done.copy()
        return out

    def _final(
        self, tokens: Tensor, open: Tensor, rows: np.ndarray, cut: Tensor, extra: Denoised | None
    ) -> dict[str, Any]:
        finished = self.boards.arrays(tokens, open, None)
        if extra is not None:
            truncated = self.boards.arrays(tokens[cut], open[cut], extra)
            for name in ("top_tokens", "top_log_probs"):
                finished[name][to_numpy(cut)] = truncated[name]
        final = np.full(self.num_envs, None, dtype=object)
        for row in rows:
            final[row] = {name: value[row] for name, value in finished.items()}
        present = np.zeros(self.num_envs, dtype=bool)
        present[rows] = True
        return {"final_obs": final, "_final_obs": present, "_final_info": present.copy()}
