"""The frozen denoiser that the environment is built around."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pretrain.backbone import Backbone
from pretrain.checkpoint import PACKAGED_DENOISERS, load_model
from pretrain.processes import LEAST
from tasks import Task, UnmaskError, read_options
from unmask_env.core import Denoised, IncompatibleDenoiserError
from unmask_env.huggingface import HFDenoiser

HUGGING_FACE = "hf:"  # before the names of models of transformers


class Denoiser(Protocol):
    """Maps tokens (N, L) to :class:`Denoised` on ``device``; counts its forwards in ``calls``.

    ``hidden_dim`` is the number of channels of its hidden states, None where it gives none.
    """

    calls: int
    hidden_dim: int | None
    device: torch.device

    def __call__(self, tokens: Tensor) -> Denoised: ...


class FrozenDenoiser:
    """A pretrained backbone in evaluation mode, without gradients: the model itself is switched over, not a copy.

    One with uniform noise that predicts ``absorbing`` is asked as at t = 1: what is on the board is given, and open
    positions hold noise symbols, always the same ones. At that time they carry no information, so this is P(x_0 | what
    is given), as of a masked model.

    Args:
        model: returns an output with ``logits`` (N, L, V) and ``hidden`` (N, L, D).
        task: checked against the model's vocabulary and length.
        device: where the model is put.

    Raises:
        IncompatibleDenoiserError: saying what the task needs.
    """

    def __init__(self, model: Backbone, task: Task, device: torch.device | str = "cpu") -> None:
        check_fits(model.vocab_size, model.length, task, model.fingerprint)
        if model.noise == "uniform" and model.predicts != "absorbing":
            raise IncompatibleDenoiserError(
                f"this denoiser was trained with uniform noise and predicts {model.predicts!r}, which does not know "
                "where the noise is; environments take masked denoisers and those of unmask pretrain audm"
            )
        self.model: Backbone = model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.hidden_dim: int | None = model.dim
        self.vocab_size, self.length = model.vocab_size, model.length
        self.calls = 0
        self._noise: Tensor | None = None  # (1, L)
        if model.noise == "uniform":
            self._noise = model.process.noise(1, torch.Generator(device).manual_seed(0))

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Denoised:
        self.calls += 1
        if self._noise is None:
            logits, hidden = self.model(tokens)
        else:
            is_open = tokens == self.model.mask_id
            alpha = torch.where(is_open, LEAST, 1.0)
            logits, hidden = self.model(torch.where(is_open, self._noise, tokens), alpha, is_open)
        log_probs, exponents = self.model.order.reverse(logits.float(), hidden)
        return Denoised(log_probs, hidden, exponents if self.model.order.learned else None)


class TableDenoiser:
    """The exact denoiser of an enumerated joint distribution: p(x_i | visible tokens) by summation.

    For tests and small studies: with it every order, filled by sampling, gives the joint itself.

    Args:
        joint: (V,) * L probabilities; they are normalised.

    Raises:
        IncompatibleDenoiserError: the table's shape is not the task's.
    """

    hidden_dim: int | None = None

    def __init__(self, joint: Tensor, task: Task | None = None) -> None:
        vocab_size, length = joint.shape[0], joint.ndim
        if joint.shape != (vocab_size,) * length:
            raise IncompatibleDenoiserError(
                f"a joint has one axis of the same size per position, not {tuple(joint.shape)}"
            )
        if task is not None:
            check_fits(vocab_size, length, task)
        self.vocab_size, self.length, self.mask_id = vocab_size, length, vocab_size
        self.sequences = torch.cartesian_prod(*[torch.arange(vocab_size, device=joint.device)] * length).view(
            -1, length
        )  # (V**L, L)
        self.probabilities = (joint / joint.sum()).flatten().double()
        self.one_hot = torch.nn.functional.one_hot(self.sequences, vocab_size).double()  # (V**L, L, V)
        self.device = joint.device
        self.calls = 0

    def __call__(self, tokens: Tensor) -> Denoised:
        self.calls += 1
        visible = tokens.unsqueeze(1)  # (N, 1, L)
        agrees = ((visible == self.mask_id) | (visible == self.sequences)).all(2)  # (N, V**L)
        weight = agrees * self.probabilities
        marginal = torch.einsum("ns,slv->nlv", weight, self.one_hot)
        return Denoised((marginal / marginal.sum(-1, keepdim=True).clamp(min=1e-300)).log().float())


def check_fits(vocab_size: int, length: int, task: Task, fingerprint: str | None = None) -> None:
    """Raises :class:`IncompatibleDenoiserError` unless the sizes, and the symbols where they are known, are the
    task's."""
    if (vocab_size, length) != (task.vocab_size, task.length):
        raise IncompatibleDenoiserError(
            f"task {task.name} has {task.vocab_size} symbols and {task.length} positions; "
            f"this denoiser was trained for {vocab_size} symbols and {length} positions"
        )
    if fingerprint not in (None, task.fingerprint):
        raise IncompatibleDenoiserError(
            f"this denoiser was trained on other symbols than those of task {task.name}, as many as they are; name the "
            "task with the source and options of its training"
        )


def load_denoiser(source: str | Path | Backbone | Denoiser, task: Task, device: torch.device | str = "cpu") -> Denoiser:
    """A denoiser by packaged name, folder or hub id; a backbone is wrapped; a denoiser is returned as it is.

    ``hf:`` and a folder or hub id is a model of ``transformers``, with the options of
    :class:`unmask_env.huggingface.HFDenoiser`: ``hf:bert-base-uncased,dtype=bfloat16``.

    Raises:
        CheckpointError, UnknownNameError, IncompatibleDenoiserError: each in one line.
    """
    if isinstance(source, str) and source.startswith(HUGGING_FACE):
        options = read_options(f"denoiser {source!r}", source.removeprefix(HUGGING_FACE), HFDenoiser)
        if options.keys() & {"task", "device"} or "source" not in options:
            raise UnmaskError(f"denoiser {source!r} must be hf:SOURCE, followed by options; not task or device")
        return HFDenoiser(**options, task=task, device=device)
    if isinstance(source, str | Path):
        source = load_model(Backbone, source, PACKAGED_DENOISERS, "denoiser")
    if isinstance(source, Backbone):
        return FrozenDenoiser(source, task, device)
    if hasattr(source, "vocab_size") and hasattr(source, "length"):
        check_fits(source.vocab_size, source.length, task)
    return source
