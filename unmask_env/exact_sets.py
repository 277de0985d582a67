"""Exact solutions of filling several positions at once, on boards small enough to list."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tasks import Instances, UnmaskError
from unmask_env.exact import check_holes, observe
from unmask_env.process import Unmasking

INF = math.inf
MAX_HOLES = 12


@torch.no_grad()
def fewest_forwards(process: Unmasking, instances: Instances, batch: int = 2048) -> Tensor:
    """(N,) float64: the fewest forwards in which sets of positions, filled greedily and never masked again, can restore
    each instance's own answer; inf where no sequence of sets does.

    n(A) = 0 where every hole is filled, and else 1 + min n(A') over A' that adds to A some positions whose top symbol
    is right on the board with the holes A filled: a recursion over the 2^H boards without a mistake, 3^H steps in all.
    No policy that plays so, learned or not, restores more answers in as many forwards.

    Raises:
        TooLargeError: more than 12 masks in an instance. UnmaskError: a task with several right answers.
    """
    task = process.task
    if not task.one_answer:
        raise UnmaskError(
            f"{task.name} has several right answers; the fewest forwards are counted towards the only one"
        )
    check_holes(task, instances, MAX_HOLES)
    instances = instances.to(process.device)
    fewest = torch.zeros(len(instances), dtype=torch.float64, device=process.device)
    holes = (instances.tokens == task.mask_id).sum(1)
    for count in holes.unique().tolist():
        rows = (holes == count).nonzero().squeeze(1)
        for some in rows.split(max(1, 2**17 >> count)) if count else ():
            fewest[some] = _fewest(process, instances[some], count, batch)
    possible = ((instances.tokens == task.mask_id) | (instances.tokens == instances.answers)).all(1)
    return fewest.masked_fill(~possible, INF)


def _fewest(process: Unmasking, instances: Instances, count: int, batch: int) -> Tensor:
    """(N,) :func:`fewest_forwards` of instances with ``count`` holes each."""
    n, device = len(instances), instances.tokens.device
    mask_id = process.task.mask_id
    where = (instances.tokens == mask_id).nonzero()[:, 1].view(n, count)
    bit = 2 ** torch.arange(count, device=device)
    sets = torch.arange(2**count, device=device)
    member = (sets.unsqueeze(1) & bit) > 0  # (2^H, H)
    answer = instances.answers.gather(1, where)  # (N, H)
    reach = torch.empty(n, len(sets), dtype=torch.long, device=device)  # what is filled, or would be filled rightly
    boards = torch.arange(n * len(sets), device=device)
    for some in boards.split(batch):
        row, held = some // len(sets), member[some % len(sets)]
        tokens = instances.tokens[row].scatter(1, where[row], answer[row].masked_fill(~held, mask_id))
        right = observe(process, tokens).denoised.best.gather(1, where[row]) == answer[row]
        reach.view(-1)[some] = ((right | held) * bit).sum(1)
    fewest = torch.full((n, len(sets)), INF, dtype=torch.float64, device=device)
    fewest[:, -1] = 0
    for held in range(len(sets) - 2, -1, -1):
        larger = sets[(sets & held == held) & (sets != held)]
        allowed = larger & ~reach[:, held].unsqueeze(1) == 0
        fewest[:, held] = 1 + torch.where(allowed, fewest[:, larger], INF).min(1).values
    return fewest[:, 0]
