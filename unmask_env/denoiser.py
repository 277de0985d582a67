"""The frozen denoiser that the environment is built around."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from pretrain.adapter import adapter_folder
from pretrain.backbone import Backbone
from pretrain.checkpoint import PACKAGED_DENOISERS, checked_device, load_model
from pretrain.uniform import ALPHA_MIN
from tasks import IncompatibleDenoiserError, Task, UnmaskError, read_options
from tasks.registry import name_and_options
from tasks.settings import AtLeast1, Depth, check
from unmask_env.diffusion_gemma import DiffusionGemma, is_diffusion_gemma
from unmask_env.language_models import HFDenoiser
from unmask_env.shared import Named
from unmask_env.state import CHUNK, WHOLE, Denoised

Read = Literal["unsure", "always"]
SURE = 0.97  # confidence from which on a masked position is sure
TOLERANCE = 1e-3  # of what probabilities sum to
HUGGING_FACE = "hf:"  # before the names of models of transformers


class Denoiser(Protocol):
    """Maps tokens (N, L) to :class:`unmask_env.state.Denoised` on ``device``; counts its forwards in ``calls``.

    Above 128 symbols it is called with a second argument, ``where`` (N, L) bool: the positions at which its answer is
    wanted. ``hidden_dim`` is the number of channels of its hidden states, None where it gives none.

    One whose ``carries`` is true is called with two more: the :class:`unmask_env.state.Block` in play, and what its
    last answer ``carried`` of these rows. That may be of other boards (rows begin anew, or it is None), so it checks.
    """

    calls: int
    hidden_dim: int | None
    device: torch.device

    def __call__(self, tokens: Tensor, where: Tensor | None = None) -> Denoised: ...


class CanvasDenoiser(Protocol):
    """A denoiser of uniform noise on canvases, for actions ``accept``: what is on the board are symbols, not masks.

    Attributes:
        canvas_length: positions of a canvas; they follow the task's prompt without gaps.
        ends: the tokens that end a sequence; behind them is ``pad_id``. None: ().
    """

    calls: int
    hidden_dim: int | None
    device: torch.device
    canvas_length: int
    ends: tuple[int, ...]
    pad_id: int

    def begin(self, n: int) -> Tensor | None:
        """(N, ...) zeros: what is carried to the first forward of a canvas; None where nothing is carried."""

    def __call__(
        self,
        tokens: Tensor,
        where: Tensor,
        left: Tensor,
        carried: Tensor | None,
        generator: torch.Generator | None = None,
    ) -> Denoised:
        """One forward on the canvas in play of each row.

        Args:
            tokens: (N, L) int64. where: (N, L) bool, the free positions of the canvas; rows with none are done.
            left: (N,) float32 the share of the canvas's forwards that is left, 1 in its first.
            carried: what the forward before gave as :attr:`unmask_env.state.Denoised.carried`, 0 where a canvas begins.
            generator: draw :attr:`unmask_env.state.Denoised.drawn` from it; None: draw nothing.
        """
        ...


def check_denoised(denoiser: Denoiser, denoised: Denoised, task: Task, tokens: Tensor, where: Tensor | None) -> None:
    """Hold what a denoiser says of ``tokens`` (N, L) to its form, and to being probabilities where it counts.

    Args:
        where: (N, L) bool, the positions whose values are looked at; None: none, which costs next to nothing.

    Raises:
        IncompatibleDenoiserError: naming the denoiser and what is wrong, in one line.
    """
    name = f"the denoiser {type(denoiser).__name__}"
    if not isinstance(denoised, Denoised):
        raise IncompatibleDenoiserError(
            f"{name} returned a {type(denoised).__name__}; it must return unmask_env.state.Denoised.of(log_probs)"
        )
    whole, n, length = denoised.log_probs is not None, *tokens.shape
    shape, dtype = denoised.form
    wide = task.vocab_size if whole else (shape or (0,))[-1]
    if shape != (n, length, wide) or dtype != torch.float32 or denoised.vocab_size != task.vocab_size:
        raise IncompatibleDenoiserError(
            f"{name} returned log-probabilities of shape {shape} and type {dtype} over {denoised.vocab_size} symbols; "
            f"task {task.name} needs ({n}, {length}, {task.vocab_size}), torch.float32"
        )
    parts = {"hidden states": denoised.hidden, "order weights": denoised.order_weights, "passes": denoised.passes}
    for (what, part), ndim in zip(parts.items(), (3, 2, 1), strict=True):
        if part is None:
            continue
        if not isinstance(part, Tensor) or part.ndim != ndim or part.shape[:2] != tokens.shape[:ndim]:
            shown = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise IncompatibleDenoiserError(
                f"{name} returned {what} of shape {shown} for {n} boards of {length} positions"
            )
        if part.is_floating_point() == (what == "passes"):
            raise IncompatibleDenoiserError(
                f"{name} returned {what} of type {part.dtype}; passes are whole, all else is not"
            )
    if where is None:
        return
    shown = denoised.log_probs if whole else denoised.top_log_probs
    if shown.device != tokens.device or shown.layout != torch.strided:
        raise IncompatibleDenoiserError(
            f"{name} returned log-probabilities on {shown.device}, {shown.layout}; the boards are on {tokens.device}"
        )
    if denoised.order_weights is not None and not bool(denoised.order_weights[where].isfinite().all()):
        raise IncompatibleDenoiserError(f"{name} returned order weights that are not finite")
    totals = shown[where].exp().sum(-1)  # NaN where one is
    if not bool(totals.any()):
        raise IncompatibleDenoiserError(
            f"{name} returned log-probabilities of -inf alone (every symbol has probability 0); take log_softmax of "
            "logits, and instances that it allows"
        )
    fine = (totals < 1 + TOLERANCE) & ((totals > 1 - TOLERANCE) | (totals == 0) | (not whole))  # 0: no such board
    if not bool(fine.all()):
        row, position = where.nonzero()[(~fine).nonzero()[0, 0]].tolist()
        total = float(totals[~fine][0])
        raise IncompatibleDenoiserError(
            f"{name} returned log-probabilities that sum to {total:.4g}, not 1, at row {row}, position {position}; "
            "normalise them, as log_softmax does"
        )


def check_numbers(denoiser: Denoiser, denoised: Denoised, where: Tensor) -> None:
    """Raises :class:`IncompatibleDenoiserError` where the most likely symbol of a position of ``where`` (N, L) has a
    log-probability that is no number: what a forward in half precision comes to when it overflows."""
    if bool((denoised.best_log_prob.isnan() & where).any()):
        raise IncompatibleDenoiserError(
            f"the denoiser {type(denoiser).__name__} returned log-probabilities that are no numbers (NaN) after "
            "forwards that were fine; float16 overflows so: load it in float32 or bfloat16"
        )


def check_protocol(denoiser: object) -> None:
    """Raises :class:`IncompatibleDenoiserError` for what has not the parts of a :class:`Denoiser`."""
    fine = callable(denoiser) and isinstance(getattr(denoiser, "device", None), torch.device)
    if not fine or not hasattr(denoiser, "hidden_dim"):
        raise IncompatibleDenoiserError(
            f"a denoiser is called with tokens and has device, a torch.device, hidden_dim and calls; {denoiser!r:.60} "
            "does not; see unmask_env.denoiser.Denoiser"
        )


class FrozenDenoiser(Named):
    """A pretrained backbone in evaluation mode, without gradients: the model itself is switched over, not a copy.

    One with uniform noise that predicts ``absorbing`` is asked as at t = 1: what is on the board is given, and masked
    positions hold noise symbols, always the same ones. At that time they carry no information, so this is P(x_0 | what
    is given), as of a masked model.

    A recurrent one takes its further passes only for rows where the first pass leaves no masked position sure; each row
    is what it would be alone, and :attr:`unmask_env.state.Denoised.passes` counts. A call counts as one forward.

    Args:
        model: a backbone. task: checked against the model's vocabulary and length. device: where the model is put.
        passes: the most that a recurrent model takes; None: as many as it was trained with.
        read: when it takes them: ``unsure``, where no masked position's confidence reaches 0.97, or ``always``.

    Raises:
        IncompatibleDenoiserError: saying what the task needs. UnmaskError: several passes of a model trained with one.
    """

    def __init__(
        self,
        model: Backbone,
        task: Task,
        device: torch.device | str = "cpu",
        passes: Depth | None = None,
        read: Read = "unsure",
    ) -> None:
        task.check_denoiser(model.vocab_size, model.length, model.fingerprint)
        if model.noise == "uniform" and model.predicts != "absorbing":
            raise IncompatibleDenoiserError(
                f"this denoiser was trained with uniform noise and predicts {model.predicts!r}, which does not know "
                "where the noise is; environments take masked denoisers and those of unmask pretrain audm"
            )
        check("passes", passes, AtLeast1 | None)
        check("read", read, Read)
        if passes is not None and passes > 1 and model.num_passes == 1:
            raise IncompatibleDenoiserError(f"this denoiser was trained to read once, so it takes no {passes} passes")
        self.passes, self.read = passes or model.num_passes, read
        self.model: Backbone = model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.hidden_dim: int | None = model.dim
        self.vocab_size, self.length = model.vocab_size, model.length
        self.calls = 0
        self._noise: Tensor | None = None  # (1, L)
        if model.noise == "uniform":
            self._noise = model.process.noise(1, torch.Generator(device).manual_seed(0))

    @torch.no_grad()
    def __call__(self, tokens: Tensor, where: Tensor | None = None) -> Denoised:
        self.calls += 1
        if self._noise is not None:
            masked = tokens == self.model.mask_id
            alpha = torch.where(masked, ALPHA_MIN, 1.0)
            return self._of(*self.model(torch.where(masked, self._noise, tokens), alpha, masked))
        hidden = self.model.trunk(tokens)
        denoised = self._denoised(hidden, where)
        if self.passes == 1:
            return denoised
        denoised = replace(denoised, passes=torch.ones(len(tokens), dtype=torch.long, device=tokens.device))
        rows = self._unsure(denoised, tokens).nonzero().squeeze(1)
        if not len(rows):
            return denoised
        again = self._denoised(self._read_again(tokens[rows], hidden[rows]), None if where is None else where[rows])
        again = replace(again, passes=torch.full_like(rows, self.passes))
        return Denoised.join([denoised, again], lambda parts: parts[0].index_copy(0, rows, parts[1]))

    def _unsure(self, denoised: Denoised, tokens: Tensor) -> Tensor:
        """(N,) bool: the rows of which further passes are taken."""
        masked = tokens == self.model.mask_id
        if self.read == "always":
            return masked.any(1)
        best = denoised.best_log_prob.masked_fill(~masked, -torch.inf).max(1).values
        return (best < math.log(SURE)) & masked.any(1)

    def _read_again(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """(N, L, D) states after the last pass, from those after the first; some rows at a time, as each pass makes a
        belief (L, V) of a row."""
        some = max(1, CHUNK // (self.length * self.vocab_size))
        states = []
        for x, first in zip(tokens.split(some), hidden.split(some), strict=True):
            belief = self.model.logits(first).log_softmax(-1).exp()
            states.append(self.model.passes(x, self.passes - 1, belief)[1])
        return torch.cat(states)

    def _denoised(self, hidden: Tensor, where: Tensor | None) -> Denoised:
        if self.vocab_size > WHOLE and where is not None:
            return self._at(hidden, where)
        return self._of(self.model.logits(hidden), hidden)

    def _of(self, logits: Tensor, hidden: Tensor) -> Denoised:
        log_probs, order_weights = self.model.order.reverse(logits.float(), hidden)
        return Denoised.of(log_probs, hidden, order_weights if self.model.order.learned else None)

    def _at(self, hidden: Tensor, where: Tensor) -> Denoised:
        """Of a large vocabulary, the head is applied where it is asked for."""
        if self.model.order.learned:  # its weights may need a row's logits everywhere: one row at a time
            rows = [
                self._of(self.model.logits(hidden[row : row + 1]), hidden[row : row + 1]) for row in range(len(hidden))
            ]
            return Denoised.join(rows, torch.cat)

        def log_probs_at(rows: Tensor, positions: Tensor) -> Tensor:
            return self.model.logits(hidden[rows, positions], positions).float().log_softmax(-1)

        return Denoised.at(where, self.vocab_size, log_probs_at, hidden)


class TableDenoiser:
    """The exact denoiser of an enumerated joint distribution: p(x_i | visible tokens) by summation.

    For tests and small studies: with it every order, filled by sampling, gives the joint itself.

    Args:
        joint: (V,) * L probabilities; they are normalised.

    Raises:
        IncompatibleDenoiserError: the table's shape is not the task's, or it holds no probabilities.
    """

    hidden_dim: int | None = None

    def __init__(self, joint: Tensor, task: Task | None = None) -> None:
        joint = torch.as_tensor(joint)
        vocab_size, length = (joint.shape or (0,))[0], joint.ndim
        if not length or joint.shape != (vocab_size,) * length:
            raise IncompatibleDenoiserError(
                f"a joint has one axis of the same size per position, not {tuple(joint.shape)}"
            )
        if not bool((joint >= 0).all() and joint.isfinite().all() and joint.any()):
            raise IncompatibleDenoiserError("a joint holds probabilities: finite, none below 0, and not all 0")
        if task is not None:
            task.check_denoiser(vocab_size, length)
        self.vocab_size, self.length, self.mask_id = vocab_size, length, vocab_size
        symbols = torch.arange(vocab_size, device=joint.device)
        self.sequences = torch.cartesian_prod(*[symbols] * length).view(-1, length)  # (V**L, L)
        self.probabilities = (joint / joint.sum()).flatten().double()
        self.one_hot = torch.nn.functional.one_hot(self.sequences, vocab_size).double()  # (V**L, L, V)
        self.device = joint.device
        self.calls = 0

    def __call__(self, tokens: Tensor, where: Tensor | None = None) -> Denoised:
        self.calls += 1
        visible = tokens.unsqueeze(1)  # (N, 1, L)
        agrees = ((visible == self.mask_id) | (visible == self.sequences)).all(2)  # (N, V**L)
        marginal = torch.einsum("ns,slv->nlv", agrees * self.probabilities, self.one_hot)
        return Denoised.of((marginal / marginal.sum(-1, keepdim=True).clamp(min=1e-300)).log().float())


def load_denoiser(
    source: str | Path | Backbone | Denoiser | CanvasDenoiser, task: Task, device: torch.device | str = "cpu"
) -> Denoiser | CanvasDenoiser:
    """A denoiser by packaged name, folder or hub id; a backbone is wrapped; a denoiser is returned as it is.

    A name may carry how a recurrent one reads: ``sudoku6-recurrent:passes=6,read=always``; see :class:`FrozenDenoiser`.
    What is loaded by name is pickled by name (:class:`unmask_env.shared.Named`).

    ``hf:`` and a folder or hub id is a model of ``transformers``, with the options of
    :class:`unmask_env.language_models.HFDenoiser`: ``hf:bert-base-uncased,dtype=bfloat16``; a DiffusionGemma has those
    of :class:`unmask_env.diffusion_gemma.DiffusionGemma`.

    Raises:
        CheckpointError, UnknownNameError, IncompatibleDenoiserError: each in one line.
    """
    device = checked_device(device)
    if isinstance(source, str | Path):
        denoiser = _by_name(source, task, device)
        if isinstance(denoiser, Named):
            denoiser.name_as(source, task, str(device))
        return denoiser
    if isinstance(source, Backbone):
        return FrozenDenoiser(source, task, device)
    if hasattr(source, "vocab_size") and hasattr(source, "length"):
        task.check_denoiser(source.vocab_size, source.length)
    return source


def _by_name(source: str | Path, task: Task, device: torch.device) -> Denoiser | CanvasDenoiser:
    if isinstance(source, str) and source.startswith(HUGGING_FACE):
        text = source.removeprefix(HUGGING_FACE)
        kind = DiffusionGemma if is_diffusion_gemma(text.partition(",")[0]) else HFDenoiser
        options = read_options(f"denoiser {source!r}", text, kind)
        if options.keys() & {"task", "device"} or "source" not in options:
            raise UnmaskError(f"denoiser {source!r} must be hf:SOURCE, followed by options; not task or device")
        return kind(**options, task=task, device=device)
    name, text = name_and_options(source)
    if adapter_folder(name) is not None:
        adapted = partial(HFDenoiser, name, task, device)
        return adapted(**read_options(f"denoiser {str(source)!r}", text, adapted))
    model = load_model(Backbone, name, PACKAGED_DENOISERS, "denoiser")
    frozen = partial(FrozenDenoiser, model, task, device)
    return frozen(**read_options(f"denoiser {str(source)!r}", text, frozen))
