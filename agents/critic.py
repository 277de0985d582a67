"""The value network of the actor-critic learners: what reward a board will end with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from agents.policy import FEATURES, features, remask_count, zeroed
from pretrain.backbone import Block, CoordinateEmbedding, init_weights
from tasks import Task
from unmask_env.state import SHOWN, WHOLE, Observation


class Critic(nn.Module):
    """V(s): a transformer over the board and the denoiser's numbers, averaged over positions. It starts at 0.

    Above 128 symbols it sees where the masks are and the ranks of the shown symbols, not their names.

    Args:
        vocab_size: V. coordinates: (L, C) as nested lists. dim, layers, heads: size.
    """

    def __init__(
        self, vocab_size: int, coordinates: Sequence[Sequence[int]], dim: int = 32, layers: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.vocab_size, self.by_rank = vocab_size, vocab_size > WHOLE
        self.num_features = min(FEATURES, vocab_size)
        self.symbols = nn.Embedding(2 if self.by_rank else vocab_size + 1, dim)
        self.likely = nn.Embedding(SHOWN if self.by_rank else vocab_size, dim)
        self.positions = CoordinateEmbedding(coordinates, dim)
        self.feature_head = nn.Linear(2 * self.num_features + 4, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.value = nn.Linear(dim, 1)
        self.remask_count_embedding = nn.Parameter(torch.zeros(dim))  # marks, as often, what was masked again
        init_weights(self, layers)
        zeroed(self.value)

    def forward(self, seen: Observation) -> Tensor:
        """(N,) values."""
        log_probs = seen.top_log_probs if self.by_rank else seen.denoised.log_probs
        likely = log_probs.exp() @ self.likely.weight  # (N, L, D)
        tokens = seen.masked.long() if self.by_rank else seen.tokens
        x = self.symbols(tokens) + self.positions() + likely * seen.fillable.unsqueeze(-1)
        x = x + self.feature_head(features(seen, self.num_features))
        if seen.remask_count is not None:
            x = x + self.remask_count_embedding * remask_count(seen).unsqueeze(-1)
        for block in self.blocks:
            x = block(x)
        return self.value(self.norm(x).mean(1)).squeeze(1)


def new_critic(task: Task, seed: int) -> Critic:
    """A critic for ``task``; ``seed`` draws its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Critic(task.vocab_size, task.coordinates.tolist())
