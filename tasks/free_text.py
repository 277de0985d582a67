"""Free text: sequences with no right answer, rewarded by what a language model that is handed in says of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from tasks.task import Instances, Task

QUANTILES = (0.01, 0.1)  # of the entropy of real windows: no reward below the first, all of it from the second on


def unigram_entropy(tokens: Tensor) -> Tensor:
    """(N,) float64 nats: entropy of the symbols' frequencies within each sequence of ``tokens`` (N, L) int64.

    At most log L; 0 of a sequence that repeats one symbol.
    """
    same = (tokens.unsqueeze(2) == tokens.unsqueeze(1)).double().mean(2)  # (N, L) frequency of each position's symbol
    return -same.log().mean(1)


class FreeText(Task):
    """``text``, with a reward that needs no answer: exp of the mean log-probability of a symbol under a scorer,

        r = p(x)^(1/L) * clamp((H(x) - H_1%) / (H_10% - H_1%), 0, 1)

    where H is the entropy of a window's symbols, and H_q its quantile over real windows. The first factor alone is won
    by repetition, which every language model finds likely; text less varied than 99 % of real windows earns nothing.

    Args:
        text: where sequences and holes come from.
        scorer: complete sequences (N, L) to (N,) float64 nats per symbol, -log p(x) / L, under a language model that
            was trained apart from the one that fills.
    """

    one_answer = False
    fill_temperature = 1.0

    def __init__(self, text: Task, scorer: Callable[[Tensor], Tensor]) -> None:
        self.text, self.scorer = text, scorer
        self.name, self.symbols, self.shape = f"free {text.name}", text.symbols, text.shape

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

    def metrics(self, tokens: Tensor, instances: Instances) -> dict[str, Tensor]:
        """``reward``; ``likelihood``, its first factor; ``entropy`` of the symbols as a share of log L, the most there
        could be; ``distinct_4``, the share of runs of four symbols that are different ones. 0 with holes left."""
        complete = (tokens != self.mask_id).all(1)
        likelihood, entropy = torch.exp(-self.scorer(tokens.clamp(max=self.vocab_size - 1))), unigram_entropy(tokens)
        low, high = self._floor
        varied = ((entropy - low) / max(high - low, 1e-9)).clamp(0, 1)
        runs = tokens.unfold(1, min(4, self.length), 1)  # (N, M, 4)
        alike = (runs.unsqueeze(1) == runs.unsqueeze(2)).all(-1)
        different = (~alike.tril(-1).any(2)).double().mean(1)
        largest = torch.tensor(float(max(2, self.length))).log()
        metrics = {"reward": likelihood * varied, "likelihood": likelihood, "entropy": entropy / largest}
        metrics["distinct_4"] = different
        return {name: (value * complete).float() for name, value in metrics.items()}

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        """(N,) likelihood p(x)^(1/L) under the scorer, times how varied the text is: nothing for repetition."""
        return self.metrics(tokens, instances)["reward"]
