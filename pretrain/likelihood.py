"""How likely a model finds a sequence: unbiased estimates of bounds on -log p(x), exact values where there are some.

The time integral of the objective cannot be cut off at a small t without leaving the bound: what is dropped is
positive, and for weights below 1 it is not small. In tau = -log t masking is time-homogeneous, so the integral has a
form without t (derived; tests/pretrain/test_likelihood.py checks it by enumeration): positions are revealed in
Plackett-Luce order sigma of the masking weights w, and with W, Ŵ the sums of w and of the model's ŵ over the
positions still masked after k,

    path bound  = E_sigma sum_k (1 / W) sum_i { w_i CE_i + w_i log(w_i / ŵ_i) - w_i + ŵ_i }
    order bound = E_sigma sum_k sum_i (w_i / W) { CE_i + log(w_i / W) - log(ŵ_i / Ŵ) }   <=  path bound

both sums over masked i. The order bound is that of the exact event sampler, one symbol at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor

import tasks
from pretrain import masking, uniform
from pretrain.backbone import Backbone
from pretrain.checkpoint import PACKAGED_DENOISERS, load_model
from pretrain.masking import PolynomialSchedule
from pretrain.objectives.masked import cross_entropies, integrand
from pretrain.objectives.uniform import Corrupted, loss_at, prior_divergence
from pretrain.run import resolve_device
from tasks import UnmaskError
from tasks.files import STDOUT, check_writable, report_json
from tasks.settings import AtLeast1, Seed, validate

EPSILON = 1e-3  # where the truncated estimate stops


@dataclass(frozen=True)
class Bound:
    """Estimates per sequence, (N,) nats each: divide by the length for nats per position.

    ``path`` and ``order`` are unbiased and bound -log p(x) from above in expectation; ``exact`` says that they are
    -log p(x) itself. ``truncated``, if asked for, is the integral over t >= ``epsilon`` alone: *not* a bound.
    """

    path: Tensor
    order: Tensor
    exact: bool = False
    truncated: Tensor | None = None
    epsilon: float = EPSILON


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """(mean, standard error) over (N,) sequences; of one sequence the error is not known, so infinite."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("inf")


@torch.no_grad()
def bound(
    model: Backbone, clean: Tensor, generator: torch.Generator, samples: int = 8, truncated: bool = False
) -> Bound:
    """Estimate the bounds of ``clean`` (N, L) from ``samples`` forwards, each with one mask per sequence (and block).

    The number of masked positions is stratified over the samples. Autoregressive models take one forward. With uniform
    noise both bounds are the same: the plug-in bound, or the absorbing one, with times stratified over the samples,
    plus the divergence of the prior. Of models with prompts it is of what is behind, given the prompt.

    Raises:
        UnmaskError: ``truncated`` of a model with blocks or with uniform noise.
    """
    if model.noise == "uniform":
        if truncated:
            raise UnmaskError("the truncated estimate is for masked models")
        return _uniform_bound(model, clean, generator, samples)
    if model.block_length is not None:
        if truncated:
            raise UnmaskError("the truncated estimate is for models without blocks")
        return _block_bound(model, clean, generator, samples)
    n, length = clean.shape
    hidden = model.trunk(clean) if model.order.reads_clean else None
    weights = model.order.order_weights(clean, hidden).double().expand(n, length)
    first = torch.where(torch.arange(length, device=clean.device) < model.prompt_length, torch.inf, weights)
    behind = length - model.prompt_length
    paths, by_order, cut = [], [], []
    for sample in range(samples):
        uniform = torch.rand(n, generator=generator, device=clean.device)
        revealed = ((sample + uniform) * behind / samples).long().clamp(max=behind - 1)  # how many are visible
        masked = masking.plackett_luce(first, generator) >= (model.prompt_length + revealed).unsqueeze(1)
        cross_entropy, order_weights = _predict(model, clean, masked)
        paths.append(behind * integrand(cross_entropy, weights, order_weights, masked) / (weights * masked).sum(1))
        share = torch.where(masked, weights / (weights * masked).sum(1, keepdim=True), 1.0)
        own = torch.where(masked, order_weights / (order_weights * masked).sum(1, keepdim=True), 1.0)
        terms = share * (cross_entropy + share.log() - own.log())
        by_order.append(behind * torch.where(masked, terms, 0.0).sum(1))
        if truncated:
            cut.append(_at_time(model, clean, PolynomialSchedule(weights), generator))
    return Bound(
        torch.stack(paths).mean(0), torch.stack(by_order).mean(0), truncated=torch.stack(cut).mean(0) if cut else None
    )


def _predict(model: Backbone, clean: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """(N, L) float64 each: cross-entropy of the clean symbols and the model's weights, given what is not masked."""
    log_probs, order_weights = model.order.reverse(*model(torch.where(masked, model.mask_id, clean)))
    return cross_entropies(log_probs.double(), clean), order_weights.double()


def _at_time(
    model: Backbone, clean: Tensor, schedule: PolynomialSchedule, generator: torch.Generator, epsilon: float = EPSILON
) -> Tensor:
    """(N,) one-sample estimate of the integral over t in [epsilon, 1]."""
    t = epsilon + (1 - epsilon) * torch.rand(len(clean), generator=generator, device=clean.device).double()
    masked = torch.rand(clean.shape, generator=generator, device=clean.device) < schedule.masked_probability(t)
    masked &= torch.arange(clean.shape[1], device=clean.device) >= model.prompt_length
    cross_entropy, order_weights = _predict(model, clean, masked)
    return (1 - epsilon) * integrand(cross_entropy, schedule.velocity(t), order_weights / t.unsqueeze(1), masked)


def _block_bound(model: Backbone, clean: Tensor, generator: torch.Generator, samples: int) -> Bound:
    """The sum over blocks of each block's bound given those before it; every block is estimated in every forward."""
    n, length = clean.shape
    block = masking.blocks_of(length, model.block_length).to(clean.device)
    sizes = block.bincount()[block]  # (L,) of its block
    totals = []
    for sample in range(1 if model.block_length == 1 else samples):
        uniform = torch.rand(n, int(block[-1]) + 1, generator=generator, device=clean.device)[:, block]
        revealed = ((sample + uniform) * sizes / samples).long().minimum(sizes - 1) if model.block_length > 1 else 0
        clocks = torch.rand(n, length, generator=generator, device=clean.device)
        same = block.unsqueeze(1) == block
        rank = ((clocks.unsqueeze(1) < clocks.unsqueeze(2)) & same).sum(2)  # within its block
        masked = rank >= revealed
        logits = model.predict_blocks(torch.where(masked, model.mask_id, clean), clean).double()
        cross_entropy = cross_entropies(logits.log_softmax(-1), clean)
        left = (masked.unsqueeze(1) & same).sum(2)  # masked in its block
        totals.append(torch.where(masked, cross_entropy * sizes / left.clamp(min=1), 0.0).sum(1))
    total = torch.stack(totals).mean(0)
    return Bound(total, total, exact=model.block_length == 1)


def _uniform_bound(model: Backbone, clean: Tensor, generator: torch.Generator, samples: int) -> Bound:
    (n, length), process = clean.shape, model.process
    process.check(clean)
    total = torch.zeros(n, dtype=torch.float64, device=clean.device)
    for sample in range(samples):
        t = (sample + 1 - torch.rand(n, 1, generator=generator, device=clean.device)) / samples
        alpha = uniform.alpha_of(t.double()).expand(n, length)
        noise = process.noise(n, generator)
        corrupted = Corrupted(process.corrupt(clean, alpha, noise, generator), alpha, noise)
        total = total + loss_at(model, clean, corrupted, "bound").sum(1) / samples
    total = total + prior_divergence(process, uniform.ALPHA_MIN, n).sum(1)
    return Bound(total, total)


# ---------------------------------------------------------------------- the command
@dataclass(frozen=True)
class LikelihoodCommand:
    """How likely a denoiser finds held-out sequences: unbiased bounds on -log p(x), with standard errors."""

    task: str
    """for example text"""
    denoiser: str
    """packaged name, folder or hub id"""
    split: Literal["validation", "test"] = "test"
    limit: AtLeast1 = 1000
    """how many sequences"""
    samples: AtLeast1 = 8
    """masks per sequence"""
    truncated: bool = False
    """also the time integral cut off at t = 0.001, as often reported: no bound"""
    json: Path | None = None
    """write the numbers here; - is stdout, and the table then goes to stderr"""
    seed: Seed = 0
    """of the masks"""
    batch: AtLeast1 = 250
    device: str = "cpu"


def run(command: LikelihoodCommand) -> None:
    """``unmask likelihood``."""
    validate(command)
    device = resolve_device(command.device)
    check_writable(command.json, "--json")
    task = tasks.get(command.task)
    model = load_model(Backbone, command.denoiser, PACKAGED_DENOISERS, "denoiser").to(device).eval()
    task.check_denoiser(model.vocab_size, model.length, model.fingerprint)
    clean = task.heldout(command.limit, command.split).answers.to(device)
    generator = torch.Generator(device).manual_seed(command.seed)
    estimates = [
        bound(model, rows, generator, command.samples, command.truncated)
        for rows in track(clean.split(command.batch), "likelihood", transient=True, disable=not Console().is_terminal)
    ]
    forms = {"exact": "path"} if estimates[0].exact else {"path bound": "path", "order bound": "order"}
    if command.truncated:
        forms["cut off at t = 0.001 (no bound)"] = "truncated"
    table = Table(title=escape(f"{task.name}, {command.denoiser}, {len(clean)}"))
    for column in ("", "nats per sequence", "nats per position", "perplexity"):
        table.add_column(column, overflow="fold")
    rows = []
    for title, form in forms.items():
        values = torch.cat([getattr(part, form) for part in estimates])
        mean, error = mean_and_error(values)
        each, its_error = mean / task.length, error / task.length
        table.add_row(
            title, f"{mean:.3f} ± {error:.3f}", f"{each:.4f} ± {its_error:.4f}", f"{math.exp(each):.3f}"
        )  # standard errors over sequences
        rows.append({"form": title, "nats": mean, "standard_error": error, "length": task.length, "n": len(clean)})
        rows[-1] |= {"task": task.name, "denoiser": command.denoiser, "split": command.split, "seed": command.seed}
    Console(stderr=command.json == STDOUT).print(table)
    report_json(command.json, rows)
