"""The value network of the actor-critic learners: what reward a board will end with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from agents.policy import TOP, features, recalled
from pretrain.backbone import Block, CoordinateEmbedding, init_weights
from tasks import Task
from unmask_env.core import Observation


class Critic(nn.Module):
    """V(s): a transformer over the board and the denoiser's numbers, averaged over positions. It starts at 0.

    Args:
        vocab_size: V. coordinates: (L, C) as nested lists. dim, layers, heads: size.
    """

    def __init__(
        self, vocab_size: int, coordinates: Sequence[Sequence[int]], dim: int = 32, layers: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.top = min(TOP, vocab_size)
        self.symbols = nn.Embedding(vocab_size + 1, dim)
        self.likely = nn.Embedding(vocab_size, dim)
        self.positions = CoordinateEmbedding(torch.tensor(coordinates), dim)
        self.numbers = nn.Linear(2 * self.top + 4, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.value = nn.Linear(dim, 1)
        self.recall = nn.Parameter(torch.zeros(dim))  # marks, as often, what was opened again
        init_weights(self, layers)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, observation: Observation) -> Tensor:
        """(N,) values."""
        likely = observation.denoised.log_probs.exp() @ self.likely.weight  # (N, L, D)
        x = self.symbols(observation.tokens) + self.positions() + likely * observation.open.unsqueeze(-1)
        x = x + self.numbers(features(observation, self.top))
        if observation.reopened is not None:
            x = x + self.recall * recalled(observation).unsqueeze(-1)
        for block in self.blocks:
            x = block(x)
        return self.value(self.norm(x).mean(1)).squeeze(1)


def new_critic(task: Task, seed: int) -> Critic:
    """A critic for ``task``; ``seed`` draws its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Critic(task.vocab_size, task.coordinates.tolist())
