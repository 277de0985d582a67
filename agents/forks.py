"""States in the middle of an episode, to fork play at."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tasks import Instances
from unmask_env.process import Unmasking
from unmask_env.reference import Policy
from unmask_env.state import State


@torch.no_grad()
def uncertain_states(
    process: Unmasking, policy: Policy, instances: Instances, defer_above: float, generator: torch.Generator
) -> tuple[State, Tensor]:
    """Of each instance one state of greedy play where no position is confident, each as likely as the others; the first
    state of those that come to none. And which came to one, (N,) bool.

    Args:
        defer_above: confidence of a fillable position from which on a state is certain.
    """
    state = process.reset(instances)
    kept, count = state, torch.zeros(len(state), device=process.device)
    while not bool(state.done.all()):
        seen = process.observe(state, generator)
        uncertain = ~seen.certain(defer_above).any(1) & (seen.fillable.sum(1) > 1)
        count += uncertain
        draw = torch.rand(len(state), generator=generator, device=process.device)
        rows = (uncertain & (draw * count < 1)).nonzero().squeeze(1)  # the k-th replaces the one before in 1 of k cases
        if kept.previous is None:  # what a first state has there is never looked at
            kept = replace(kept, previous=seen.denoised.without_hidden())
        kept = kept.put(rows, state[rows])
        uniform = process.uniform(state, generator)
        state, _ = process.step(state, seen, policy(seen).mode(), uniform)
    return kept, count > 0
