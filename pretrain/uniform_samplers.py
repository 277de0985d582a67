"""Generation by models with uniform noise: predictor steps, correctors, and how far a prediction looks at itself.

Shapes: N sequences, L positions, V symbols. Positions that a prompt gives never change. Log-probabilities are float64.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain import masking, uniform
from pretrain.backbone import Output
from pretrain.objectives.uniform import ALPHA_MAX
from pretrain.samplers import Samples, nucleus
from pretrain.uniform import Prediction, Uniform, tilt
from tasks import UnmaskError
from tasks.settings import LEAST

Method = Literal["ancestral", "coupling", "audm", "reaudm"]
Selection = Literal["random", "margin", "current", "confidence"]
Tempered = Literal["others", "denoiser"]


class Predictor(Protocol):
    """A :class:`pretrain.backbone.Backbone` with uniform noise, or a table of exact predictions."""

    predicts: Prediction
    process: Uniform
    mask_id: int
    length: int

    def __call__(self, tokens: Tensor, alpha: Tensor, is_noise: Tensor) -> Output: ...


@dataclass(frozen=True)
class NoisySequences:
    """Symbols ``tokens`` x, the noise symbol ``noise`` u of every position, and which are ``free``; (N, L) each.

    For an absorbing model a free position is undecided where x = u, and certainly clean elsewhere.
    """

    tokens: Tensor
    noise: Tensor
    free: Tensor

    @property
    def is_noise(self) -> Tensor:
        """(N, L) bool: free positions that hold the noise symbol."""
        return (self.tokens == self.noise) & self.free

    def moved(self, tokens: Tensor) -> NoisySequences:
        """The same with other symbols where they are free."""
        return replace(self, tokens=torch.where(self.free, tokens, self.tokens))

    def level(self, alpha: float) -> Tensor:
        """(N, L) float64 how likely each symbol is clean: those that are given certainly are."""
        ones = torch.ones(self.tokens.shape, dtype=torch.float64, device=self.tokens.device)
        return torch.where(self.free, alpha * ones, ones)


@dataclass(frozen=True)
class Corrector:
    """Gibbs steps at a fixed time, after a predictor's step: chosen positions are drawn anew from their conditionals.

    ``random`` selection of one position leaves the law of x_t exactly as it is. The others look at the sequence to
    choose, and are *approximate*: ``margin`` prefers positions where another symbol is likelier than the present one,
    ``current`` those whose symbol is unlikely, ``confidence`` those where no symbol is likely. So is changing more than
    one position at a time. ``metropolis`` makes them exact again: a change is accepted with probability
    min(1, chance of choosing the position afterwards / before), for one more forward.

    Args:
        steps: after each predictor step. positions: drawn anew at a time. tau: temperature of the selection.

    Raises:
        UnmaskError: settings that are not allowed.
    """

    steps: int = 2
    selection: Selection = "random"
    positions: int = 1
    tau: float = 1.0
    metropolis: bool = False

    def __post_init__(self) -> None:
        if self.selection not in get_args(Selection):
            raise UnmaskError(f"selection must be one of {', '.join(get_args(Selection))}, not {self.selection!r}")
        if self.steps < 1 or self.positions < 1 or not self.tau > 0:
            raise UnmaskError(
                f"steps and positions must be at least 1 and tau above 0, not {self.steps}, {self.positions} and "
                f"{self.tau}"
            )
        if self.metropolis and self.positions > 1:
            raise UnmaskError("metropolis changes one position at a time")

    def log_chances(self, conditional: Tensor, tokens: Tensor, free: Tensor) -> Tensor:
        """(N, L) log-probability of choosing each free position first, from (N, L, V) conditionals."""
        present = _at(conditional, tokens)
        if self.selection == "margin":
            score = conditional.scatter(-1, tokens.unsqueeze(-1), -torch.inf).max(-1).values - present
        elif self.selection == "current":
            score = -present
        elif self.selection == "confidence":
            score = -conditional.max(-1).values
        else:
            score = torch.zeros_like(present)
        return (score / max(self.tau, LEAST)).masked_fill(~free, -torch.inf).log_softmax(-1)


def budget(nfe: int, corrector: Corrector | None) -> tuple[int, int]:
    """(predictor steps, after how many of the first of them a corrector runs) for ``nfe`` forwards in all.

    A corrector step is one forward, two with ``metropolis``; the last predictor step has none.
    """
    if corrector is None:
        return nfe, 0
    cost = corrector.steps * (2 if corrector.metropolis else 1)
    corrected = (nfe - 1) // (1 + cost)
    return nfe - corrected * cost, corrected


@torch.no_grad()
def sample_uniform(
    model: Predictor,
    prompts: Tensor,
    generator: torch.Generator,
    nfe: int = 64,
    method: Method | None = None,
    corrector: Corrector | None = None,
    kappa: float = 1.0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    tempers: Tempered = "others",
) -> Samples:
    """Complete ``prompts`` in ``nfe`` forwards.

    *ancestral* draws x_s from the bridge of the leave-one-out prediction, the exact reverse step of each position.
    *coupling* takes a symbol of the denoiser with probability (alpha_s - alpha_t) / (1 - alpha_t) and else stays. A
    model that predicts ``absorbing`` has *audm*, the same for undecided positions alone, and *reaudm*, which bridges
    from a drawn x_0 and draws the noise symbols anew, so that decided positions may be revised. All keep the law of x_t
    (of (x_t, u)), up to the error of treating positions independently within a step.

    Args:
        prompts: (N, L) int64; holes hold ``model.mask_id``.
        method: the default is ancestral, or audm of an absorbing model.
        kappa: of *ancestral*: a symbol takes that step with this probability, and else x_s is drawn anew from the
            denoiser's x_0 alone (psi-samplers; Deschenaux et al. 2026, arXiv 2602.21185).
        temperature, top_p: in predictor and corrector steps alike.
        tempers: what they shape: what the *others* say of each position (leave-one-out), or the *denoiser*, which also
            knows the present symbol, so that tempering it holds on to noise: at temperature T it raises the present
            symbol's log-odds by (1/T - 1) log(1 + K alpha / (1 - alpha)) over leave-one-out's (derived;
            tests/pretrain/test_uniform_samplers.py).

    Raises:
        UnmaskError: settings that are not allowed or do not belong to the model, prompts of another length.
    """
    method = _checked(model, prompts, nfe, method, corrector, kappa, temperature, top_p, tempers)
    noise = model.process.noise(len(prompts), generator)
    free = prompts == model.mask_id
    state = NoisySequences(torch.where(free, noise, prompts), noise, free)
    steps, corrected = budget(nfe, corrector)
    levels = [float(uniform.alpha_of(torch.tensor(1 - i / steps).double())) for i in range(steps)] + [1.0]
    made = 0
    for step, (now, then) in enumerate(itertools.pairwise(levels)):
        kind: Prediction = "loo" if method == "ancestral" else "denoiser" if method == "coupling" else "absorbing"
        prediction = predict(model, state, now, kind, temperature, top_p, tempers)
        made += 1
        if method == "ancestral":
            state = _ancestral(model.process, state, prediction, now, then, kappa, generator)
        else:
            state = _from_posterior(model.process, state, prediction, now, then, method, generator)
        for _ in range(corrector.steps if corrector is not None and step < corrected else 0):
            state = correct(model, state, then, corrector, generator, temperature, top_p, tempers)
            made += 2 if corrector.metropolis else 1
    return Samples(state.tokens, made)


def predict(
    model: Predictor,
    state: NoisySequences,
    alpha: float,
    kind: Prediction,
    temperature: float = 1.0,
    top_p: float = 1.0,
    tempers: Tempered = "others",
) -> Tensor:
    """(N, L, V) the model's prediction of the wanted kind; one forward.

    Args:
        temperature, top_p: of what it says of a symbol from the others' alone: of leave-one-out, or of an absorbing
            prediction without the tilt towards the position's own noise symbol.
        tempers: ``denoiser`` shapes the denoiser instead (an absorbing prediction with its tilt).

    Raises:
        UnmaskError: the model's own kind cannot be converted to it.
    """
    level, process = state.level(alpha), model.process
    log_probs = model(state.tokens, level, state.is_noise).logits.double().log_softmax(-1)
    changed = (temperature, top_p) != (1.0, 1.0)
    if model.predicts == "absorbing":  # what is decided is certain
        if changed and tempers == "denoiser":
            log_probs = _shaped(log_probs, temperature, top_p)
        elif changed:
            own = torch.where(F.one_hot(state.tokens, log_probs.shape[-1]).bool(), tilt(level).unsqueeze(-1), 0.0)
            log_probs = (_shaped((log_probs - own).log_softmax(-1), temperature, top_p) + own).log_softmax(-1)
        log_probs = torch.where(state.is_noise.unsqueeze(-1), log_probs, _certain(state.tokens, log_probs))
        return process.convert(log_probs, state.tokens, level, model.predicts, kind)
    level = level.clamp(max=ALPHA_MAX)
    if not changed:
        return process.convert(log_probs, state.tokens, level, model.predicts, kind)
    shaped: Prediction = "denoiser" if tempers == "denoiser" else "loo"
    log_probs = _shaped(process.convert(log_probs, state.tokens, level, model.predicts, shaped), temperature, top_p)
    return process.convert(log_probs, state.tokens, level, shaped, kind)


def _ancestral(
    process: Uniform,
    state: NoisySequences,
    loo: Tensor,
    now: float,
    then: float,
    kappa: float,
    generator: torch.Generator,
) -> NoisySequences:
    level, next_level = state.level(now), state.level(then)
    tokens = _draw(process.bridge(loo, state.tokens, level.minimum(next_level * ALPHA_MAX), next_level), generator)
    if kappa < 1:
        posterior = process.convert(loo, state.tokens, level.clamp(max=ALPHA_MAX), "loo", "denoiser")
        fresh = process.noise(len(tokens), generator)
        anew = process.corrupt(_draw(posterior, generator), next_level, fresh, generator)
        follows = torch.rand(tokens.shape, generator=generator, device=tokens.device) < kappa
        tokens = torch.where(follows, tokens, anew)
    return state.moved(tokens)


def _from_posterior(
    process: Uniform,
    state: NoisySequences,
    posterior: Tensor,
    now: float,
    then: float,
    method: Method,
    generator: torch.Generator,
) -> NoisySequences:
    clean = _draw(posterior, generator)
    if method == "reaudm":
        level, next_level = state.level(now), state.level(then)
        one_hot = _certain(clean, posterior)
        bridge = process.bridge(one_hot, state.tokens, level.minimum(next_level * ALPHA_MAX), next_level)
        moved = state.moved(_draw(bridge, generator))
        return replace(moved, noise=noise_given(process, moved.tokens, clean, then, generator))
    moves = torch.rand(clean.shape, generator=generator, device=clean.device) < (then - now) / (1 - now)
    return state.moved(torch.where(moves, clean, state.tokens))


def noise_given(process: Uniform, tokens: Tensor, clean: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """(N, L) u drawn from its law given x_t and x_0: x_t itself where they differ; where they agree, x_t with
    probability 1 / (1 + (K - 1) alpha), else any other symbol."""
    others = process.alphabet & ~F.one_hot(tokens, process.alphabet.shape[1]).bool()
    other = uniform.gumbel_like(others, generator).argmax(-1)
    stays = torch.rand(tokens.shape, generator=generator, device=tokens.device) < 1 / (1 + (process.size - 1) * alpha)
    return torch.where((tokens != clean) | stays, tokens, other)


@torch.no_grad()
def correct(
    model: Predictor,
    state: NoisySequences,
    alpha: float,
    corrector: Corrector,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_p: float = 1.0,
    tempers: Tempered = "others",
) -> NoisySequences:
    """One corrector step at noise level ``alpha`` below 1; what is left of the arguments as in :func:`predict`.

    Of an absorbing model, a random position's (x, u) is drawn anew through its x_0, which is as exact.
    """
    process, level = model.process, state.level(alpha)
    if model.predicts == "absorbing":
        clean = _draw(predict(model, state, alpha, "absorbing", temperature, top_p, tempers), generator)
        fresh = process.noise(len(clean), generator)
        tokens = process.corrupt(clean, level, fresh, generator)
        chances = torch.zeros_like(level).masked_fill(~state.free, -torch.inf)
        chosen = _first(chances, corrector.positions, generator) & state.free
        return replace(
            state.moved(torch.where(chosen, tokens, state.tokens)), noise=torch.where(chosen, fresh, state.noise)
        )
    loo = predict(model, state, alpha, "loo", temperature, top_p, tempers)
    conditional = process.conditional(loo, level.clamp(max=ALPHA_MAX))
    before = corrector.log_chances(conditional, state.tokens, state.free)
    chosen = _first(before, corrector.positions, generator)
    changed = state.moved(torch.where(chosen, _draw(conditional, generator), state.tokens))
    if not corrector.metropolis:
        return changed
    loo = predict(model, changed, alpha, "loo", temperature, top_p, tempers)
    again = process.conditional(loo, level.clamp(max=ALPHA_MAX))
    after = corrector.log_chances(again, changed.tokens, state.free)
    accept = torch.where(chosen, after - before, 0.0).sum(1).exp()  # (N,)
    accepted = torch.rand(accept.shape, generator=generator, device=accept.device) < accept
    return state.moved(torch.where(accepted.unsqueeze(1), changed.tokens, state.tokens))


# ---------------------------------------------------------------------- small parts
def _at(log_probs: Tensor, tokens: Tensor) -> Tensor:
    return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _certain(tokens: Tensor, like: Tensor) -> Tensor:
    """(N, L, V) log-probabilities that are all on ``tokens``."""
    return F.one_hot(tokens, like.shape[-1]).to(like).log()


def _draw(log_probs: Tensor, generator: torch.Generator) -> Tensor:
    return (log_probs + masking.gumbel(log_probs, generator)).argmax(-1)


def _first(log_chances: Tensor, positions: int, generator: torch.Generator) -> Tensor:
    """(N, L) bool: ``positions`` positions, drawn one after the other without replacement."""
    order = (log_chances + masking.gumbel(log_chances, generator)).argsort(1, descending=True)
    return torch.zeros_like(log_chances, dtype=torch.bool).scatter(1, order[:, :positions], True)


def _shaped(log_probs: Tensor, temperature: float, top_p: float) -> Tensor:
    if temperature == 1 and top_p == 1:
        return log_probs
    return _certain(log_probs.argmax(-1), log_probs) if temperature == 0 else nucleus(log_probs, temperature, top_p)


def _checked(
    model: Predictor,
    prompts: Tensor,
    nfe: int,
    method: Method | None,
    corrector: Corrector | None,
    kappa: float,
    temperature: float,
    top_p: float,
    tempers: Tempered,
) -> Method:
    if getattr(model, "noise", "uniform") != "uniform":
        raise UnmaskError("this model was trained with masks; sample it with pretrain.samplers.sample")
    absorbing = model.predicts == "absorbing"
    if method is None:
        method = "audm" if absorbing else "ancestral"
    if method not in (("audm", "reaudm") if absorbing else ("ancestral", "coupling")):
        raise UnmaskError(f"a model that predicts {model.predicts!r} does not sample by {method!r}")
    if nfe < 1 or not temperature >= 0 or not 0 < top_p <= 1 or not 0 <= kappa <= 1:
        raise UnmaskError(
            f"nfe must be at least 1, temperature at least 0, top_p above 0 and at most 1 and kappa between 0 and 1, "
            f"not {nfe}, {temperature}, {top_p} and {kappa}"
        )
    if tempers not in get_args(Tempered):
        raise UnmaskError(f"tempers must be one of {', '.join(get_args(Tempered))}, not {tempers!r}")
    if kappa < 1 and method != "ancestral":
        raise UnmaskError("kappa is of ancestral sampling")
    if absorbing and corrector is not None and (corrector.selection != "random" or corrector.metropolis):
        raise UnmaskError("the corrector of an absorbing model chooses positions at random")
    if prompts.ndim != 2 or prompts.shape[1] != model.length or prompts.is_floating_point():
        raise UnmaskError(
            f"prompts must be (N, {model.length}) integers, not {tuple(prompts.shape)} of {prompts.dtype}"
        )
    possible = model.process.alphabet.int().argmax(1)
    model.process.check(torch.where(prompts == model.mask_id, possible, prompts))
    return method
