"""The order policy: a small transformer over per-position features of the board and of the denoiser's output.

Shapes: N boards, L positions, V symbols, C coordinates, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from pretrain.backbone import Backbone, Block, CoordinateEmbedding, init_weights
from pretrain.checkpoint import CheckpointError, load_model
from tasks import Task, UnmaskError
from unmask_env import reference
from unmask_env.core import Observation, choose, masked_log_softmax
from unmask_env.denoiser import Denoiser

PACKAGED_POLICIES = Path(__file__).parent / "models"
TOP = 8  # most likely symbols that a policy sees per position, as in UPO's released head

Base = Literal["none", "softmax_confidence", "softmax_margin"]


@dataclass(frozen=True)
class PolicyShape:
    """What a new policy looks like and sees; each is an option of ``unmask train``."""

    copy: bool = True
    """start from copies of the denoiser's last blocks and embeddings, where it has them (dim and heads are then its
    own): the policy reads the board a second time, knowing what the denoiser said at first"""
    layers: int = 3
    dim: int = 48
    heads: int = 4
    loops: int = 1
    """how often the blocks are applied, with shared weights"""
    tokens: bool = True
    """see the symbols on the board"""
    top_tokens: bool = True
    """see which symbols the denoiser thinks of"""
    hidden: bool = False
    """see the denoiser's last hidden states, where it has them"""


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
        layers: int = 3,
        heads: int = 4,
        loops: int = 1,
    ) -> None:
        super().__init__()
        self.vocab_size, self.length = vocab_size, len(coordinates)
        self.top = min(TOP, vocab_size)
        self.loops, self.candidates, self.see_tokens, self.see_top_tokens = loops, candidates, tokens, top_tokens
        self.base = None if base == "none" else reference.get(base, tau=base_tau)
        self.positions = CoordinateEmbedding(torch.tensor(coordinates), dim)
        # Through a bottleneck: a policy copied from the denoiser then stays no larger than the denoiser.
        self.numbers = nn.Sequential(nn.Linear(2 * self.top + 4, 3, bias=False), nn.Linear(3, dim))
        self.symbols = nn.Embedding(vocab_size + 1, dim)
        self.hidden = nn.Linear(hidden_dim, dim) if hidden_dim else None
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 1)
        init_weights(self, layers * loops)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @torch.no_grad()
    def copy_from(self, backbone: Backbone) -> None:
        """Start from the denoiser's embeddings, norm and last blocks (UPO copies LLaDA's last block likewise).

        What is new, the numbers and the hidden states, starts small beside it.
        """
        for own, theirs in zip(self.blocks, backbone.blocks[-len(self.blocks) :], strict=True):
            own.load_state_dict(theirs.state_dict())
        self.positions.load_state_dict(backbone.positions.state_dict())
        self.norm.load_state_dict(backbone.norm.state_dict())
        self.symbols.load_state_dict(backbone.symbols.state_dict())
        self.numbers[1].weight.mul_(0.1)
        if self.hidden is not None:
            self.hidden.weight.mul_(0.1)

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
        if self.see_tokens:
            x = x + self.symbols(observation.tokens)
        if self.see_top_tokens:  # the expected symbol takes the mask's place
            values, likely = observation.denoised.log_probs.topk(self.top, -1)  # (N, L, top)
            expected = torch.einsum("nlk,nlkd->nld", values.exp(), self.symbols(likely))
            x = x + (expected - self.symbols.weight[-1]) * observation.open.unsqueeze(-1)
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


def new_policy(
    shape: PolicyShape,
    task: Task,
    denoiser: Denoiser,
    seed: int,
    base: Base = "none",
    base_tau: float = 0.05,
    candidates: int | None = None,
) -> OrderPolicy:
    """A policy for ``task`` and ``denoiser``; ``seed`` draws what is not copied.

    Raises:
        UnmaskError: more layers than the denoiser has to copy.
    """
    model = getattr(denoiser, "model", None)
    backbone = model if shape.copy and isinstance(model, Backbone) else None
    if backbone is not None and shape.layers > len(backbone.blocks):
        raise UnmaskError(
            f"the denoiser has {len(backbone.blocks)} blocks to copy, not {shape.layers}; use fewer layers or --no-copy"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = OrderPolicy(
            task.vocab_size,
            task.coordinates.tolist(),
            base=base,
            base_tau=base_tau,
            candidates=candidates,
            tokens=shape.tokens,
            top_tokens=shape.top_tokens,
            hidden_dim=(denoiser.hidden_dim or 0) if shape.hidden else 0,
            dim=shape.dim if backbone is None else backbone.dim,
            layers=shape.layers,
            heads=shape.heads if backbone is None else backbone.blocks[0].heads,
            loops=shape.loops,
        )
    if backbone is not None:
        policy.copy_from(backbone)
    return policy


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
