"""Boards that several processes play together, each its share, as one process would play them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from pretrain import processes
from tasks import Instances
from unmask_env.denoiser import Denoiser
from unmask_env.process import Unmasking
from unmask_env.reference import Policy
from unmask_env.state import Denoised, Rollout


@dataclass(frozen=True)
class OfRows:
    """A denoiser that reads some of the rows of a batch (N, L) alone; the others are shown one of those."""

    denoiser: Denoiser
    rows: Tensor  # (M,) int64
    n: int
    carries = False  # what it carries is by row of its own batch, so each forward is whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)

    def __call__(self, tokens: Tensor, where: Tensor | None = None) -> Denoised:
        own = tokens[self.rows]
        denoised = self.denoiser(own) if where is None else self.denoiser(own, where[self.rows])
        came_from = torch.zeros(self.n, dtype=torch.long, device=tokens.device)
        return denoised[came_from.index_put((self.rows,), torch.arange(len(self.rows), device=tokens.device))]


def play_share(
    process: Unmasking, policy: Policy, instances: Instances, draws: Sequence[torch.Generator | None]
) -> tuple[Tensor, Rollout]:
    """The rows (M,) of ``instances`` that this process plays, and their rollout: of one process all.

    Each row is played as it is in one process. What is sampled is drawn for all rows, of which those of the other
    processes idle, and all go on from the stream of the process whose rows took longest.

    Args:
        draws: what :meth:`Unmasking.rollout` samples with.
    """
    rows = torch.arange(len(instances), device=instances.tokens.device)
    if processes.count() == 1:
        return rows, process.rollout(policy, instances, *draws)
    rows = processes.some_of(rows)
    drawing = [generator for generator in draws if generator is not None]
    if not drawing:
        return rows, process.rollout(policy, instances[rows])
    start = process.reset(instances)
    start = replace(start, done=torch.ones_like(start.done).index_copy(0, rows, start.done[rows]))
    alone = replace(process, denoiser=OfRows(process.denoiser, rows, len(instances)))
    played = alone.rollout(policy, instances, *draws, start=start)
    steps = int(played.state.steps.max())
    _, states = max(processes.gather((steps, [generator.get_state() for generator in drawing])), key=itemgetter(0))
    for generator, state in zip(drawing, states, strict=True):
        generator.set_state(state)
    kept = (played.reward, played.denoiser_passes, played.policy_passes)
    reward, denoiser_passes, policy_passes = (column[rows] for column in kept)
    return rows, Rollout(played.state[rows], reward, [], denoiser_passes, policy_passes)
