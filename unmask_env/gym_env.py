"""The Gymnasium face: one board, numpy in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded

from pretrain.backbone import Backbone
from tasks import Task, UnmaskError
from unmask_env import render
from unmask_env.boards import Boards, to_numpy
from unmask_env.core import Denoised, OnIllegal
from unmask_env.denoiser import Denoiser


class UnmaskEnv(gymnasium.Env[dict[str, np.ndarray], np.int64]):
    """
    ## Description
    A sequence with holes is completed by a frozen, pretrained masked-diffusion denoiser. The agent decides *which hole
    next*; the denoiser decides *what goes in*.

    ## Action Space
    ``Discrete(L)``: the position to fill. Legal are the open positions, offered three ways: ``obs["action_mask"]``,
    ``info["action_mask"]`` (int8, for ``action_space.sample(mask=...)``) and ``env.action_masks()`` (bool).
    An illegal action is a no-op that counts as a step, ends the episode with reward 0, or raises
    (``on_illegal="noop" | "terminate" | "raise"``); ``info["illegal"]`` tells.

    ## Observation Space
    ``Dict`` with, for L positions and K = min(8, V) symbols:
    ``tokens`` (L,) int64, V is a hole; ``action_mask`` (L,) int8; ``top_tokens`` (L, K) int64 the denoiser's most
    likely symbols; ``top_log_probs`` (L, K) float32 their log-probabilities, clipped to [-20, 0]. On a finished board
    the denoiser is not run and its two parts are zeros.

    ## Rewards
    0 until the board is complete, then ``task.reward`` in [0, 1].

    ## Starting State
    A training instance of the task, or ``reset(options={"instances": Instances})``.

    ## Episode End
    Terminated when every position is filled. Truncated after 2 L steps (only illegal no-ops get there). A step after
    the end raises ``gymnasium.error.ResetNeeded``.

    ## Information
    ``action_mask``, ``nfe`` (denoiser forwards that led to an action of this episode), ``illegal``; at the end the
    task's metrics, for example ``solved``.

    ## Arguments
    ``task`` and ``denoiser`` (default: the registered ones); ``on_illegal``; ``temperature`` of the filling, 0 is
    greedy; ``device``; ``render_mode`` ``"ansi"`` or ``"rgb_array"``.

    ## Version History
    v0: first release.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}

    def __init__(
        self,
        env_id: str | None = None,
        task: str | Task | None = None,
        denoiser: str | Path | Backbone | Denoiser | None = None,
        on_illegal: OnIllegal = "noop",
        temperature: float = 0.0,
        device: str = "cpu",
        render_mode: str | None = None,
    ) -> None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise UnmaskError(f"render_mode must be one of {self.metadata['render_modes']}, not {render_mode!r}")
        self.render_mode = render_mode
        self.boards = Boards(1, env_id, task, denoiser, on_illegal, temperature, device)
        self.task = self.boards.task
        self._ended = False
        self.observation_space, self.action_space = self.boards.spaces()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None or not self.boards.seeded:
            self.boards.seed([seed if seed is not None else int(self.np_random.integers(2**31))])
        self.boards.begin([0], (options or {}).get("instances"))
        self._ended = False
        self.boards.observe()
        return self._observation(self.boards.denoised), self._info()

    def step(self, action: np.int64 | int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        if self._ended:
            raise ResetNeeded("the episode has ended; call reset() first")
        transition = self.boards.step([action])
        terminated, truncated = bool(transition.terminated), bool(transition.truncated)
        self._ended = terminated or truncated
        if not terminated:
            self.boards.observe()
        info = self._info() | {"illegal": bool(transition.illegal)}
        if self._ended:
            measured = self.task.metrics(self.boards.state.tokens, self.boards.state.instances)
            info |= {name: float(value) for name, value in measured.items()}
        observation = self._observation(None if terminated else self.boards.denoised)
        return observation, float(transition.reward), terminated, truncated, info

    def action_masks(self) -> np.ndarray:
        """(L,) bool: the open positions (sb3-contrib's convention)."""
        return to_numpy(self.boards.state.open[0])

    def render(self) -> str | np.ndarray | None:
        if self.render_mode is None:
            gymnasium.logger.warn("render() needs render_mode='ansi' or 'rgb_array' in gym.make(...)")
            return None
        return render.board(self.task, self.boards.state, 0, self.render_mode)

    def _observation(self, denoised: Denoised | None) -> dict[str, np.ndarray]:
        arrays = self.boards.arrays(self.boards.state.tokens, self.boards.state.open, denoised)
        return {name: value[0] for name, value in arrays.items()}

    def _info(self) -> dict[str, Any]:
        return {"action_mask": self.action_masks().astype(np.int8), "nfe": int(self.boards.state.steps)}
