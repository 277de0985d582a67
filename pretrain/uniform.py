"""Uniform noise: symbols give way to others, and three predictions of what they were.

Shapes: N sequences, L positions, V symbols, K of them in a position's alphabet.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.masking import gumbel
from tasks import UnmaskError

Prediction = Literal["denoiser", "loo", "absorbing"]
ALPHA_MIN = 1e-3  # what is left of the data at t = 1


def alpha_of(t: Tensor) -> Tensor:
    """alpha(t) = 1 - (1 - ALPHA_MIN) t, the probability that a symbol is still clean."""
    return 1 - (1 - ALPHA_MIN) * t


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
