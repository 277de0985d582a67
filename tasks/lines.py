"""Sequences of different lengths, one per line, in the tokens of a pretrained model's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tasks.errors import UnmaskError
from tasks.files import read_lines
from tasks.settings import AtLeast1, ShareAbove0, checked
from tasks.task import SPLITS, Infilling, Instances, random_rows, random_subset
from tasks.tokenizers import all_tokens, load_tokenizer, reading

ANSWER = "\t"  # divides a line into what is given and what is asked for, in turn


class Lines(Infilling):
    """Lines of a text file, each padded to one length, as masked language models of ``transformers`` read them.

    An instance hides tokens at random, never special ones. In a line with tabs, what stands before the first is given
    and what stands after it may be hidden, up to the next tab, and so on in turn; tabs themselves are not read. The
    reward is the share of the hidden tokens that comes back right.

    Args:
        source: a UTF-8 file, of which the last tenth of the lines is for validation and test in equal parts; or lines.
        tokenizer: a folder or a hub id of a tokenizer of ``transformers``, or one of them. One without offsets (the
            slow kind) reads the parts between tabs one by one.
        length: positions; the default is the longest line's. hide: share of the tokens that may be hidden.
        side: where padding goes.
        trust_remote_code: run the tokenizer's own code, where it brings some. Only for sources that you trust.

    Attributes:
        pad_id: the token of positions that are padding, on the ``pad_side``; they are never hidden.

    Raises:
        UnmaskError: what cannot be read, a line longer than ``length`` or with nothing to hide, too few lines, a
            tokenizer without a mask token or a padding token.
    """

    name = "lines"

    @checked
    def __init__(
        self,
        source: str | Sequence[str],
        tokenizer: str | Any,
        length: AtLeast1 | None = None,
        hide: ShareAbove0 = 0.5,
        side: Literal["right", "left"] = "right",
        trust_remote_code: bool = False,
    ) -> None:
        # What the user wrote is read before the tokenizer, which may have to come from a hub.
        lines = _read(source) if isinstance(source, str) else dict(enumerate(source, 1))
        if len(lines) < len(SPLITS):
            raise UnmaskError(f"at least {len(SPLITS)} lines are needed, one for each split, not {len(lines)}")
        self.tokenizer = load_tokenizer(tokenizer, trust_remote_code, pads=True)
        self.pad_id: int = self.tokenizer.pad_token_id
        self.pad_side, self.symbols = side, all_tokens(self.tokenizer)
        with reading("lines with the tokenizer", str(tokenizer)[:80]):
            encoded = {number: self._encode(number, line) for number, line in lines.items()}
        longest = max(encoded, key=lambda number: len(encoded[number][0]))
        most = len(encoded[longest][0])
        length = most if length is None else length
        super().__init__((1, length), hide)
        if most > length:
            raise UnmaskError(f"line {longest} has {most} tokens, more than the length of {length}")
        held = max(1, len(lines) // 20)
        cuts = (0, len(lines) - 2 * held, len(lines) - held, len(lines))
        self._lines: dict[str, tuple[Tensor, Tensor]] = {}  # (N, L) tokens, and which of them may be hidden
        for split, start, end in zip(SPLITS, cuts, cuts[1:], strict=False):
            tokens = torch.full((end - start, length), self.pad_id)
            hideable = torch.zeros(end - start, length, dtype=torch.bool)
            for row, (ids, may) in enumerate([*encoded.values()][start:end]):
                at = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
                tokens[row, at], hideable[row, at] = torch.tensor(ids), torch.tensor(may)
            self._lines[split] = tokens, hideable

    def _encode(self, number: int, line: str) -> tuple[list[int], list[bool]]:
        parts = line.split(ANSWER)
        asked = [len(parts) == 1 or i % 2 == 1 for i, part in enumerate(parts) for _ in part]  # per character
        if getattr(self.tokenizer, "is_fast", False):
            pieces = self.tokenizer("".join(parts), return_special_tokens_mask=True, return_offsets_mapping=True)
            ids = pieces["input_ids"]
            may = [
                not special and end > 0 and asked[end - 1]
                for special, (_, end) in zip(pieces["special_tokens_mask"], pieces["offset_mapping"], strict=True)
            ]
        else:
            ids, may = self._in_parts(parts)
        if not any(may):
            raise UnmaskError(f"line {number} has nothing to hide")
        return ids, may

    def _in_parts(self, parts: list[str]) -> tuple[list[int], list[bool]]:
        """By a tokenizer that does not tell which characters a token comes from: each part for itself."""
        pieces = [self.tokenizer.encode(part, add_special_tokens=False) for part in parts]
        text = [token for piece in pieces for token in piece]
        asked = [len(parts) == 1 or i % 2 == 1 for i, piece in enumerate(pieces) for _ in piece]  # per token
        ids = list(self.tokenizer.build_inputs_with_special_tokens(text))
        before = next(at for at in range(len(ids) + 1) if ids[at : at + len(text)] == text)
        return ids, [False] * before + asked + [False] * (len(ids) - before - len(text))

    def _hide(self, lines: tuple[Tensor, Tensor], generator: torch.Generator) -> Instances:
        answers, hideable = lines
        sizes = (self.hide * hideable.sum(1, keepdim=True)).round().clamp(min=1)  # (N, 1)
        holes = random_subset(hideable, sizes, generator)
        return Instances(torch.where(holes, self.mask_id, answers), answers)

    def _rows(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens, hideable = self._lines["train"]
        rows = random_rows(len(tokens), n, generator)
        return tokens[rows].to(generator.device), hideable[rows].to(generator.device)

    def clean(self, n: int, generator: torch.Generator) -> Tensor:
        return self._rows(n, generator)[0]

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        return self._hide(self._rows(n, generator), generator)

    def heldout_answers(self, n: int | None, split: str) -> Tensor:
        return self._lines[split][0][:n]

    def heldout(self, n: int | None = None, split: str = "test") -> Instances:
        generator = self.split_generator(split)
        tokens, hideable = self._lines[split]
        return self._hide((tokens[:n], hideable[:n]), generator)

    def draw(self, tokens: Tensor) -> str:
        kept = [int(token) for token in tokens if int(token) != self.pad_id]
        return " ".join("_" if token == self.mask_id else self.symbols[token] for token in kept)


def _read(source: str) -> dict[int, str]:
    """By their numbers in the file, the lines that are not blank."""
    lines = read_lines(source)
    if not lines:
        raise UnmaskError(f"{source} is empty")
    return lines
