"""The transformers that denoisers and order policies are made of. Small enough to read in one sitting.

Shapes: N sequences, L positions, V symbols, C coordinates per position, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain import orders
from pretrain.card import HubModel
from pretrain.masking import blocks_of
from pretrain.orders import OrderName
from pretrain.uniform import Prediction, Uniform, tilt
from tasks.settings import MOST_DEEP


class Output(NamedTuple):
    """What a backbone returns: ``logits`` (N, L, V) over symbols (never the mask) and ``hidden`` (N, L, D)."""

    logits: Tensor
    hidden: Tensor


class Block(nn.Module):
    """Pre-norm attention and MLP, without dropout or biases in the projections."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, mlp_ratio * dim, bias=False)
        self.down = nn.Linear(mlp_ratio * dim, dim, bias=False)

    def forward(self, x: Tensor, attends: Tensor | None = None, rotation: Tensor | None = None) -> Tensor:
        """(N, L, D) to the same.

        Args:
            attends: (L, L) bool, which positions (columns) each one (row) may look at.
            rotation: (2, L, D / H), by how much queries and keys are turned; see :func:`rotations`.
        """
        n, length, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, dim // self.heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # each (N, H, L, D / H)
        if rotation is None:
            q, k, v = qkv
        else:
            q, k, v = qkv.contiguous()  # turning is several times faster so
            q, k = turn(q, rotation), turn(k, rotation)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attends)
        x = x + self.out(attended.transpose(1, 2).reshape(n, length, dim))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


def rotations(length: int, channels: int, device: torch.device) -> Tensor:
    """(2, L, channels) cosines, and sines with the sign that each channel's partner counts with, so that attention sees
    distances (Su et al. 2021, arXiv 2104.09864): channel j and j + channels / 2 turn together, at position p by
    p / 10000^(2 j / channels)."""
    frequencies = 10_000.0 ** (-torch.arange(0, channels, 2, device=device) / channels)
    angles = torch.arange(length, device=device).unsqueeze(1) * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)])


def turn(x: Tensor, rotation: Tensor) -> Tensor:
    """(..., L, channels) ``x`` turned by ``rotation``, in its own precision."""
    first, second = x.chunk(2, -1)
    cos, sin = rotation.to(x.dtype)
    return x * cos + torch.cat([second, first], -1) * sin


class CoordinateEmbedding(nn.Module):
    """The sum of one learned embedding per coordinate: (L, C) integers, as nested lists, in, (L, D) out.

    On Sudoku this (row + column + box) is what makes the rules learnable in a few hundred steps.
    """

    def __init__(self, coordinates: Sequence[Sequence[int]], dim: int) -> None:
        super().__init__()
        self.register_buffer("coordinates", torch.tensor(coordinates).long(), persistent=False)
        self.tables = nn.ModuleList(nn.Embedding(max(column) + 1, dim) for column in zip(*coordinates, strict=True))

    def forward(self) -> Tensor:
        return sum(table(column) for table, column in zip(self.tables, self.coordinates.unbind(1), strict=True))


def encode(network: Backbone | Reader, x: Tensor, attends: Tensor | None = None) -> Tensor:
    """(N, L, D) embeddings to the states after all blocks and the norm."""
    rotation = None
    if network.rotary:
        rotation = rotations(x.shape[1], x.shape[2] // network.blocks[0].heads, x.device)
    for block in network.blocks:
        x = block(x, attends, rotation)
    return network.norm(x)


def run_passes(
    num_passes: int,
    embed: Callable[[Tensor | None, int], Tensor],
    states_of: Callable[[Tensor], Tensor],
    logits_of: Callable[[Tensor], Tensor],
    belief: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Read a sequence several times with shared weights, each time with the last belief over symbols in place of the
    masks: a later pass can use what an earlier one has found. Gradients run through all passes.

    Args:
        embed: the last belief, None before the first, and the number of the pass from 0, to embeddings (N, L, D).
        states_of: embeddings to states (N, L, D). logits_of: states to logits (N, L, K).
        belief: (N, L, K) probabilities to begin with.

    Returns:
        Per pass the belief as (N, L, K) log-probabilities, and the states after the last one.
    """
    beliefs = []
    for number in range(num_passes):
        states = states_of(embed(belief, number))
        beliefs.append(logits_of(states).log_softmax(-1))
        belief = beliefs[-1].exp()
    return beliefs, states


EMBEDDED = 0.1  # size of embeddings at the start


def init_weights(module: nn.Module, layers: int) -> None:
    """N(0, 1 / fan-in) for matrices, residual projections scaled by 1 / sqrt(2 * layers); N(0, 0.1^2) for embeddings.

    GPT-2's constant 0.02 is meant for 768 channels; at 48 it cost a tenfold longer plateau on Sudoku.
    """
    for child_name, child in module.named_modules():
        if isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=EMBEDDED)
        elif isinstance(child, nn.Linear):
            scale = (2 * layers) ** -0.5 if child_name.endswith((".out", ".down")) else 1.0
            nn.init.normal_(child.weight, std=scale * child.in_features**-0.5)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def check_architecture(
    vocab_size: int,
    length: int,
    dim: int,
    layers: int,
    heads: int,
    noise: str,
    predicts: str,
    rotary: bool,
    order: str,
    block_length: int | None,
    c1: float,
    c2: float,
    num_passes: int,
) -> None:
    """Raises ValueError for sizes and kinds that do not go together in a :class:`Backbone`."""
    kinds = ("denoiser",) if noise == "mask" else get_args(Prediction)
    sizes = {"vocab_size": vocab_size, "dim": dim, "layers": layers, "heads": heads, "num_passes": num_passes}
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise ValueError(f"{name} must be a whole number, not {size!r:.60}")
    if min(vocab_size, dim, layers, heads) < 1 or dim % heads or predicts not in kinds:
        raise ValueError(
            f"vocab_size {vocab_size}, dim {dim}, layers {layers}, heads {heads}, noise {noise!r}, predicts "
            f"{predicts!r}: all sizes must be at least 1, dim a multiple of heads, and predicts one of {kinds}"
        )
    if noise not in ("mask", "uniform") or (noise == "uniform" and (order != "none" or block_length is not None)):
        raise ValueError(f"noise must be 'mask', or 'uniform' without an order or blocks, not {noise!r}")
    if rotary and dim % (2 * heads):
        raise ValueError(f"rotary needs dim to be a multiple of 2 heads, so not dim {dim} with {heads} heads")
    if order not in get_args(OrderName) or (order != "none" and block_length is not None) or not 0 <= c2 < c1:
        raise ValueError(
            f"order {order!r}, block_length {block_length}, c1 {c1}, c2 {c2}: the order must be one of "
            f"{get_args(OrderName)}, 'none' with a block_length, and 0 <= c2 < c1"
        )
    if block_length is not None and not 1 <= block_length <= length:
        raise ValueError(f"block_length must be between 1 and {length}, not {block_length}")
    if not 1 <= num_passes <= MOST_DEEP or (num_passes > 1 and (noise, order, block_length) != ("mask", "none", None)):
        raise ValueError(
            f"num_passes must be at least 1, and 1 with uniform noise, an order or blocks, not {num_passes}"
        )


def own_symbols(vocabularies: Sequence[int] | None, vocab_size: int, length: int) -> Tensor | None:
    """(L, V) bool, which symbols a position may hold, where each has its own. Raises ValueError for sizes that do not
    add up."""
    if vocabularies is None:
        return None
    if sum(vocabularies) != vocab_size or len(vocabularies) != length or min(vocabularies) < 1:
        raise ValueError(
            f"vocabularies must be {length} sizes of at least 1 that add up to {vocab_size}, not {list(vocabularies)}"
        )
    return torch.block_diag(*(torch.ones(1, size) for size in vocabularies)).bool()


class Backbone(nn.Module, HubModel, tags=["unmask", "discrete-diffusion", "denoiser"]):
    """A denoiser: given tokens with holes, or with noise in place of some, the symbol distribution at every position.

    For masking it is not told the diffusion time: the optimal prediction depends on the visible tokens only (Ou et al.
    2024, arXiv 2406.03736). For uniform noise it is told how likely each symbol is still clean.

    A *recurrent* denoiser has several passes (``num_passes``). The first is that of a model with one. Each later has,
    in place of the mask's embedding, the expected embedding of the symbols under the last pass's belief: what an order
    policy's :class:`Reader` sees, so a reader copied from it goes on where the denoiser has stopped.

    Args:
        vocab_size: V, number of symbols. Input tokens are 0 .. V, where V is the mask.
        coordinates: (L, C) integer coordinates of the positions, as nested lists.
        dim, layers, heads: D, number of blocks, attention heads.
        noise: ``mask``, or ``uniform``: symbols give way to others (:class:`pretrain.uniform.Uniform`).
        predicts: what the logits mean: with masks always ``denoiser``, p(x_0 | visible tokens). With uniform noise
            ``denoiser``, ``loo`` (leave-one-out) or ``absorbing``, which is also told where a symbol is noise.
        order: what it learns about its order (:mod:`pretrain.orders`).
        vocabularies: how many symbols each position has for itself, as in :class:`tasks.Task`; it predicts no others.
        rotary: attention sees how far apart positions are, as running text needs; dim must be a multiple of 2 heads.
        fingerprint: of the symbols it was trained on (:attr:`tasks.Task.fingerprint`).
        block_length: positions see their own block of this many and those before; 1 is autoregressive. None: all.
        c1, c2: of the order ``context``; the paper's best.
        prompt_length: how many first positions are always given; it has learned to predict those behind them alone.
        num_passes: how often it reads the sequence; more than 1 for noise ``mask`` without an order or blocks.
    """

    kind = "denoiser"

    def __init__(
        self,
        vocab_size: int,
        coordinates: Sequence[Sequence[int]],
        dim: int = 64,
        layers: int = 4,
        heads: int = 4,
        noise: Literal["mask", "uniform"] = "mask",
        predicts: Prediction = "denoiser",
        vocabularies: Sequence[int] | None = None,
        rotary: bool = False,
        fingerprint: str | None = None,
        order: OrderName = "none",
        block_length: int | None = None,
        c1: float = 0.7,
        c2: float = 0.65,
        prompt_length: int = 0,
        num_passes: int = 1,
    ) -> None:
        super().__init__()
        check_architecture(
            vocab_size,
            len(coordinates),
            dim,
            layers,
            heads,
            noise,
            predicts,
            rotary,
            order,
            block_length,
            c1,
            c2,
            num_passes,
        )
        self.vocab_size, self.length, self.dim, self.num_passes = vocab_size, len(coordinates), dim, num_passes
        self.noise, self.predicts, self.fingerprint = noise, predicts, fingerprint
        self.block_length, self.rotary, self.prompt_length = block_length, rotary, prompt_length
        self.register_buffer("own", own_symbols(vocabularies, vocab_size, self.length), persistent=False)
        self.symbols = nn.Embedding(vocab_size + 1, dim)
        self.positions = CoordinateEmbedding(coordinates, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size)
        if noise == "uniform":
            self.level = nn.Sequential(nn.Linear(2, dim), nn.SiLU(), nn.Linear(dim, dim))
        if predicts == "absorbing":
            self.is_noise = nn.Embedding(2, dim)
        init_weights(self, layers)
        self.order: orders.NoOrder
        if order == "context":
            self.order = orders.ContextOrder(_order_network(dim, heads), _order_network(dim, heads), c1, c2)
        elif order == "none":
            self.order = orders.NoOrder()
        else:
            self.order = orders.PositionOrder(self.length) if order == "positions" else orders.SymbolOrder(vocab_size)

    @property
    def mask_id(self) -> int:
        return self.vocab_size

    @property
    def process(self) -> Uniform:
        """What corrupts the sequences of a model with uniform noise; its alphabet is the position's symbols."""
        every = torch.ones(self.length, self.vocab_size, dtype=torch.bool, device=self.head.weight.device)
        return Uniform(every if self.own is None else self.own)

    def trunk(self, tokens: Tensor, alpha: Tensor | None = None, is_noise: Tensor | None = None) -> Tensor:
        """(N, L, D) states before the head, of the first pass. For the arguments see :meth:`forward`."""
        attends = None
        if self.block_length is not None:
            block = blocks_of(self.length, self.block_length).to(tokens.device)
            attends = block.unsqueeze(1) >= block
        x = self.symbols(tokens) + self.positions()  # (N, L, D)
        if self.noise == "uniform":
            alpha = alpha.expand(tokens.shape).clamp(1e-4, 1 - 1e-4).float()  # 1 where a symbol is given
            x = x + self.level(torch.stack([alpha, torch.logit(alpha) / 10], -1))
        if self.predicts == "absorbing":
            x = x + self.is_noise(is_noise.long())
        return encode(self, x, attends)

    def passes(
        self, tokens: Tensor, num_passes: int | None = None, belief: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Per pass the belief as (N, L, V) log-probabilities, and the states (N, L, D) after the last pass.

        Args:
            tokens: (N, L) int64. num_passes: None: as many as it was made for.
            belief: (N, L, V) probabilities of a pass to go on from; None: begin with the first.
        """
        masked, symbols = (tokens == self.mask_id).unsqueeze(-1), self.symbols(tokens)

        def embed(belief: Tensor | None, number: int) -> Tensor:
            if belief is None:
                return symbols + self.positions()
            return torch.where(masked, belief @ self.symbols.weight[:-1], symbols) + self.positions()

        return run_passes(num_passes or self.num_passes, embed, partial(encode, self), self.logits, belief)

    def forward(self, tokens: Tensor, alpha: Tensor | None = None, is_noise: Tensor | None = None) -> Output:
        """Args:
        tokens: (N, L) int64.
        alpha: with uniform noise, (N, 1) or (N, L): how likely a symbol is still clean; 1 where it is given.
        is_noise: (N, L) bool, of a model that predicts ``absorbing``: where the symbol is the position's noise symbol.

        Returns: of the last pass.
        """
        if self.num_passes > 1:
            beliefs, hidden = self.passes(tokens)
            return Output(beliefs[-1], hidden)
        hidden = self.trunk(tokens, alpha, is_noise)
        logits = self.logits(hidden)
        if self.predicts == "absorbing":
            # Without the tilt the bound of a network that is not yet trained is infinite.
            own = torch.where(is_noise, tilt(alpha.expand(tokens.shape)), 0.0)
            logits = logits.scatter_add(-1, tokens.unsqueeze(-1), own.to(logits).unsqueeze(-1))
        return Output(logits, hidden)

    def logits(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """(N, L, V) logits of states (N, L, D); or (M, V) of states (M, D) at ``positions`` (M,)."""
        logits = self.head(hidden)
        if self.own is None:
            return logits
        return logits.masked_fill(~(self.own if positions is None else self.own[positions]), -torch.inf)

    def predict_blocks(self, noisy: Tensor, clean: Tensor) -> Tensor:
        """(N, L, V) logits of every block of ``noisy`` given the clean blocks before it, in one pass.

        Noisy and clean sequence run side by side (Arriola et al. 2025, arXiv 2503.09573): a noisy position sees its own
        noisy block and the clean blocks before, a clean one what :meth:`trunk` lets it see. So block b's logits are
        those of :meth:`forward` on clean blocks before b, noisy block b, and anything after.
        """
        block = blocks_of(self.length, self.block_length or self.length).to(noisy.device)
        same, before = block.unsqueeze(1) == block, block.unsqueeze(1) > block
        attends = torch.cat([torch.cat([same, before], 1), torch.cat([torch.zeros_like(same), same | before], 1)])
        x = self.symbols(torch.cat([noisy, clean], 1)) + self.positions().repeat(2, 1)  # (N, 2 L, D)
        rotation = None
        if self.rotary:
            rotation = rotations(self.length, self.dim // self.blocks[0].heads, noisy.device).repeat(1, 2, 1)
        for layer in self.blocks:
            x = layer(x, attends, rotation)
        return self.logits(self.norm(x[:, : self.length]))


class Reader(nn.Module):
    """Reads a partly masked sequence ``num_passes`` times; see :func:`run_passes`.

    Args:
        vocab_size: symbols that it knows. coordinates: (L, C) integer coordinates, as nested lists.
        dim, layers, heads: size. hidden_dim: channels of another network's hidden states to read; 0: none.
        rotary: attention sees distances, as text needs.
    """

    def __init__(
        self,
        vocab_size: int,
        coordinates: Sequence[Sequence[int]],
        dim: int,
        layers: int,
        heads: int,
        num_passes: int = 2,
        hidden_dim: int = 0,
        rotary: bool = False,
    ) -> None:
        super().__init__()
        self.vocab_size, self.num_passes, self.rotary = vocab_size, num_passes, rotary
        self.symbols = nn.Embedding(vocab_size, dim)
        self.positions = CoordinateEmbedding(coordinates, dim)
        self.hidden = nn.Linear(hidden_dim, dim, bias=False) if hidden_dim else None
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size)
        init_weights(self, layers)
        if self.hidden is not None:
            self.hidden.weight.data.mul_(EMBEDDED)  # as large as what they are added to

    @torch.no_grad()
    def copy_from(self, backbone: Backbone) -> None:
        """Start from a denoiser's embeddings, last blocks, norm and head (UPO copies LLaDA's last block likewise)."""
        for block, original in zip(self.blocks, backbone.blocks[-len(self.blocks) :], strict=True):
            block.load_state_dict(original.state_dict())
        for name in ("positions", "norm", "head"):
            getattr(self, name).load_state_dict(getattr(backbone, name).state_dict())
        self.symbols.weight.copy_(backbone.symbols.weight[:-1])

    def embed(self, tokens: Tensor | None, masked: Tensor, hidden: Tensor | None = None) -> Tensor:
        """(N, L, D): where each position stands, the symbol on it unless ``masked`` (N, L), and ``hidden`` states,
        normalised.

        Args:
            tokens: (N, L) int64; None: symbols are not seen.
        """
        known = self.positions()  # (L, D)
        if tokens is not None:
            known = known + self.symbols(tokens.clamp(max=self.vocab_size - 1)) * ~masked.unsqueeze(-1)
        if self.hidden is not None:
            known = known + self.hidden(F.layer_norm(hidden, hidden.shape[-1:]))
        return known.expand(*masked.shape, -1)

    def forward(
        self,
        known: Tensor,
        belief: Tensor,
        masked: Tensor,
        symbols: Tensor | None = None,
        revisable: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Per pass the belief as (N, L, K) log-probabilities, and the states (N, L, D) after the last one.

        Args:
            known: (N, L, D) from :meth:`embed`.
            belief: (N, L, K) probabilities that the first pass reads at ``masked`` (N, L).
            symbols: (N, L, K) int64, which symbols the belief is over; None: all, in their order.
            revisable: (N, L) bool, filled positions at which later passes read the belief, too.
        """

        def embed(belief: Tensor, number: int) -> Tensor:
            believes = masked if revisable is None or number == 0 else masked | revisable
            return known + self._expected_embedding(belief, symbols) * believes.unsqueeze(-1)

        return run_passes(self.num_passes, embed, partial(encode, self), partial(self._logits, symbols=symbols), belief)

    def _expected_embedding(self, belief: Tensor, symbols: Tensor | None) -> Tensor:
        if symbols is None:
            return belief @ self.symbols.weight
        return (belief.unsqueeze(-1) * self.symbols(symbols)).sum(-2)  # (N, L, K, D) to (N, L, D)

    def _logits(self, x: Tensor, symbols: Tensor | None) -> Tensor:
        if symbols is None:
            return self.head(x)
        return (self.head.weight[symbols] @ x.unsqueeze(-1)).squeeze(-1) + self.head.bias[symbols]


def _order_network(dim: int, heads: int) -> nn.Module:
    """One block and an MLP, (N, L, D) to (N, L, 1), zero at the start; half as wide inside as the trunk's blocks."""
    network = nn.Sequential(
        Block(dim, heads, mlp_ratio=2), nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 1)
    )
    init_weights(network, 1)
    nn.init.zeros_(network[-1].weight)
    return network


def parameter_count(module: nn.Module) -> int:
    """How many numbers the module's parameters hold."""
    return sum(p.numel() for p in module.parameters())
