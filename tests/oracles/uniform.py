"""Uniform diffusion of an enumerated joint distribution, by brute force: nothing here uses the package's formulas."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from pretrain.uniform import Uniform


class Enumerated:
    """p_0 over K ** L sequences, random, correlated, of full support; float64.

    S = K ** L sequences x, in ``X`` (S, L). Every table is over them.
    """

    def __init__(self, symbols: int, length: int, seed: int = 0) -> None:
        self.K, self.L = symbols, length
        self.X = torch.tensor(list(itertools.product(range(symbols), repeat=length)))
        self.S = len(self.X)
        weight = torch.rand(self.S, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3 + 1e-3
        self.p0 = weight / weight.sum()
        self.one_hot = torch.nn.functional.one_hot(self.X, symbols).double()

    def entropy(self) -> float:
        return -float((self.p0 * self.p0.log()).sum())

    def site(self, alpha: float) -> Tensor:
        """(K, K) one position's kernel, from row to column."""
        return alpha * torch.eye(self.K, dtype=torch.float64) + (1 - alpha) / self.K

    def kernel(self, alpha: float, without: int | None = None) -> Tensor:
        """(S, S) all positions', optionally leaving one out."""
        out = torch.ones(self.S, self.S, dtype=torch.float64)
        for at in range(self.L):
            if at != without:
                out = out * self.site(alpha)[self.X[:, at]][:, self.X[:, at]]
        return out

    def marginal(self, alpha: float) -> Tensor:
        """(S,) p_t."""
        return self.p0 @ self.kernel(alpha)

    def denoiser(self, alpha: float) -> Tensor:
        """(S, L, K) P(x_0^l = k | x_t)."""
        joint = self.p0[:, None] * self.kernel(alpha)
        return torch.einsum("st,slk->tlk", joint / joint.sum(0), self.one_hot)

    def loo(self, alpha: float) -> Tensor:
        """(S, L, K) P(x_0^l = k | x_t without l)."""
        out = torch.zeros(self.S, self.L, self.K, dtype=torch.float64)
        for at in range(self.L):
            joint = self.p0[:, None] * self.kernel(alpha, at)
            out[:, at] = torch.einsum("st,sk->tk", joint / joint.sum(0), self.one_hot[:, at])
        return out

    def index(self, sequence: Tensor) -> int:
        return int(sum(int(s) * self.K ** (self.L - 1 - i) for i, s in enumerate(sequence)))

    def changed(self, row: int, at: int, symbol: int) -> int:
        """Index of sequence ``row`` with ``symbol`` at position ``at``."""
        sequence = self.X[row].clone()
        sequence[at] = symbol
        return self.index(sequence)

    def ratios(self, alpha: float) -> Tensor:
        """(S, L, K) p_t(x with symbol j at l) / p_t(x)."""
        p = self.marginal(alpha)
        out = torch.zeros(self.S, self.L, self.K, dtype=torch.float64)
        for row, at, symbol in itertools.product(range(self.S), range(self.L), range(self.K)):
            out[row, at, symbol] = p[self.changed(row, at, symbol)] / p[row]
        return out

    def reverse(self, now: float, then: float) -> Tensor:
        """(S, L, K) P(x_s^l = j | x_t), alpha_t = now < alpha_s = then."""
        joint = self.marginal(then)[:, None] * self.kernel(now / then)
        return torch.einsum("st,slk->tlk", joint / joint.sum(0), self.one_hot)

    # ------------------------------------------------------------------ with an explicit noise symbol per position
    def pair_site(self, alpha: float) -> Tensor:
        """(K, K, K) q(x, u | x_0) of one position, indices (x_0, x, u): x is x_0 with probability alpha, else u."""
        eye = torch.eye(self.K, dtype=torch.float64)
        return (alpha * eye[:, :, None] + (1 - alpha) * eye[None]).expand(self.K, self.K, self.K) / self.K

    def pairs(self) -> tuple[Tensor, Tensor]:
        """(S * S, L) each: all x and u."""
        rows = torch.cartesian_prod(torch.arange(self.S), torch.arange(self.S))
        return self.X[rows[:, 0]], self.X[rows[:, 1]]

    def pair_joint(self, alpha: float, without: int | None = None) -> Tensor:
        """(S, S * S) p(x_0, (x, u)), optionally leaving a position out."""
        x, u = self.pairs()
        out = self.p0[:, None].expand(self.S, len(x)).clone()
        for at in range(self.L):
            if at != without:
                out = out * self.pair_site(alpha)[self.X[:, at]][:, x[:, at], u[:, at]]
        return out

    def absorbing(self, alpha: float) -> Tensor:
        """(S * S, L, K) P(x_0^l = k | x, u); every pair is possible."""
        joint = self.pair_joint(alpha)
        return torch.einsum("st,slk->tlk", joint / joint.sum(0), self.one_hot)


JOINTS = {name: Enumerated(k, length, seed) for name, (k, length, seed) in {
    "3^2": (3, 2, 1), "4^2": (4, 2, 2), "3^3": (3, 3, 3)}.items()}  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def process(joint: Enumerated) -> Uniform:
    return Uniform(torch.ones(joint.L, joint.K, dtype=torch.bool))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def tv(p: Tensor, q: Tensor) -> Tensor:
    return 0.5 * (p - q).abs().sum(-1)


def one_hot(symbols: Tensor, k: int) -> Tensor:
    """Log-probabilities."""
    return torch.nn.functional.one_hot(symbols, k).double().log()
