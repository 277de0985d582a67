"""Losses of uniform diffusion. Each is per position and at one time, (N, L) nats, weighted so that its mean over
uniform t estimates the bound; all are computed in float64 from log-probabilities.

Which prediction a loss wants, and what a network that outputs another kind then learns (arXiv 2605.22765; minimised by
enumeration in tests/pretrain/test_uniform.py): the plug-in bound wants leave-one-out, cross-entropy and the
maximal-coupling bound the denoiser. :meth:`pretrain.uniform.Uniform.convert` goes between the two, so that either
network can be trained with either.

Shapes: N sequences, L positions, V symbols. ``slope`` is d alpha / dt, below 0.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain import masking
from pretrain.backbone import Backbone
from pretrain.uniform import ALPHA_MIN, Uniform, alpha_of
from tasks import UnmaskError

Loss = Literal["bound", "coupling", "cross_entropy"]
ALPHA_MAX = 1 - 1e-9  # the noise level of given positions in formulas that take a logarithm of 1 - alpha


class Corrupted(NamedTuple):
    """``tokens`` (N, L) at noise level ``alpha`` (N, L), 1 where they are given; ``noise`` (N, L) the noise symbols."""

    tokens: Tensor
    alpha: Tensor
    noise: Tensor

    @property
    def free(self) -> Tensor:
        """(N, L) bool: what may be noise; all but the prompt."""
        return self.alpha < 1


def uniform_loss(
    model: Backbone, clean: Tensor, generator: torch.Generator, loss: Loss = "bound", prompt_fraction: float = 0.5
) -> Tensor:
    """One-sample estimate of a loss, in nats per position that is not given.

    ``bound`` is the plug-in bound, or the absorbing one of a model that predicts that.

    Args:
        clean: (N, L) int64.
        prompt_fraction: share of sequences of which some positions are given clean, a random share of each: so the
            model also learns to complete prompts.

    Raises:
        UnmaskError: a symbol of ``clean`` that noise can never be.
    """
    (n, length), process = clean.shape, model.process
    process.check(clean)
    t = masking.low_discrepancy_times(n, generator)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=clean.device)

    hides = torch.where(random(n, 1) < prompt_fraction, random(n, 1), 1.0)  # share of positions that are not given
    free = random(n, length) < hides
    alpha = torch.where(free, alpha_of(t.double()).unsqueeze(1), 1.0)
    noise = process.noise(n, generator)
    corrupted = Corrupted(process.corrupt(clean, alpha, noise, generator), alpha, noise)
    return loss_at(model, clean, corrupted, loss).sum() / free.sum().clamp(min=1)


def loss_at(model: Backbone, clean: Tensor, corrupted: Corrupted, loss: Loss) -> Tensor:
    """(N, L) float64 the loss at each position, 0 where it is given.

    Raises:
        UnmaskError: a loss that there is not, or not of what the model predicts.
    """
    allowed = ("bound", "cross_entropy") if model.predicts == "absorbing" else get_args(Loss)
    if loss not in allowed:
        raise UnmaskError(f"a model that predicts {model.predicts!r} has the losses {', '.join(allowed)}; not {loss!r}")
    tokens, alpha, noise = corrupted
    is_noise = (tokens == noise) & corrupted.free
    log_probs = model(tokens, alpha, is_noise).logits.double().log_softmax(-1)
    alpha, slope, process = alpha.double().clamp(max=ALPHA_MAX), ALPHA_MIN - 1, model.process
    if model.predicts == "absorbing":
        if loss == "cross_entropy":
            each = cross_entropy(log_probs, clean) * is_noise
        else:
            each = absorbing_bound(log_probs, clean, tokens, noise, alpha, slope)
    elif loss == "bound":
        loo = process.convert(log_probs, tokens, alpha, model.predicts, "loo")
        each = plug_in_bound(process, loo, clean, tokens, alpha, slope)
    else:
        denoiser = process.convert(log_probs, tokens, alpha, model.predicts, "denoiser")
        if loss == "coupling":
            each = maximal_coupling_bound(denoiser, clean, tokens, alpha, slope)
        else:
            each = cross_entropy(denoiser, clean)
    return torch.where(corrupted.free, each, 0.0)


def plug_in_bound(process: Uniform, loo: Tensor, clean: Tensor, tokens: Tensor, alpha: Tensor, slope: float) -> Tensor:
    """The Kullback-Leibler rate between the true reverse jumps and those of a leave-one-out prediction:

        sum over j != x_t of R(j) - R0(j) + R0(j) log(R0(j) / R(j)),   R(j) = -slope / (alpha K) c(j) / c(x_t),

    c = alpha r + (1 - alpha) / K, and R0 the same of the one-hot x_0 (UDLM's and Duo's loss, from first principles).
    Its integral over t, plus the divergence of the prior, bounds -log p(x), and is tight for exact r.
    """
    one_hot = torch.where(F.one_hot(clean, loo.shape[-1]).bool(), 0.0, -torch.inf).to(loo)
    model, true = (process.score(x, tokens, alpha) for x in (loo, one_hot))  # log c(j) / c(x_t)
    elsewhere = process.alphabet & ~F.one_hot(tokens, loo.shape[-1]).bool()
    ratio = torch.where(elsewhere, model, 0.0) - torch.where(elsewhere, true, 0.0)  # log R / R0
    rate = torch.where(elsewhere, true, -torch.inf).exp()
    scale = -slope / (alpha.double() * process.size)
    return scale * (rate * (torch.expm1(ratio) - ratio)).sum(-1)


def cross_entropy(denoiser: Tensor, clean: Tensor) -> Tensor:
    """-log d(x_0): no bound, the denoiser's own target."""
    return -_at(denoiser.double(), clean)


def maximal_coupling_bound(denoiser: Tensor, clean: Tensor, tokens: Tensor, alpha: Tensor, slope: float) -> Tensor:
    """The bound of the process that changes as rarely as it can: with lam = -slope / (1 - alpha),

        lam (1 - d(x_t) - 1{x_0 != x_t} (1 + log d(x_0))).

    Not comparable with the other bounds: it stays above the entropy of the data even for the exact denoiser, since
    its reverse process has no Markov form.
    """
    changed = clean != tokens
    inner = 1 - _at(denoiser.double(), tokens).exp() - changed * (1 + _at(denoiser.double(), clean))
    return -slope / (1 - alpha.double()) * inner


def absorbing_bound(
    absorbing: Tensor, clean: Tensor, tokens: Tensor, noise: Tensor, alpha: Tensor, slope: float
) -> Tensor:
    """The bound of the absorbing reformulation (AUDM): the maximal-coupling form where x_t is its noise symbol u, and
    nothing elsewhere, where x_t is certain to be clean. Tight for the exact posterior given (x_t, u)."""
    return maximal_coupling_bound(absorbing, clean, tokens, alpha, slope) * (tokens == noise)


def prior_divergence(process: Uniform, alpha: float, n: int) -> Tensor:
    """(n, L) KL of q_1(. | x_0) to the uniform prior, for what is left of the data, ``alpha``, at t = 1."""
    k = process.size.double()
    present, other = alpha + (1 - alpha) / k, (1 - alpha) / k
    return (torch.xlogy(present, present * k) + (k - 1) * torch.xlogy(other, other * k)).expand(n, -1)


def _at(log_probs: Tensor, symbols: Tensor) -> Tensor:
    return log_probs.gather(-1, symbols.unsqueeze(-1)).squeeze(-1)
