"""The Gymnasium face: one board, numpy in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from torch import Tensor, as_tensor

from pretrain.backbone import Backbone
from tasks import Task, UnmaskError
from unmask_env import render
from unmask_env.boards import FLOOR, LOG_ZERO, Boards, Look, View, blank
from unmask_env.core import Rules
from unmask_env.denoiser import Denoiser
from unmask_env.parallel import SetReference
from unmask_env.reference import Reference


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A copy on the host: observations must not share memory with the state."""
    return tensor.numpy(force=True).copy()


def arrays(view: View) -> dict[str, np.ndarray]:
    """A view as numpy arrays of its own; the mask is int8, as Gymnasium's ``MultiBinary`` is.

    Tokens, counts and mask are the state's, so they are copied; the rest was computed for this view.
    """
    shown = {key: value.numpy(force=True) for key, value in view.items()}
    copies = {key: shown[key].copy() for key in ("tokens", "reopened") if key in shown}
    return shown | copies | {"action_mask": shown["action_mask"].astype(np.int8)}


def for_sampling(boards: Boards, action_mask: np.ndarray) -> np.ndarray:
    """``action_mask`` as ``action_space.sample(mask=...)`` takes it: in sets, 2 lets an entry be in or out."""
    return action_mask.copy() if boards.rules.actions == "single" else 2 * action_mask


def maskable(boards: Boards, choices: np.ndarray) -> np.ndarray:
    """(N, A) bool choices as sb3-contrib takes them: of sets (N, 2 A), per entry whether it may be out, and in."""
    if boards.rules.actions == "single":
        return choices
    return np.stack([np.ones_like(choices), choices], -1).reshape(len(choices), -1)


def spaces_of(boards: Boards) -> tuple[spaces.Dict, spaces.Discrete | spaces.MultiBinary]:
    """(observation space, action space) of one board."""
    length, vocab, top, entries = boards.task.length, boards.task.vocab_size, boards.top, boards.entries
    shown: dict[str, spaces.Space] = {
        "tokens": spaces.Box(0, vocab, (length,), np.int64),
        "action_mask": spaces.MultiBinary(entries),
        "top_tokens": spaces.Box(0, vocab - 1, (length, top), np.int64),
        "top_log_probs": spaces.Box(FLOOR, 0.0, (length, top), np.float32),
        "log_reference": spaces.Box(LOG_ZERO, 0.0, (entries,), np.float32),
    }
    if boards.rules.actions == "set+remask":
        shown["reopened"] = spaces.Box(0, boards.rules.nfe_budget, (length,), np.int64)
    observation = spaces.Dict(shown)
    return observation, spaces.Discrete(length) if boards.rules.actions == "single" else spaces.MultiBinary(entries)


class UnmaskEnv(gymnasium.Env[dict[str, np.ndarray], np.int64 | np.ndarray]):
    """
    ## Description
    A sequence with holes is completed by a frozen, pretrained masked-diffusion denoiser. The agent decides *which hole
    next*; the denoiser decides *what goes in*.

    ## Action Space
    ``Discrete(L)``: the position to fill. Legal are the open positions, offered three ways: ``obs["action_mask"]``,
    ``info["action_mask"]`` (int8, for ``action_space.sample(mask=...)``) and ``env.action_masks()`` (bool).
    With ``actions="set"`` it is ``MultiBinary(L)``, the positions to fill in one forward, and with
    ``actions="set+remask"`` ``MultiBinary(2 L)``: those, and behind them the filled positions to empty again. A set
    that fills nothing fills the open position that the denoiser is surest of. Masks then have an entry per bit;
    ``info["action_mask"]`` has 2 where a bit is free, and ``env.action_masks()`` two per bit, as MaskablePPO asks.
    An illegal action is a no-op that counts as a step, ends the episode with reward 0, or raises
    (``on_illegal="noop" | "terminate" | "raise"``); ``info["illegal"]`` tells.

    ## Observation Space
    ``Dict`` with, for L positions and K = min(8, V) symbols:
    ``tokens`` (L,) int64, V is a hole; ``action_mask`` (L,) int8; ``top_tokens`` (L, K) int64 the denoiser's most
    likely symbols; ``top_log_probs`` (L, K) float32 their log-probabilities, clipped to [-20, 0]; ``log_reference``
    (L,) float32 the reference policy's log g(i|s), -1e4 for -inf; of sets, the log-probability that each bit is 1. On a
    complete board the denoiser is not run: its two parts are zeros and the reference's is -1e4. With
    ``actions="set+remask"`` also ``reopened`` (L,) int64: how often each position was emptied in this episode.

    ## Rewards
    0 until the board is complete, then ``task.reward`` in [0, 1]; with ``speed``, less the more forwards it took.

    ## Starting State
    A training instance of the task, or ``reset(options={"instances": Instances})``.

    ## Episode End
    Terminated when every position is filled. Truncated after ``nfe_budget`` steps, by default 2 L (only illegal no-ops
    and emptying positions again get there). A step after the end raises ``gymnasium.error.ResetNeeded``.

    ## Information
    ``action_mask``, ``log_reference``, ``nfe`` (denoiser forwards that led to an action of this episode), ``illegal``;
    at the end the task's metrics, for example ``solved``.

    ## Arguments
    ``task`` and ``denoiser`` (default: the registered ones); ``reference``: the policy g to regularise towards, by
    name or object (default ``"softmax_confidence"``, of sets ``"soft_threshold"``); ``temperature`` of the
    filling, 0 is greedy; ``device``; ``render_mode`` ``"ansi"`` or ``"rgb_array"``; and the fields of
    :class:`unmask_env.core.Rules`: ``actions``, ``on_illegal``, ``nfe_budget``, ``block_length``, ``remask_budget``,
    ``speed`` and ``speed_form``.

    ## Version History
    v0: first release.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}

    def __init__(
        self,
        env_id: str | None = None,
        task: str | Task | None = None,
        denoiser: str | Path | Backbone | Denoiser | None = None,
        reference: str | Reference | SetReference | None = None,
        temperature: float = 0.0,
        device: str = "cpu",
        render_mode: str | None = None,
        **rules: Any,
    ) -> None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise UnmaskError(f"render_mode must be one of {self.metadata['render_modes']}, not {render_mode!r}")
        self.render_mode = render_mode
        self.boards = Boards(1, env_id, task, denoiser, reference, Rules.of(rules), temperature, device)
        self.task = self.boards.task
        self.state = self.boards.empty()
        self._look: Look | None = None  # None before the first reset and after an episode's end
        self.observation_space, self.action_space = spaces_of(self.boards)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None or not self.boards.seeded:
            self.boards.seed([seed if seed is not None else int(self.np_random.integers(2**31))])
        self.state = self.boards.begin(self.state, [0], (options or {}).get("instances"))
        self._look = self.boards.look(self.state)
        observation = self._observation(self._look.view)
        return observation, self._info(observation)

    def step(
        self, action: np.int64 | int | np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        if self._look is None:
            raise ResetNeeded("there is no episode in play; call reset() first")
        index = as_tensor(np.asarray(action, dtype=np.int64), device=self.boards.device).unsqueeze(0)
        transition = self.boards.step(self.state, self._look, index)
        self.state = transition.state
        terminated, truncated = bool(transition.terminated), bool(transition.truncated)
        if terminated:
            choices = self.boards.choices(self.state)
            view, self._look = blank(self.state.tokens, choices, self.state.reopened, self.boards.top), None
        else:
            look = self.boards.look(self.state, drawing=[] if truncated else None)
            view, self._look = look.view, None if truncated else look
        observation = self._observation(view)
        info = self._info(observation) | {"illegal": bool(transition.illegal)}
        if terminated or truncated:
            measured = self.task.metrics(self.state.tokens, self.state.instances)
            info |= {name: float(value) for name, value in measured.items()}
        return observation, float(transition.reward), terminated, truncated, info

    def action_masks(self) -> np.ndarray:
        """sb3-contrib's convention: (L,) bool, the positions that may be chosen; for sets (2 A,), per entry whether it
        may be out and whether it may be in."""
        return maskable(self.boards, to_numpy(self.boards.choices(self.state)))[0]

    def render(self) -> str | np.ndarray | None:
        if self.render_mode is None:
            gymnasium.logger.warn("render() needs render_mode='ansi' or 'rgb_array' in gym.make(...)")
            return None
        return render.board(self.task, self.state, 0, self.render_mode)

    def _observation(self, view: View) -> dict[str, np.ndarray]:
        return {name: value[0] for name, value in arrays(view).items()}

    def _info(self, observation: dict[str, np.ndarray]) -> dict[str, Any]:
        shown = {"action_mask": for_sampling(self.boards, observation["action_mask"])}
        shown["log_reference"] = observation["log_reference"].copy()
        return shown | {"nfe": int(self.state.steps)}
