"""Decoding: which set a policy plays without randomness."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tasks import UnmaskError
from tasks.settings import InnerShare, validate
from unmask_env.distributions import ranked
from unmask_env.state import Observation

Read = Literal["always", "first", "unsure"]


@dataclass(frozen=True)
class Thresholds:
    """How likely an entry must be in a set to be in the one that is played: the setting between few forwards and sure
    ones.

    Attributes:
        fill: positions to fill; the likeliest one is filled in any case.
        read: when a policy over sets reads the board: ``always``; in the ``first`` forward and where nothing is
            certain; or only where nothing is, ``unsure``. In the other forwards, and beside its own set, it fills all
            positions that are as confident as ``defer_above``.
        remask: positions to mask again: where one passes it, all that pass half of it are masked with it, since much
            follows from a wrong guess; and of what may be filled the likeliest position alone is.
        defer_above: confidence of what is filled unread; default: the policy's.

    Raises:
        UnmaskError: one that is not above 0 and below 1, ``defer_above`` where every board is read.
    """

    fill: InnerShare = 0.5
    remask: InnerShare = 0.5
    read: Read = "always"
    defer_above: InnerShare | None = None

    def __post_init__(self) -> None:
        validate(self)
        if self.read == "always" and self.defer_above is not None:
            raise UnmaskError("defer_above is of boards that are not read: give read='unsure' or 'first' with it")


def most_likely_set(seen: Observation, log_odds: Tensor, thresholds: Thresholds) -> Tensor:
    """(N, A) bool, of ``log_odds`` (N, A); of what is to be masked again, the likeliest that a budget leaves."""
    length = seen.tokens.shape[1]
    fill, remask = log_odds[:, :length], log_odds[:, length:]
    best = ranked(fill, seen.fillable) == 0
    likely = (fill > math.log(thresholds.fill / (1 - thresholds.fill))) & seen.fillable
    if seen.remaskable is None:
        return likely | best
    wrong = remask.sigmoid().masked_fill(~seen.remaskable, 0.0)
    again = (wrong > thresholds.remask / 2) & (wrong > thresholds.remask).any(1, keepdim=True)
    if seen.history is not None and seen.history.remasks_left is not None:
        again = again & (ranked(wrong, again) < seen.history.remasks_left.unsqueeze(1))
    return torch.cat([best | likely & ~again.any(1, keepdim=True), again], 1)
