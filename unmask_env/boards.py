"""N boards in play with their own random streams: what the Gymnasium faces share.

Row i draws its instances (and, with sampled filling, its symbols) from its own generator, so an episode depends on the
row's seed and actions only, not on how many rows play beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import torch
from torch import Tensor

from pretrain.backbone import Backbone
from tasks import Instances, Task, UnmaskError
from unmask_env import core, registration
from unmask_env.core import Denoised, Observation, OnIllegal, Transition
from unmask_env.denoiser import Denoiser, load_denoiser

TOP = 8  # most likely symbols per position that an observation shows
FLOOR = -20.0  # least log-probability shown, so that spaces are bounded
_AHEAD = 16  # instances drawn per call of task.sample


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A copy on the host: observations must not share memory with the state."""
    return tensor.numpy(force=True).copy()


class Boards:
    """See the module docstring. ``state`` and ``denoised`` always belong together after :meth:`observe`."""

    def __init__(
        self,
        n: int,
        env_id: str | None,
        task: str | Task | None,
        denoiser: str | Path | Backbone | Denoiser | None,
        on_illegal: OnIllegal,
        temperature: float,
        device: str,
    ) -> None:
        found = registration.lookup(env_id) if env_id is not None else None
        task = task if task is not None else (found.task if found else None)
        denoiser = denoiser if denoiser is not None else (found.denoiser if found else None)
        if task is None or denoiser is None:
            missing = "task" if task is None else "denoiser"
            raise UnmaskError(f"this environment needs a {missing}; give {missing}=... or register the id with one")
        if on_illegal not in ("noop", "terminate", "raise"):
            raise UnmaskError(f"on_illegal must be noop, terminate or raise, not {on_illegal!r}")
        if temperature < 0:
            raise UnmaskError(f"temperature must be 0 (greedy filling) or more, not {temperature}")
        self.n, self.device = n, torch.device(device)
        self.task = registration.resolve_task(task)
        self.denoiser = load_denoiser(denoiser, self.task, device)
        self.on_illegal, self.temperature = on_illegal, temperature
        self.max_steps = 2 * self.task.length  # an illegal no-op must not loop for ever
        self.top = min(TOP, self.task.vocab_size)
        holes = torch.full((n, self.task.length), self.task.mask_id, device=self.device)
        self.state = core.begin(Instances(holes, torch.zeros_like(holes)), self.task.mask_id)
        self.denoised: Denoised | None = None
        self._generators: list[torch.Generator] | None = None
        self._ahead: list[tuple[Instances, int] | None] = [None] * n

    # ------------------------------------------------------------------ spaces
    def spaces(self) -> tuple[spaces.Dict, spaces.Discrete]:
        """(observation space, action space) of one board."""
        length, vocab = self.task.length, self.task.vocab_size
        observation = spaces.Dict(
            {
                "tokens": spaces.Box(0, vocab, (length,), np.int64),
                "action_mask": spaces.MultiBinary(length),
                "top_tokens": spaces.Box(0, vocab - 1, (length, self.top), np.int64),
                "top_log_probs": spaces.Box(FLOOR, 0.0, (length, self.top), np.float32),
            }
        )
        return observation, spaces.Discrete(length)

    # ------------------------------------------------------------------ randomness
    def seed(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> None:
        """One seed per row; with ``rows`` only those take theirs."""
        if len(seeds) != self.n:
            raise UnmaskError(f"{self.n} rows need {self.n} seeds, not {len(seeds)}")
        if self._generators is None:
            self._generators = [torch.Generator() for _ in seeds]
        for row in range(self.n) if rows is None else rows:
            self._generators[row].manual_seed(int(seeds[row]))
            self._ahead[row] = None

    @property
    def seeded(self) -> bool:
        return self._generators is not None

    def _next_instance(self, row: int) -> Instances:
        if self._generators is None:
            raise UnmaskError("call reset() before anything else")
        instances, at = self._ahead[row] or (None, _AHEAD)
        if instances is None or at == len(instances):
            instances, at = self.task.sample(_AHEAD, self._generators[row]), 0
        self._ahead[row] = (instances, at + 1)
        return instances[at : at + 1]

    def _noise(self, like: Tensor, idle: np.ndarray | None) -> Tensor:
        if self._generators is None:
            raise UnmaskError("call reset() before anything else")
        unused = torch.full((like.shape[1],), 0.5)  # an idle row's stream must not advance
        rows = enumerate(self._generators)
        drawn = [unused if idle is not None and idle[i] else torch.rand(like.shape[1], generator=g) for i, g in rows]
        return torch.stack(drawn).to(like)

    # ------------------------------------------------------------------ play
    def begin(self, rows: Sequence[int], instances: Instances | None = None) -> None:
        """Start the episodes of ``rows`` anew, from ``instances`` if given, else from each row's own stream."""
        if not len(rows):
            return
        if instances is None:
            drawn = [self._next_instance(row) for row in rows]
            instances = Instances(torch.cat([d.tokens for d in drawn]), torch.cat([d.answers for d in drawn]))
        elif instances.tokens.shape != (len(rows), self.task.length):
            raise UnmaskError(f"options['instances'] must hold {len(rows)} instances of length {self.task.length}")
        if not bool((instances.tokens == self.task.mask_id).any(1).all()):
            raise UnmaskError("every instance needs at least one hole; an episode without one would never end")
        index = torch.as_tensor(rows, device=self.device)
        self.state = core.reset_rows(self.state, index, instances.to(self.device), self.task.mask_id)

    def observe(self, extra: Tensor | None = None) -> Denoised | None:
        """One forward for all rows, and in the same batch for ``extra`` (M, L) tokens, whose part is returned."""
        if extra is None or not len(extra):
            self.denoised = self.denoiser(self.state.tokens)
            return None
        log_probs, hidden = self.denoiser(torch.cat([self.state.tokens, extra]))
        self.denoised = Denoised(log_probs[: self.n], None if hidden is None else hidden[: self.n])
        return Denoised(log_probs[self.n :], None if hidden is None else hidden[self.n :])

    def step(self, action: Any, idle: np.ndarray | None = None) -> Transition:
        """Apply one action per row to the state; the caller decides on resets, then calls :meth:`observe`.

        Rows marked in ``idle`` (N,) draw nothing from their streams: the caller drops their step.
        """
        if self.denoised is None:
            raise UnmaskError("call reset() before step()")
        transition = core.step(
            self.task,
            self.state,
            self.denoised,
            torch.as_tensor(np.asarray(action), device=self.device).long().view(self.n),
            temperature=self.temperature,
            noise=(lambda like: self._noise(like, idle)) if self.temperature > 0 else None,
            on_illegal=self.on_illegal,
            max_steps=self.max_steps,
        )
        self.state = transition.state
        return transition

    # ------------------------------------------------------------------ numpy
    def observation(self) -> Observation:
        """The torch observation of the current state, for orders."""
        if self.denoised is None:
            raise UnmaskError("call reset() first")
        return Observation(self.state.tokens, self.state.open, self.denoised)

    def arrays(self, tokens: Tensor, open: Tensor, denoised: Denoised | None) -> dict[str, np.ndarray]:
        """Fresh numpy observations (rows first); without ``denoised`` (a finished board) its parts are zeros."""
        shape = (*tokens.shape, self.top)
        if denoised is None:
            values, likely = torch.zeros(shape), torch.zeros(shape, dtype=torch.long)
        else:
            values, likely = denoised.log_probs.topk(self.top, -1)
        return {
            "tokens": to_numpy(tokens),
            "action_mask": to_numpy(open).astype(np.int8),
            "top_tokens": to_numpy(likely),
            "top_log_probs": to_numpy(values.clamp(min=FLOOR, max=0.0)),
        }
