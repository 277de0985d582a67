"""What a model knows about the order in which it unmasks: weights of the process that masks, and of its own.

Weights w are the exponents of the schedule alpha = 1 - t^w (:class:`pretrain.masking.PolynomialSchedule`): a position
with a larger one is unmasked earlier. An order gives them twice: for the process that masks a *clean* sequence, from
which a loss draws its masks, and for the model that sees a *partially masked* one and generates.

Shapes: N sequences, L positions, V symbols, D channels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OrderName = Literal["none", "positions", "symbols", "context"]


class NoOrder(nn.Module):
    """All positions alike, w = 1: masked diffusion."""

    learned = False
    reads_clean = False  # whether the masking process looks at the whole clean sequence

    def order_weights(self, clean: Tensor, hidden: Tensor | None) -> Tensor:
        """(N, L) or (1, L) weights of the masking process.

        Args:
            clean: (N, L) int64. hidden: (N, L, D) the trunk's states of it, without gradient, if ``reads_clean``.
        """
        return torch.ones(1, clean.shape[1], device=clean.device)

    def reverse(self, logits: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the model does with a partially masked sequence: (N, L, V) log-probabilities of the revealed symbol and
        (N, L) weights.

        Args:
            logits: (N, L, V). hidden: (N, L, D) the trunk's states.
        """
        return logits.log_softmax(-1), logits.new_ones(logits.shape[:2])


class PositionOrder(NoOrder):
    """One weight per position, whatever is written there, for masking and revealing alike; all start at 1.

    The multivariate schedule of Garg et al. 2025 (arXiv 2511.19152); the softplus is ours.
    """

    learned = True

    def __init__(self, length: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.full((length,), math.log(math.e - 1)))

    def order_weights(self, clean: Tensor, hidden: Tensor | None) -> Tensor:
        return F.softplus(self.raw).unsqueeze(0)

    def reverse(self, logits: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return logits.log_softmax(-1), F.softplus(self.raw).expand(logits.shape[:2])

    def expected_places(self) -> Tensor:
        """(L,) float64: how many positions are unmasked before each one on average, in the Plackett-Luce order of the
        weights: sum over j != i of w_j / (w_i + w_j), since of two exponential clocks the faster rings first."""
        weights = F.softplus(self.raw.detach()).double()
        return (weights / (weights + weights.unsqueeze(1))).sum(1) - 0.5


class SymbolOrder(NoOrder):
    """One weight per symbol, starting at 1; the model's velocity follows from what it predicts: GenMD4 (Shi et al.
    2024, arXiv 2406.04329, section 6).

    With mu the model's distribution, a masked position turns into v at rate w_v mu_v / t: it is revealed at the rate
    sum_v w_v mu_v / t, as a symbol drawn in proportion to w_v mu_v.
    """

    learned = True

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.full((vocab_size,), math.log(math.e - 1)))

    def order_weights(self, clean: Tensor, hidden: Tensor | None) -> Tensor:
        return F.softplus(self.raw)[clean]

    def reverse(self, logits: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        weighted = logits.log_softmax(-1) + F.softplus(self.raw).log()
        total = weighted.logsumexp(-1)
        return weighted - total.unsqueeze(-1), total.exp()


class ContextOrder(NoOrder):
    """Exponents that depend on the whole sequence: LoMDM (Hong et al. 2026, arXiv 2602.02112, eqs. 4-7).

    w = c1 + c2 (sigmoid(g) - its mean over positions), where g is a network of one block and an MLP on the trunk's
    states, one for masking and one for revealing. Neither sends gradients into the trunk. They start at w = c1.

    Args:
        masking, revealing: the networks, (N, L, D) to (N, L, 1); they start at 0.
        c1, c2: 0 <= c2 < c1 keeps weights above 0; their ratio bounds how firmly an order can be preferred. Their
            common scale is one of time alone.
    """

    learned = True
    reads_clean = True

    def __init__(self, masking: nn.Module, revealing: nn.Module, c1: float, c2: float) -> None:
        super().__init__()
        self.masking, self.revealing, self.c1, self.c2 = masking, revealing, c1, c2

    def _spread(self, network: nn.Module, hidden: Tensor) -> Tensor:
        preference = network(hidden.detach()).squeeze(-1).float().sigmoid()  # (N, L)
        return self.c1 + self.c2 * (preference - preference.mean(1, keepdim=True))

    def order_weights(self, clean: Tensor, hidden: Tensor | None) -> Tensor:
        return self._spread(self.masking, hidden)

    def reverse(self, logits: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return logits.log_softmax(-1), self._spread(self.revealing, hidden)
