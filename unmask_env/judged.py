"""Free text: sequences with no right answer, rewarded by what an independent autoregressive model says of them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pretrain.backbone import Backbone
from pretrain.checkpoint import PACKAGED_DENOISERS, load_model
from tasks import Instances, Task, Text, UnmaskError
from tasks.text_metrics import unigram_entropy
from unmask_env.denoiser import check_fits

QUANTILES = (0.01, 0.1)  # of the entropy of real windows: no reward below the first, all of it from the second on


class Judged(Task):
    """``text``, with a reward that needs no answer: exp of the mean log-probability of a symbol under the judge,

        r = p(x)^(1/L) * clamp((H(x) - H_1%) / (H_10% - H_1%), 0, 1)

    where H is the entropy of a window's symbols, and H_q its quantile over real windows. The first factor alone is won
    by repetition, which every language model finds likely; text less varied than 99 % of real windows earns nothing.

    Args:
        text: where sequences and holes come from. judge: an autoregressive denoiser of the same symbols, trained apart
            from the one that fills: packaged name, folder or hub id.

    Raises:
        UnmaskError: a judge that is not autoregressive. IncompatibleDenoiserError: one of other symbols or length.
    """

    one_answer = False

    def __init__(self, text: Task, judge: str | Path | Backbone) -> None:
        name = judge if not isinstance(judge, Backbone) else "given"
        if not isinstance(judge, Backbone):
            judge = load_model(Backbone, judge, PACKAGED_DENOISERS, "denoiser")
        check_fits(judge.vocab_size, judge.length, text, judge.fingerprint)
        if judge.block_length != 1:
            raise UnmaskError(f"the judge {name} is not autoregressive; train one with unmask pretrain ar")
        self.text, self.judge = text, judge.eval().requires_grad_(False)
        self.name, self.symbols, self.shape = f"judged {text.name}", text.symbols, text.shape

    @property
    def coordinates(self) -> Tensor:
        return self.text.coordinates

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        return self.text.sample(n, generator)

    def heldout(self, n: int | None = None, split: str = "test") -> Instances:
        return self.text.heldout(n, split)

    def draw(self, tokens: Tensor) -> str:
        return self.text.draw(tokens)

    @cached_property
    def _floor(self) -> tuple[float, float]:
        """The quantiles of the entropy of real windows."""
        entropy = unigram_entropy(self.text.heldout(1000, "validation").answers)
        low, high = entropy.quantile(torch.tensor(QUANTILES, dtype=entropy.dtype)).tolist()
        return low, high

    @torch.no_grad()
    def nats(self, tokens: Tensor) -> Tensor:
        """(N,) float64 -log p(x) / L under the judge, of complete sequences."""
        if self.judge.head.weight.device != tokens.device:
            self.judge.to(tokens.device)
        log_probs = self.judge.predict_blocks(torch.full_like(tokens, self.judge.mask_id), tokens).log_softmax(-1)
        return -log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).double().mean(1)

    def metrics(self, tokens: Tensor, instances: Instances) -> dict[str, Tensor]:
        """``reward``; ``likelihood``, its first factor; ``entropy`` of the symbols as a share of log L, the most there
        could be; ``distinct_4``, the share of runs of four symbols that are different ones. 0 with holes left."""
        complete = (tokens != self.mask_id).all(1)
        likelihood, entropy = torch.exp(-self.nats(tokens.clamp(max=self.vocab_size - 1))), unigram_entropy(tokens)
        low, high = self._floor
        varied = ((entropy - low) / max(high - low, 1e-9)).clamp(0, 1)
        runs = tokens.unfold(1, min(4, self.length), 1)  # (N, M, 4)
        alike = (runs.unsqueeze(1) == runs.unsqueeze(2)).all(-1)
        different = (~alike.tril(-1).any(2)).double().mean(1)
        most = torch.tensor(float(max(2, self.length))).log()
        found = {"reward": likelihood * varied, "likelihood": likelihood, "entropy": entropy / most}
        found["distinct_4"] = different
        return {name: (value * complete).float() for name, value in found.items()}

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return self.metrics(tokens, instances)["reward"]


def free_text(
    source: str = "sotu", length: int = 64, hide: float = 1.0, span: int = 1, judge: str = "text-ar"
) -> Judged:
    """The task ``free_text``: :class:`tasks.Text` with nothing given, or a share of it, and a judge."""
    return Judged(Text(source, length=length, hide=hide, span=span), judge)
