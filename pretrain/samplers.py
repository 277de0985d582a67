"""Generation by trained models: fill the holes of prompts, whatever order the model knows.

Shapes: N sequences, L positions, V symbols. Visible symbols never change.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pretrain import masking
from pretrain.orders import NoOrder
from tasks import UnmaskError
from tasks.settings import LEAST

if TYPE_CHECKING:  # reference policies read Remasking, and need no model
    from pretrain.backbone import Backbone

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

    def probabilities(self, step: Tensor, steps: int, remaskable: Tensor, fill_prob: Tensor) -> tuple[Tensor, Tensor]:
        """(N, L) each: the probability that a masked position is filled, and that a filled one is masked again.

        Args:
            step: (N,) int64, forwards done; the last one's are kept. steps: T.
            remaskable: (N, L) bool, filled positions that may be masked again.
            fill_prob: (N, L) the probability that each filled symbol had when it was filled in.
        """
        levels = torch.tensor(self.visible(steps), device=step.device)  # (T, 3)
        now, then, active = levels[step.clamp(max=steps - 1)].unsqueeze(-1).unbind(1)  # each (N, 1)
        sigma_max = torch.where((now > 0) & (active > 0), ((1 - then) / now.clamp(min=1e-9)).clamp(max=1.0), 0.0)
        if self.strategy == "conf":
            share = (-fill_prob).masked_fill(~remaskable, -torch.inf).softmax(-1).nan_to_num()  # nan: none is filled
            remask, sigma = sigma_max * share, torch.zeros_like(sigma_max)
        else:
            sigma = self.eta * sigma_max if self.strategy == "rescale" else sigma_max.clamp(max=self.eta)
            remask = sigma.expand(remaskable.shape)
        fill = 1 - ((1 - then - sigma * now) / (1 - now).clamp(min=1e-9)).clamp(0, 1)
        return torch.where(then >= 1, torch.ones_like(fill), fill).expand(remaskable.shape), remask

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

    *event* fills one position at a time, i with probability ŵ_i / sum ŵ over the masked ones: the model's law, whose
    order bound :mod:`pretrain.likelihood` gives. *ancestral* goes through ``steps`` equal steps of time; a masked
    position is filled between t and s with probability 1 - (s / t)^ŵ_i, independently. *cached* is the same but makes
    no forward where the step before filled nothing, which changes nothing, since the model does not see the time.
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
    block = masking.blocks_of(model.length, model.block_length or model.length).to(prompts.device)

    def symbols(log_probs: Tensor) -> Tensor:
        if temperature == 0:
            return log_probs.argmax(-1)
        return (nucleus(log_probs, temperature, top_p) + masking.gumbel(log_probs, generator)).argmax(-1)

    tokens, nfe = prompts.clone(), 0
    for current in range(int(block[-1]) + 1):
        inside = (prompts == model.mask_id) & (block == current)
        tokens, forwards = _complete(model, tokens, inside, symbols, generator, method, steps, remasking)
        nfe += forwards
    return Samples(tokens, nfe)


def _complete(
    model: Backbone,
    tokens: Tensor,
    inside: Tensor,
    symbols: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    method: Method,
    steps: int,
    remasking: Remasking | None,
) -> tuple[Tensor, int]:
    """``tokens`` (N, L) with the positions ``inside`` (N, L) bool filled, and the number of forwards.

    Args:
        symbols: (N, L, V) log-probabilities to drawn symbols (N, L).
    """
    nfe, prediction = 0, None
    fill_prob = torch.zeros(tokens.shape, device=tokens.device)
    for step in itertools.count() if method == "event" else range(steps):
        masked, remasks = (tokens == model.mask_id) & inside, None
        if remasking is not None:  # what happens where does not depend on the model, so it may need no forward
            fills, remasks = _remasking_step(remasking, step, steps, masked, inside & ~masked, fill_prob, generator)
        elif not bool(masked.any()):
            break
        if (prediction is None or method == "ancestral") and (remasks is None or bool(fills.any())):
            prediction = model.order.reverse(*model(tokens))
            nfe += 1
        if remasks is None:
            choose = _event if method == "event" else _ancestral_step
            fills = choose(prediction[1], masked, step, steps, generator)
        if bool(fills.any()):
            filled = symbols(prediction[0])
            chance = prediction[0].gather(-1, filled.unsqueeze(-1)).squeeze(-1).exp()
            fill_prob, tokens = torch.where(fills, chance, fill_prob), torch.where(fills, filled, tokens)
            prediction = None
        if remasks is not None:
            tokens = torch.where(remasks, model.mask_id, tokens)
    return tokens, nfe


def _event(weights: Tensor, masked: Tensor, step: int, steps: int, generator: torch.Generator) -> Tensor:
    """(N, L) bool: one masked position per row, in proportion to the order's ``weights`` (N, L)."""
    score = weights.log().masked_fill(~masked, -torch.inf) + masking.gumbel(weights, generator)
    return torch.zeros_like(masked).scatter(1, score.argmax(1, keepdim=True), True) & masked


def _ancestral_step(weights: Tensor, masked: Tensor, step: int, steps: int, generator: torch.Generator) -> Tensor:
    """(N, L) bool: each masked position with probability 1 - (s / t)^w; the last step fills what is left."""
    left = steps - step
    stays = ((left - 1) / left) ** weights
    return masked & (torch.rand(stays.shape, generator=generator, device=stays.device) >= stays)


def _remasking_step(
    remasking: Remasking,
    step: int,
    steps: int,
    masked: Tensor,
    filled: Tensor,
    fill_prob: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """(N, L) bool each: the positions to fill, and those to mask again."""
    at = torch.full((len(masked),), step, device=masked.device)
    fill, remask = remasking.probabilities(at, steps, filled, fill_prob)
    draws = torch.rand(masked.shape, generator=generator, device=masked.device)
    return masked & (draws >= 1 - fill), filled & (draws < remask)


def nucleus(log_probs: Tensor, temperature: float, top_p: float) -> Tensor:
    """(..., V) log-probabilities at a temperature above 0, cut to the nucleus and renormalised."""
    log_probs = (log_probs / max(temperature, LEAST)).log_softmax(-1)
    if top_p == 1:
        return log_probs
    values, indices = log_probs.sort(-1, descending=True)
    before = values.exp().cumsum(-1) - values.exp()  # a symbol stays while less than top_p is ahead of it
    kept = values.masked_fill(before >= top_p, -torch.inf)
    return torch.empty_like(kept).scatter(-1, indices, kept).log_softmax(-1)
