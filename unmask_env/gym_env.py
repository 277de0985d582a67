"""The Gymnasium interface: one board, numpy in and out."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded

from unmask_env import render
from unmask_env.encoding import (
    Arrays,
    action_space,
    as_numpy,
    encode_unseen,
    for_maskable_ppo,
    for_sampling,
    observation_space,
    read_actions,
    to_action,
    to_numpy,
)
from unmask_env.process import checked_metrics
from unmask_env.streams import Streams, read_options, read_seeds


class UnmaskEnv(gymnasium.Env[dict[str, np.ndarray], np.int64 | np.ndarray]):
    """
    ## Description
    A sequence with masks is completed by a frozen, pretrained masked-diffusion denoiser. The agent decides *which
    position next*; the denoiser decides *what goes in*.

    ## Action Space
    ``Discrete(L)``: the position to fill. Legal are the masked positions, offered three ways: ``obs["action_mask"]``,
    ``info["action_mask"]`` (int8, for ``action_space.sample(mask=...)``) and ``env.action_masks()`` (bool).
    With ``actions="set"`` it is ``MultiBinary(L)``, the positions to fill in one forward, and with
    ``actions="set+remask"`` ``MultiBinary(2 L)``: those, and behind them the filled positions to mask again. An empty
    set fills the most confident position. Masks then have an entry per bit; ``info["action_mask"]`` has 2 where a bit
    is free, and ``env.action_masks()`` two per bit, as MaskablePPO asks. An illegal action is a no-op that counts as a
    step, ends the episode with reward 0, or raises (``on_illegal="noop" | "terminate" | "raise"``);
    ``info["illegal"]`` tells. What is no action always raises: an index outside the board, floats, strings, None, bools
    as positions. Whole numbers may be of any dtype.

    ## Observation Space
    ``Dict`` with, for L positions and K symbols (K = V up to 128, else the 16 most likely):
    ``tokens`` (L,) int64, V is a mask; ``masked`` (L,) int8; ``action_mask`` (A,) int8, all ones on a finished board,
    so that masked policies can be asked; ``top_symbols`` (L, K) int64, the denoiser's most likely symbols, and
    ``top_log_probs`` (L, K) float32 their log-probabilities, clipped to [-20, 0]; ``entropy`` (L,) float32 in nats;
    ``log_reference`` (A,) float32, the reference policy's log g(i|s), -1e4 for -inf; of sets, the log-probability that
    each bit is 1. On a complete board the denoiser is not run: its parts are zeros and the reference's is -1e4. With
    ``actions="set+remask"`` also ``remaskable`` (L,) int8 and ``remask_count`` (L,) int64: how often each position was
    masked again in this episode. With ``show=("hidden",)`` the denoiser's last states ``hidden`` (L, D), with
    ``"order_weights"`` its learned order (L,).

    ## Rewards
    0 until the board is complete, then ``task.reward`` in [0, 1]; with ``speed``, less the more forwards it took.

    ## Starting State
    A training instance of the task, or with ``split="test"`` or ``"validation"`` a held-out one, drawn by the seed;
    ``reset(options={"index": 3})`` then plays the fourth. ``reset(options={"instances": Instances})`` plays one of your
    own. Seeds are 0 to 2**63 - 1.

    ## Episode End
    Terminated when every position is filled. Truncated after ``nfe_budget`` steps, by default 2 L (only illegal no-ops
    and remasking get there). A step after the end raises ``gymnasium.error.ResetNeeded``.

    ## Information
    ``action_mask``, ``log_reference``, ``nfe`` (denoiser forwards that led to an action of this episode), ``illegal``;
    at the end the task's metrics, for example ``solved``.

    ## Arguments
    ``task`` and ``denoiser`` (default: the registered ones); ``reference``: the policy g to regularise towards, by
    name with options or object (default ``"softmax_confidence"``, of sets ``"soft_threshold"``); ``temperature`` of the
    filling, 0 is greedy (default: the task's); ``split``: ``"train"`` (default), ``"validation"`` or ``"test"``;
    ``device``; ``show``; ``render_mode`` ``"ansi"`` or ``"rgb_array"``; and the fields of
    :class:`unmask_env.state.Rules`: ``actions``, ``on_illegal``, ``nfe_budget``, ``block_length``, ``remask_budget``,
    ``speed`` and ``speed_bonus``.

    ## Pickling
    An environment is pickled with its state of play; a denoiser that was given by name is pickled as that name and
    loaded again, once in each process, and a denoiser object with its weights.

    ## Version History
    v0: first release.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": render.MODES, "render_fps": 4}

    def __init__(self, env_id: str | None = None, render_mode: str | None = None, **options: Any) -> None:
        self.render_mode = render.checked_mode(render_mode)
        self.streams = Streams(1, env_id=env_id, **options)
        self.process, self.task = self.streams.process, self.streams.task
        self.state = self.streams.empty()
        self.observation_space = observation_space(self.process, self.streams.extras)
        self.action_space = action_space(self.process)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        seeds, given = None if seed is None else read_seeds(seed, 1), read_options(options, ("index", "instances"))
        instances = self.streams.chosen(given, 1)
        super().reset(seed=None if seeds is None else seeds[0])
        if seeds is not None or not self.streams.seeded:
            self.streams.seed(seeds or [int(self.np_random.integers(2**31))])
        self.state = self.streams.begin(self.state, [0], instances)
        self._seen, arrays = self.streams.observe(self.state)
        observation = self._observation(arrays)
        return observation, self._info(observation)

    def step(
        self, action: np.int64 | int | np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        if bool(self.state.done):
            raise ResetNeeded("there is no episode in play; call reset() first")
        chosen = to_action(read_actions([action], self.process, 1), self.process)
        state, reward = self.streams.step(self.state, self._seen, chosen)
        self.state, terminated = state, bool(state.terminated)
        if terminated:
            arrays = encode_unseen(self.process, state, self.streams.extras)
        else:
            self._seen, arrays = self.streams.observe(state)
        observation = self._observation(arrays)
        info = self._info(observation) | {"illegal": bool(state.illegal)}
        if bool(state.done):
            metrics = checked_metrics(self.task, state.tokens, state.instances)
            info |= {name: float(value) for name, value in metrics.items()}
        return observation, float(reward), terminated, bool(state.truncated), info

    def action_masks(self) -> np.ndarray:
        """sb3-contrib's convention: (L,) bool, the positions that may be chosen; for sets (2 A,), per entry whether it
        may be out and whether it may be in. All True on a finished board."""
        return for_maskable_ppo(to_numpy(self.streams.action_mask(self.state)), self.process.rules)[0]

    def render(self) -> str | np.ndarray | None:
        if self.render_mode is None:
            gymnasium.logger.warn("render() needs render_mode='ansi' or 'rgb_array' in gym.make(...)")
            return None
        return render.board(self.task, self.state, 0, self.render_mode)

    def _observation(self, arrays: Arrays) -> dict[str, np.ndarray]:
        shown = {name: value[0] for name, value in as_numpy(arrays).items()}
        if bool(self.state.done):
            shown["action_mask"][:] = 1
        return shown

    def _info(self, observation: dict[str, np.ndarray]) -> dict[str, Any]:
        return {
            "action_mask": for_sampling(observation["action_mask"], self.process.rules),
            "log_reference": observation["log_reference"].copy(),
            "nfe": int(self.state.steps),
        }
