"""Policies as tables, and the probability of one sequence by a dynamic programme over sets of filled positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tasks import Instances, UnmaskError
from unmask_env.distributions import Categorical
from unmask_env.exact import Graph, Table, ask, check_holes, fillings, observe
from unmask_env.process import Unmasking
from unmask_env.reference import Policy
from unmask_env.state import Observation

INF = math.inf


class TablePolicy(Policy):
    """A policy table as a policy, for rollouts; where several starts share a board, the shallowest one's row counts."""

    def __init__(self, graph: Graph, table: Table) -> None:
        boards = torch.cat([level.observation.tokens for level in graph.levels]).cpu().numpy()
        self.row = {board.tobytes(): row for row, board in reversed(list(enumerate(boards)))}
        self.table = torch.cat(table)

    def __call__(self, observation: Observation) -> Categorical:
        """In float64.

        Raises:
            UnmaskError: a board that is not in the graph.
        """
        rows = [self.row.get(board.tobytes()) for board in observation.tokens.cpu().numpy()]
        if None in rows:
            board = observation.tokens[rows.index(None)].tolist()
            raise UnmaskError(f"board {board} is not in the graph; enumerate it with this denoiser and temperature")
        return Categorical(self.table[torch.tensor(rows, device=self.table.device)])


@torch.no_grad()
def sequence_log_prob(process: Unmasking, policy: Policy, instances: Instances, batch: int = 2048) -> Tensor:
    """(N,) float64 log-probability that ``policy`` finishes with exactly ``instances.answers``.

    By the subset dynamic programme P(S) = sum_{i in S} P(S - i) pi(i | x on S - i) p(x_i | x on S - i) over the 2^n
    sets S of filled holes, so no other sequence is listed.

    Raises:
        TooLargeError: more than 16 holes in an instance.
    """
    task = process.task
    check_holes(task, instances)
    instances = instances.to(process.device)
    log_probs = []
    for tokens, answer in zip(instances.tokens, instances.answers, strict=True):
        holes = (tokens == task.mask_id).nonzero().squeeze(1)
        bits = 2 ** torch.arange(len(holes), device=tokens.device)
        filled = (torch.arange(2 ** len(holes), device=tokens.device).unsqueeze(1) & bits) > 0  # (2^n, n)
        flow = []
        for some in filled.split(batch):
            boards = tokens.repeat(len(some), 1)
            boards[:, holes] = torch.where(some, answer[holes], task.mask_id)
            seen = observe(process, boards)
            symbols, log_fill = fillings(seen.denoised, process.temperature)
            right = log_fill.masked_fill(symbols != answer.unsqueeze(-1), -INF).amax(-1)  # (C, L)
            flow.append(ask(policy, seen)[:, holes] + right[:, holes])
        log_probs.append(_subset_log_prob(filled, torch.cat(flow)))
    possible = ((instances.tokens == task.mask_id) | (instances.tokens == instances.answers)).all(1)
    return torch.stack(log_probs).masked_fill(~possible, -INF)


def _subset_log_prob(filled: Tensor, flow: Tensor) -> Tensor:
    """log P(all holes), where ``flow`` (2^n, n) is the log-probability of each next hole after the sets ``filled``."""
    hole = torch.arange(filled.shape[1], device=filled.device)
    log_p = torch.zeros(len(filled), dtype=torch.float64, device=filled.device)
    size = filled.sum(1)
    for n in range(1, len(hole) + 1):
        sets = (size == n).nonzero().squeeze(1)
        before = (sets.unsqueeze(1) - 2**hole).clamp(min=0)  # (C, n); where the set lacks the hole, masked below
        log_p[sets] = (log_p[before] + flow[before, hole]).masked_fill(~filled[sets], -INF).logsumexp(1)
    return log_p[-1]
