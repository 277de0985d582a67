"""Generation by trained models: fill the holes of prompts, whatever order the model knows.

Shapes: N sequences, L positions, V symbols. Visible symbols never change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pretrain import processes
from pretrain.backbone import Backbone
from tasks import UnmaskError

Method = Literal["event", "ancestral", "cached"]


class Samples(NamedTuple):
    """``tokens`` (N, L) complete; ``nfe`` the number of forwards, each for all N sequences."""

    tokens: Tensor
    nfe: int


@torch.no_grad()
def sample(
    model: Backbone,
    prompts: Tensor,
    generator: torch.Generator,
    method: Method = "event",
    steps: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Samples:
    """Complete ``prompts``.

    *event* reveals one position at a time, i with probability ŵ_i / sum ŵ over the masked ones: the model's law, whose
    order bound :mod:`pretrain.bounds` gives. *ancestral* goes through ``steps`` equal steps of time; a masked position
    is revealed between t and s with probability 1 - (s / t)^ŵ_i, independently. *cached* is the same but makes no
    forward where the step before revealed nothing, which changes nothing, since the model does not see the time.
    A model with a ``block_length`` completes one block after the other, each by ``method``; of length 1 it is
    autoregressive.

    Args:
        prompts: (N, L) int64; holes hold ``model.mask_id``.
        temperature: divides the symbols' log-probabilities; 0 takes the most likely. top_p: nucleus sampling, the
            smallest set of symbols that holds this much probability.

    Raises:
        UnmaskError: a method or setting that is not allowed, prompts of another length.
    """
    if model.noise != "mask":
        raise UnmaskError("this model was trained with uniform noise; sample it with sample_uniform")
    if method not in ("event", "ancestral", "cached"):
        raise UnmaskError(f"method must be event, ancestral or cached, not {method!r}")
    if steps < 1 or not temperature >= 0 or not 0 < top_p <= 1:
        raise UnmaskError(
            f"steps must be at least 1, temperature at least 0 and top_p above 0 and at most 1, not {steps}, "
            f"{temperature} and {top_p}"
        )
    if prompts.ndim != 2 or prompts.shape[1] != model.length:
        raise UnmaskError(f"prompts must be (N, {model.length}), not {tuple(prompts.shape)}")
    block = processes.blocks_of(model.length, model.block_length or model.length).to(prompts.device)
    tokens, nfe = prompts.clone(), 0

    def symbols(log_probs: Tensor) -> Tensor:
        if temperature == 0:
            return log_probs.argmax(-1)
        return (nucleus(log_probs, temperature, top_p) + processes.gumbel(log_probs, generator)).argmax(-1)

    for current in range(int(block[-1]) + 1):
        if method == "event":
            tokens, made = _by_events(model, tokens, block == current, symbols, generator)
        else:
            tokens, made = _by_steps(model, tokens, block == current, symbols, generator, steps, method == "cached")
        nfe += made
    return Samples(tokens, nfe)


def nucleus(log_probs: Tensor, temperature: float, top_p: float) -> Tensor:
    """(..., V) log-probabilities at a temperature above 0, cut to the nucleus and renormalised."""
    log_probs = (log_probs / temperature).log_softmax(-1)
    if top_p == 1:
        return log_probs
    values, indices = log_probs.sort(-1, descending=True)
    before = values.exp().cumsum(-1) - values.exp()  # a symbol stays while less than top_p is ahead of it
    kept = values.masked_fill(before >= top_p, -torch.inf)
    return torch.empty_like(kept).scatter(-1, indices, kept).log_softmax(-1)


def _by_events(
    model: Backbone, tokens: Tensor, inside: Tensor, symbols: Callable[[Tensor], Tensor], generator: torch.Generator
) -> tuple[Tensor, int]:
    made = 0
    while bool((masked := (tokens == model.mask_id) & inside).any()):
        log_probs, exponents = model.order.reverse(*model(tokens))
        made += 1
        score = exponents.log().masked_fill(~masked, -torch.inf) + processes.gumbel(exponents, generator)
        chosen = torch.zeros_like(masked).scatter(1, score.argmax(1, keepdim=True), True) & masked
        tokens = torch.where(chosen, symbols(log_probs), tokens)
    return tokens, made


def _by_steps(
    model: Backbone,
    tokens: Tensor,
    inside: Tensor,
    symbols: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    steps: int,
    cached: bool,
) -> tuple[Tensor, int]:
    made, known = 0, None
    for step in range(steps, 0, -1):
        masked = (tokens == model.mask_id) & inside
        if not bool(masked.any()):
            break
        if known is None or not cached:
            known = model.order.reverse(*model(tokens))
            made += 1
        log_probs, exponents = known
        stays = ((step - 1) / step) ** exponents  # (s / t)^w; the last step reveals what is left
        revealed = masked & (torch.rand(stays.shape, generator=generator, device=stays.device) >= stays)
        if bool(revealed.any()):
            tokens = torch.where(revealed, symbols(log_probs), tokens)
            known = None
    return tokens, made
