"""Generation by trained models: fill the holes of prompts, whatever order the model knows.

Shapes: N sequences, L positions, V symbols. Visible symbols never change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pretrain import processes
from pretrain.backbone import Backbone
from pretrain.orders import NoOrder
from tasks import UnmaskError

Method = Literal["event", "ancestral", "cached"]
Strategy = Literal["cap", "rescale", "loop", "conf"]


class Samples(NamedTuple):
    """``tokens`` (N, L) complete; ``nfe`` the number of forwards, each for all N sequences."""

    tokens: Tensor
    nfe: int


@dataclass(frozen=True)
class Remasking:
    """Ancestral steps that also mask visible symbols again, with probability sigma (ReMDM; Wang et al. 2025, arXiv
    2503.00307). Masked positions are revealed that much more often, so that as many are visible as without, and the law
    of every single position stays what it was. With sigma_max = min(1, (1 - alpha_s) / alpha_t):

    - ``cap``: sigma = min(eta, sigma_max); ``rescale``: sigma = eta sigma_max;
    - ``loop``: plain steps until 90 % are visible (45 % of the steps), then sigma as in ``cap`` at that level (50 %),
      then plain steps to the end;
    - ``conf``: sigma_max times the softmax over the visible symbols of -(their probability when they were chosen), so
      one symbol per step at most on average; approximate, since masked positions do not make up for it. No ``eta``.

    Raises:
        UnmaskError: settings that are not allowed.
    """

    strategy: Strategy = "cap"
    eta: float = 0.04

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise UnmaskError(f"strategy must be one of {', '.join(get_args(Strategy))}, not {self.strategy!r}")
        if not 0 <= self.eta <= 1:
            raise UnmaskError(f"eta must be between 0 and 1, not {self.eta}")

    def visible(self, steps: int) -> list[tuple[float, float, bool]]:
        """(alpha_t, alpha_s, whether symbols may be masked again) of each step."""
        if self.strategy != "loop":
            return [(i / steps, (i + 1) / steps, True) for i in range(steps)]
        rise, end = 0.45 * steps, 0.95 * steps

        def level(i: int) -> float:
            return 0.9 * min(1.0, i / rise) if i <= end else 1 - 0.1 * (steps - i) / (steps - end)

        return [(level(i), level(i + 1), rise <= i and i + 1 <= end) for i in range(steps)]


@torch.no_grad()
def sample(
    model: Backbone,
    prompts: Tensor,
    generator: torch.Generator,
    method: Method = "event",
    steps: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    remasking: Remasking | None = None,
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
        remasking: of *ancestral*, of models without a learned order; prompts stay.

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
    if remasking is not None and (method != "ancestral" or type(model.order) is not NoOrder):
        raise UnmaskError("remasking belongs to ancestral sampling from a model without a learned order")
    block = processes.blocks_of(model.length, model.block_length or model.length).to(prompts.device)
    tokens, nfe = prompts.clone(), 0

    def symbols(log_probs: Tensor) -> Tensor:
        if temperature == 0:
            return log_probs.argmax(-1)
        return (nucleus(log_probs, temperature, top_p) + processes.gumbel(log_probs, generator)).argmax(-1)

    free = prompts == model.mask_id

    for current in range(int(block[-1]) + 1):
        inside = free & (block == current)
        if remasking is not None:
            tokens, made = _by_remasking(model, tokens, inside, symbols, generator, steps, remasking)
        elif method == "event":
            tokens, made = _by_events(model, tokens, inside, symbols, generator)
        else:
            tokens, made = _by_steps(model, tokens, inside, symbols, generator, steps, method == "cached")
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


def _by_remasking(
    model: Backbone,
    tokens: Tensor,
    inside: Tensor,
    symbols: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    steps: int,
    remasking: Remasking,
) -> tuple[Tensor, int]:
    made, chosen_with = 0, torch.zeros(tokens.shape, device=tokens.device)  # probability of symbols when chosen
    for now, then, active in remasking.visible(steps):
        masked = (tokens == model.mask_id) & inside
        seen = inside & ~masked
        most = min(1.0, (1 - then) / now) if now > 0 and active else 0.0
        if remasking.strategy == "conf":
            share = (-chosen_with).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()  # nan: none is visible yet
            hides, sigma = most * share, 0.0
        else:
            sigma = remasking.eta * most if remasking.strategy == "rescale" else min(remasking.eta, most)
            hides = torch.full_like(chosen_with, sigma)
        stays = (1 - then - sigma * now) / (1 - now) if then < 1 else 0.0
        draws = torch.rand(tokens.shape, generator=generator, device=tokens.device)
        revealed, hidden = masked & (draws >= stays), seen & (draws < hides)
        if bool(revealed.any()):
            log_probs = model(tokens).logits.log_softmax(-1)
            made += 1
            new = symbols(log_probs)
            chosen_with = torch.where(revealed, log_probs.gather(-1, new.unsqueeze(-1)).squeeze(-1).exp(), chosen_with)
            tokens = torch.where(revealed, new, tokens)
        tokens = torch.where(hidden, model.mask_id, tokens)
    return tokens, made
