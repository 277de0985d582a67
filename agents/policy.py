"""The order policy: a small transformer over per-position features of the board and of the denoiser's output.

Shapes: N boards, L positions, V symbols, C coordinates, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from pretrain.backbone import Block, CoordinateEmbedding, init_weights
from pretrain.checkpoint import CheckpointError, load_model
from tasks import Task
from unmask_env import reference
from unmask_env.core import Observation, choose, masked_log_softmax

PACKAGED_POLICIES = Path(__file__).parent / "models"
TOP = 8  # most likely symbols that a policy sees per position, as in UPO's released head

Base = Literal["none", "softmax_confidence", "softmax_margin"]


class OrderPolicy(nn.Module, PyTorchModelHubMixin):
    """pi(i | observation) over the open positions: softmax of ``base score + network score``.

    The last layer starts at zero, so a new policy *is* its base: KL(pi || base reference) = 0.

    Args:
        vocab_size: V of the denoiser. coordinates: (L, C) as nested lists.
        base: reference whose log-probabilities (at ``base_tau``) are the starting point; ``none`` is uniform.
        candidates: if given, only the k most confident open positions may be chosen (UPO's top-k realisation).
        tokens: see the symbols on the board. top_tokens: see which symbols the denoiser thinks of.
        hidden_dim: channels of the denoiser's hidden states to see; 0 to leave them out.
        dim, layers, heads: size. loops: how often the blocks are applied, with shared weights.
    """

    def __init__(
        self,
        vocab_size: int,
        coordinates: Sequence[Sequence[int]],
        base: Base = "none",
        base_tau: float = 0.05,
        candidates: int | None = None,
        tokens: bool = True,
        top_tokens: bool = True,
        hidden_dim: int = 0,
        dim: int = 48,
        layers: int = 2,
        heads: int = 4,
        loops: int = 1,
    ) -> None:
        super().__init__()
        self.vocab_size, self.length = vocab_size, len(coordinates)
        self.top = min(TOP, vocab_size)
        self.loops, self.use_top_tokens, self.candidates = loops, top_tokens, candidates
        self.base = None if base == "none" else reference.get(base, tau=base_tau)
        self.positions = CoordinateEmbedding(torch.tensor(coordinates), dim)
        self.numbers = nn.Linear(2 * self.top + 4, dim)
        self.symbols = nn.Embedding(vocab_size + 1, dim) if tokens else None
        self.likely = nn.Embedding(vocab_size, dim) if top_tokens else None
        self.first = nn.Embedding(vocab_size, dim) if top_tokens else None
        self.hidden = nn.Linear(hidden_dim, dim) if hidden_dim else None
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 1)
        init_weights(self, layers * loops)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, observation: Observation) -> Tensor:
        """(N, L, 2 top + 4): top probabilities, their logs / 8, entropy, margin, open flag, fraction left open."""
        top = observation.denoised.log_probs.topk(self.top, -1).values.clamp(min=-16.0)  # (N, L, top)
        entropy, margin = reference.entropy(observation), reference.margin(observation)
        is_open = observation.open.float()
        left = is_open.mean(1, keepdim=True).expand_as(is_open)
        scalars = torch.stack([entropy, margin, is_open, left], -1)
        numbers = torch.cat([top.exp(), top / 8, scalars], -1)
        numbers[..., :-2] *= is_open.unsqueeze(-1)  # what the denoiser says of a closed position means nothing
        return numbers

    def score(self, observation: Observation) -> Tensor:
        """(N, L) network scores, meaningful on open positions; the base is not added."""
        x = self.positions() + self.numbers(self.features(observation))  # (N, L, D)
        if self.symbols is not None:
            x = x + self.symbols(observation.tokens)
        if self.use_top_tokens:
            values, likely = observation.denoised.log_probs.topk(self.top, -1)  # (N, L, top)
            seen = values.exp() * observation.open.unsqueeze(-1)
            x = x + torch.einsum("nlk,nlkd->nld", seen, self.likely(likely))
            x = x + self.first(likely[..., 0]) * observation.open.unsqueeze(-1)
        if self.hidden is not None:
            x = x + self.hidden(observation.denoised.hidden)
        for _ in range(self.loops):
            for block in self.blocks:
                x = block(x)
        return self.head(self.norm(x)).squeeze(-1)

    def logits(self, observation: Observation) -> Tensor:
        """(N, L) base score + network score on the positions that may be chosen, -inf elsewhere."""
        logits = self.score(observation)
        if self.base is not None:
            logits = logits + self.base.log_prob(observation).masked_fill(~observation.open, 0.0)
        return logits.masked_fill(~self.allowed(observation), -torch.inf)

    def allowed(self, observation: Observation) -> Tensor:
        """(N, L) bool: the open positions, or the most confident of them."""
        if self.candidates is None:
            return observation.open
        return reference.TopK(self.candidates).log_prob(observation) > -torch.inf

    def log_prob(self, observation: Observation) -> Tensor:
        """(N, L) log-probabilities; -inf on positions that may not be chosen."""
        allowed = self.allowed(observation)
        return masked_log_softmax(self.logits(observation).masked_fill(~allowed, 0.0), allowed)

    def sample(self, observation: Observation, generator: torch.Generator) -> Tensor:
        """(N,) positions drawn from :meth:`log_prob`."""
        return choose(self.log_prob(observation), generator)


def load_policy(name: str | Path, task: Task | None = None) -> OrderPolicy:
    """An order policy by packaged name, folder or hub id.

    Raises:
        CheckpointError, UnknownNameError: in one line; also if the policy is for another vocabulary or length.
    """
    policy = load_model(OrderPolicy, name, PACKAGED_POLICIES, "order policy")
    if task is not None and (policy.vocab_size, policy.length) != (task.vocab_size, task.length):
        raise CheckpointError(
            f"order policy {name} is for {policy.vocab_size} symbols and {policy.length} positions; "
            f"task {task.name} has {task.vocab_size} and {task.length}"
        )
    return policy
