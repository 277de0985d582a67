"""Noise processes: how complete sequences lose their symbols, and in which order they come back.

Time runs from 0 (clean) to 1 (all masked). A *schedule* gives every position its own alpha^i(t), the probability that
it is still visible at time t, and the *velocity* A^i(t) = -alpha'(t) / (1 - alpha(t)), the rate at which a masked
position is revealed when time runs backwards (Hong et al. 2026, arXiv 2602.02112): the higher, the earlier it comes.

Shapes: N sequences, L positions. Schedules may have N = 1 and then hold for every sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks import UnmaskError

Prediction = Literal["denoiser", "loo", "absorbing"]


class Schedule(Protocol):
    """Per-position masking schedules."""

    def masked_probability(self, t: Tensor) -> Tensor:
        """(N, L) 1 - alpha^i(t) at times ``t`` (N,)."""
        ...

    def velocity(self, t: Tensor) -> Tensor:
        """(N, L) A^i(t) at times ``t`` (N,)."""
        ...


@dataclass(frozen=True)
class Powers:
    """alpha^i(t) = 1 - t^(w_i), so A^i(t) = w_i / t; the order of revealing is Plackett-Luce with weights w.

    w = 1 is masked diffusion; other constants per position are a multivariate schedule (Garg et al. 2025, arXiv
    2511.19152); w may also depend on the symbols (GenMD4) or on the whole sequence (LoMDM).

    Args:
        exponents: (N, L) or (1, L), greater than 0.
    """

    exponents: Tensor

    def masked_probability(self, t: Tensor) -> Tensor:
        return t.unsqueeze(1) ** self.exponents

    def velocity(self, t: Tensor) -> Tensor:
        return self.exponents / t.unsqueeze(1)

    def log_time(self, share: Tensor) -> Tensor:
        """(N,) float64 log t at which ``share`` (N,) in (0, 1] of the positions is masked on average; no gradient.

        With t^(w_i) for their probabilities, q = log t / log share solves mean_i share^(w_i q) = share. The log of
        the left side is convex and falls in q, and is above at q = 1 / mean w (Jensen), so Newton's steps go up to it.
        """
        weights, log_share = self.exponents.detach().double(), share.double().log().unsqueeze(1)  # (N, L), (N, 1)
        q = 1 / weights.mean(1, keepdim=True).expand(len(share), -1)
        for _ in range(30):
            terms = weights * q * log_share
            above = terms.logsumexp(1, keepdim=True) - math.log(weights.shape[1]) - log_share
            slope = (terms.softmax(1) * weights).sum(1, keepdim=True) * log_share
            if float(above.abs().max()) <= 1e-13:
                break
            q = q - torch.where(slope < 0, above / slope.clamp(max=-1e-300), 0.0)
        return (q * log_share).squeeze(1)

    def log_probability(self, masked: Tensor, log_t: Tensor) -> Tensor:
        """(N,) log q(which positions are masked | clean, t), of ``log_t`` (N,); ``masked`` (N, L) bool.

        Differentiable in the exponents. log alpha = log(1 - t^w) is taken as log(-expm1(w log t)), with t kept below 1,
        where it is -inf.
        """
        log_masked = self.exponents * log_t.clamp(max=-1e-6).to(self.exponents.dtype).unsqueeze(1)
        # The inner where keeps the gradient of the branch not taken finite.
        visible = torch.log(-torch.expm1(torch.where(masked, -1.0, log_masked)))
        return torch.where(masked, log_masked, visible).sum(1)


@dataclass(frozen=True)
class Windows:
    """Blocks are revealed one after another, each within its own window of time: block 0 first.

    1 - alpha^i(t) = clip(B t - (B - 1 - b(i)), 0, 1) for B blocks. One position per block is the autoregressive order;
    one block is masked diffusion; in between is block diffusion (Arriola et al. 2025, arXiv 2503.09573).

    Args:
        block: (L,) int64, the block of each position, 0 .. B - 1.
    """

    block: Tensor

    @property
    def blocks(self) -> int:
        return int(self.block.max()) + 1

    def _local(self, t: Tensor) -> Tensor:
        return self.blocks * t.unsqueeze(1) - (self.blocks - 1 - self.block)

    def masked_probability(self, t: Tensor) -> Tensor:
        return self._local(t).clamp(0.0, 1.0)

    def velocity(self, t: Tensor) -> Tensor:
        local = self._local(t)
        inside = (local > 0) & (local <= 1)
        return torch.where(inside, self.blocks / torch.where(inside, local, 1.0), 0.0)


def blocks_of(length: int, block_length: int) -> Tensor:
    """(L,) int64 block of each position when the sequence is cut into blocks of ``block_length``."""
    return torch.arange(length) // block_length


def low_discrepancy_times(n: int, generator: torch.Generator) -> Tensor:
    """(n,) times in (0, 1], one in each of n equal intervals: t_i = (i + 1 - u) / n with one shared u in [0, 1).

    The variance-reduced sampler of variational diffusion models (Kingma et al. 2021, arXiv 2107.00630, appendix I.1).
    """
    u = torch.rand((), generator=generator, device=generator.device)
    return (torch.arange(1, n + 1, device=generator.device) - u) / n


def mask(clean: Tensor, probability: Tensor, mask_id: int, generator: torch.Generator) -> Tensor:
    """Each symbol becomes ``mask_id`` with its own probability, independently.

    Args:
        clean: (N, L) int64. probability: broadcastable to (N, L), from a schedule.

    Returns:
        (N, L) int64.
    """
    hide = torch.rand(clean.shape, generator=generator, device=clean.device) < probability
    return torch.where(hide, mask_id, clean)


def gumbel(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise of the shape of ``like``: the argmax of log-probabilities plus it is a sample of them."""
    uniform = torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))


def plackett_luce(weights: Tensor, generator: torch.Generator) -> Tensor:
    """(N, L) rank of each position in an order of revealing drawn in proportion to ``weights`` (N, L): 0 comes first.

    Exponential clocks with rates w ring in Plackett-Luce order.
    """
    uniform = torch.rand(weights.shape, generator=generator, device=weights.device, dtype=weights.dtype)
    clocks = -torch.log1p(-uniform) / weights
    return clocks.argsort(1).argsort(1)


# ---------------------------------------------------------------------- uniform noise
LEAST = 1e-3  # what is left of the data at t = 1


def alpha_of(t: Tensor) -> Tensor:
    """alpha(t) = 1 - (1 - LEAST) t, the probability that a symbol is still clean."""
    return 1 - (1 - LEAST) * t


def tilt(alpha: Tensor) -> Tensor:
    """-log(1 - alpha): by how much the logit of an undecided position's own symbol u exceeds what the other positions
    say, since x = u may also be the clean symbol (derived; tests/pretrain/test_uniform.py)."""
    return -torch.log1p(-alpha.clamp(max=1 - 1e-6))


class Uniform:
    """Symbols give way to uniform noise: q_t(j | x_0) = alpha 1{j = x_0} + (1 - alpha) / K (Gourevitch et al. 2026,
    arXiv 2605.22765, and the code released with it).

    Three predictions are in use, and what may be done with one depends on which it is: the *denoiser*
    d(k) = P(x_0^l = k | x_t), *leave-one-out* r(k) = P(x_0^l = k | the other positions of x_t), and *absorbing*
    P(x_0^l = k | x_t, where x_t is noise), which refines d. The exact reverse step plugs r into the bridge, not d.

    Below, ``log_probs`` are (N, L, V), ``tokens`` (N, L), ``alpha`` (N, 1) or (N, L) in (0, 1); computed in float64.

    Args:
        alphabet: (L, V) bool, the symbols that noise may be at each position, K >= 2 of them; predictions are over
            these.

    Raises:
        UnmaskError: fewer than two symbols somewhere.
    """

    def __init__(self, alphabet: Tensor) -> None:
        if bool((alphabet.sum(1) < 2).any()):
            raise UnmaskError("every position needs at least 2 symbols for noise to be drawn from")
        self.alphabet = alphabet
        self.size = alphabet.sum(1)  # (L,) K
        self._symbols = alphabet.int().argsort(dim=1, descending=True, stable=True)  # each position's own come first

    def check(self, clean: Tensor) -> None:
        """Raises :class:`tasks.UnmaskError` if a symbol of ``clean`` (N, L) is not in its position's alphabet."""
        symbols = self.alphabet.shape[1]
        if bool(((clean < 0) | (clean >= symbols)).any()):
            raise UnmaskError(f"symbols must be between 0 and {symbols - 1}")
        known = self.alphabet[torch.arange(clean.shape[1], device=clean.device), clean]
        if not bool(known.all()):
            row, at = (~known).nonzero()[0].tolist()
            raise UnmaskError(
                f"the noise alphabet misses symbol {int(clean[row, at])} at position {at}, which the data holds: the "
                "model could never produce it"
            )

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, L) symbols, each uniform over its position's alphabet."""
        draws = torch.rand((n, len(self.size)), generator=generator, device=self.size.device)
        which = (draws * self.size).long().clamp(max=self.size - 1)  # rounding may reach the size itself
        return self._symbols.gather(1, which.T).T

    def corrupt(self, clean: Tensor, alpha: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        """(N, L) x_t: each symbol stays with probability ``alpha``, else becomes ``noise`` (which may be the same)."""
        stays = torch.rand(clean.shape, generator=generator, device=clean.device) < alpha
        return torch.where(stays, clean, noise)

    def shift(self, alpha: Tensor) -> Tensor:
        """(N, L) log(1 + K alpha / (1 - alpha)), by which d's logit of the present symbol exceeds r's."""
        alpha = alpha.double()
        return torch.log1p(self.size * alpha / (1 - alpha))

    def convert(
        self, log_probs: Tensor, tokens: Tensor, alpha: Tensor, source: Prediction, target: Prediction
    ) -> Tensor:
        """Predictions of one kind as another: exact between ``loo`` and ``denoiser`` (the paper's eq. 13).

        Raises:
            UnmaskError: to or from ``absorbing``, which knows more than the others.
        """
        log_probs = log_probs.double()
        if source == target:
            return log_probs
        if "absorbing" in (source, target):
            raise UnmaskError(f"a prediction of kind {source!r} cannot be converted to {target!r}")
        shift = self.shift(alpha) * (1 if target == "denoiser" else -1)
        present = F.one_hot(tokens, log_probs.shape[-1]).bool()
        return torch.where(present, log_probs + shift.unsqueeze(-1), log_probs).log_softmax(-1)

    def conditional(self, loo: Tensor, alpha: Tensor) -> Tensor:
        """(N, L, V) log P(x_t^l = j | the other positions of x_t) = log(alpha r(j) + (1 - alpha) / K)."""
        alpha = alpha.double()
        return self._mix(alpha, loo.double())

    def score(self, loo: Tensor, tokens: Tensor, alpha: Tensor) -> Tensor:
        """(N, L, V) log p_t(x_t with symbol j at l) / p_t(x_t)."""
        conditional = self.conditional(loo, alpha)
        return conditional - conditional.gather(-1, tokens.unsqueeze(-1))

    def bridge(self, log_probs: Tensor, tokens: Tensor, now: Tensor, then: Tensor) -> Tensor:
        """(N, L, V) log-probabilities of x_s given x_t and a prediction x of x_0,

            q(x_s = j) proportional to (rho 1{j = x_t} + (1 - rho) / K) (alpha_s x(j) + (1 - alpha_s) / K),

        with rho = alpha_t / alpha_s. Exact per position for one-hot x and for x = r; not for x = d.

        Args:
            log_probs: of x. now, then: alpha_t < alpha_s, (N, 1) or (N, L); alpha_s may be 1.
        """
        now, then = now.double(), then.double()
        rho = (now / then).expand(tokens.shape)
        elsewhere = ((1 - rho) / self.size).log().unsqueeze(-1)
        present = F.one_hot(tokens, log_probs.shape[-1]).bool()
        stays = torch.where(present, torch.logaddexp(rho.log().unsqueeze(-1), elsewhere), elsewhere)
        return (stays + self._mix(then, log_probs.double())).log_softmax(-1)

    def _mix(self, alpha: Tensor, log_probs: Tensor) -> Tensor:
        """log(alpha x + (1 - alpha) / K) over the alphabet, -inf elsewhere."""
        noise = ((1 - alpha) / self.size).log().unsqueeze(-1)  # (N, L, 1)
        mixed = torch.logaddexp(alpha.log().unsqueeze(-1) + log_probs, noise.expand(log_probs.shape))
        return mixed.masked_fill(~self.alphabet, -torch.inf)


def gumbel_like(allowed: Tensor, generator: torch.Generator) -> Tensor:
    """Gumbel noise where ``allowed``, -inf elsewhere: its argmax is uniform over what is allowed."""
    return gumbel(torch.zeros(allowed.shape, device=allowed.device), generator).masked_fill(~allowed, -torch.inf)
