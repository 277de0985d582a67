"""Replay of failed instances: on an easy task most instances teach nothing, so keep the ones that went wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agents.states import same_columns
from pretrain import processes
from tasks import Instances, Task


class Replay:
    """The most recent failures of a policy, mixed into its training instances.

    Args:
        fraction: part of each batch that is replayed, once there is enough.
        capacity: instances kept; the oldest are forgotten.
    """

    def __init__(self, task: Task, fraction: float, capacity: int = 4096) -> None:
        self.task, self.fraction, self.capacity = task, fraction, capacity
        empty = torch.zeros(0, task.length, dtype=torch.long)
        self.tokens, self.answers = empty, empty.clone()

    def __len__(self) -> int:
        return len(self.tokens)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Instances, int]:
        """``n`` instances, and how many of them, the first ones, are fresh."""
        replayed = min(int(n * self.fraction), len(self))
        fresh = self.task.sample(n - replayed, generator)
        if replayed == 0:
            return fresh, n
        rows = torch.randperm(len(self), generator=generator, device=generator.device)[:replayed].cpu()
        again = Instances(self.tokens[rows], self.answers[rows]).to(fresh.tokens.device)
        joined = (torch.cat([fresh.tokens, again.tokens]), torch.cat([fresh.answers, again.answers]))
        return Instances(*joined), n - replayed

    def add(self, instances: Instances, failed: Tensor) -> None:
        """Keep the instances where ``failed`` (N,) bool; those of all processes, in each."""
        for tokens, answers in processes.gather((instances.tokens[failed].cpu(), instances.answers[failed].cpu())):
            self.tokens = torch.cat([self.tokens, tokens])[-self.capacity :]
            self.answers = torch.cat([self.answers, answers])[-self.capacity :]

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on."""
        return {"tokens": self.tokens, "answers": self.answers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        own = same_columns(self.state_dict(), state)
        self.tokens, self.answers = own["tokens"], own["answers"]
