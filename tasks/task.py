"""What a task is: it draws instances, rewards finished sequences and says how a sequence looks to a person.

Everything above this floor (denoisers, environments, agents) knows a task only through this file.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.errors import IncompatibleDenoiserError, UnmaskError
from tasks.settings import AtLeast1, ShareAbove0, check, checked

SPLITS = ("train", "validation", "test")
DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Instances:
    """A batch of problems: sequences with holes, and their answers kept apart.

    Attributes:
        tokens: (N, L) int64. A hole holds the task's ``mask_id``.
        answers: (N, L) int64, complete. Never part of an observation.
    """

    tokens: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> Instances:
        """The instances of ``rows`` (an index tensor, a boolean mask or a slice)."""
        return Instances(self.tokens[rows], self.answers[rows])

    def to(self, device: torch.device | str) -> Instances:
        """The same on another device."""
        return Instances(self.tokens.to(device), self.answers.to(device))

    def repeat(self, times: int) -> Instances:
        """Each instance ``times`` times in a row: the layout of groups, (N * times, L)."""
        return Instances(self.tokens.repeat_interleave(times, 0), self.answers.repeat_interleave(times, 0))


def random_rows(count: int, n: int, generator: torch.Generator) -> Tensor:
    """(n,) int64 on the CPU: rows of a table with ``count``, drawn with replacement on the generator's device."""
    return torch.randint(count, (n,), generator=generator, device=generator.device).cpu()


def random_subset(candidates: Tensor, size: int | Tensor, generator: torch.Generator) -> Tensor:
    """(N, L) bool: ``size`` random ones of each row's ``candidates`` (N, L) bool, or all where there are fewer."""
    draws = torch.rand(candidates.shape, generator=generator, device=candidates.device)
    rank = draws.masked_fill(~candidates, torch.inf).argsort(1).argsort(1)
    return (rank < size) & candidates


class Task(ABC):
    """Data and truth of one family of problems over sequences of fixed length.

    A subclass sets the attributes below, then implements :meth:`sample`, :meth:`reward` and, where they say more
    than the reward, :meth:`metrics`. Tokens ``0 .. vocab_size - 1`` are symbols; ``mask_id == vocab_size`` is a hole.

    Attributes:
        name: what the task is called in logs and error messages.
        symbols: one string per token, as people see it.
        shape: (rows, columns) of the drawing; ``rows * columns`` is the length L.
        box: (height, width) of the boxes that the drawing frames, or None.
        vocabularies: how many symbols each position has for itself, (L,): the first takes the first ``vocabularies[0]``
            symbols, the second those after them, and so on. None: all positions share all symbols.
        prompt_length: how many positions, from the first on, every instance gives. Denoisers learn what is behind them.
        one_answer: whether an instance's answer is the only right one.
        fill_temperature: at which symbols are filled in where nothing else is said: 0 takes the likeliest, 1 draws from
            the denoiser's distribution, which a text from nothing asks for.
    """

    name: str
    symbols: tuple[str, ...]
    shape: tuple[int, int]
    box: tuple[int, int] | None = None
    vocabularies: tuple[int, ...] | None = None
    prompt_length: int = 0
    one_answer: bool = True
    fill_temperature: float = 0.0

    @property
    def length(self) -> int:
        """L, the number of positions."""
        return self.shape[0] * self.shape[1]

    @property
    def is_line(self) -> bool:
        """Of positions, not a board: distances along it mean something."""
        return self.shape[0] == 1

    @property
    def vocab_size(self) -> int:
        """V, the number of symbols; the mask is none of them."""
        return len(self.symbols)

    @property
    def mask_id(self) -> int:
        """The token of a hole, V."""
        return len(self.symbols)

    @property
    def fingerprint(self) -> str:
        """Tells sets of symbols apart: a denoiser of one means nothing to another, even of the same size."""
        return hashlib.sha256(json.dumps([self.symbols, self.vocabularies]).encode()).hexdigest()[:16]

    def check_denoiser(self, vocab_size: int, length: int, fingerprint: str | None = None) -> None:
        """Raises :class:`IncompatibleDenoiserError` unless a denoiser's sizes, and its symbols where they are known,
        are the task's."""
        if (vocab_size, length) != (self.vocab_size, self.length):
            raise IncompatibleDenoiserError(
                f"task {self.name} has {self.vocab_size} symbols and {self.length} positions; "
                f"this denoiser was trained for {vocab_size} symbols and {length} positions"
            )
        if fingerprint not in (None, self.fingerprint):
            raise IncompatibleDenoiserError(
                f"this denoiser was trained on other symbols than those of task {self.name}, though as many; name the "
                "task with the source and options of its training"
            )

    @property
    def coordinates(self) -> Tensor:
        """(L, C) int64: where each position stands, as the networks read it: its index on a line; on a board row and
        column, and the box where there are boxes."""
        if self.is_line:
            return torch.arange(self.length).unsqueeze(1)
        rows, columns = self.shape
        row, column = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).unbind(1)
        if self.box is None:
            return torch.stack([row, column], 1)
        height, width = self.box
        return torch.stack([row, column, row // height * (columns // width) + column // width], 1)

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Instances:
        """``n`` training instances, on the generator's device."""

    def clean(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, L) complete sequences to train a denoiser on. The default is the answers of :meth:`sample`."""
        return self.sample(n, generator).answers

    def augment(self, instances: Instances, generator: torch.Generator) -> Instances:
        """The instances under random symmetries, which keep their difficulty. The default changes nothing."""
        return instances

    def heldout(self, n: int | None = None, split: str = "test") -> Instances:
        """``n`` instances of a fixed split that training never sees, the same in the same order each time. Those of
        another ``n`` may be others: a text spreads them over all that it has.

        The default draws them from a generator seeded apart from training; a task with files reads its files.
        """
        return self.sample(1000 if n is None else n, self.split_generator(split))

    def select(
        self, limit: int | None = None, file: Path | None = None, difficulty: str = "all", split: str = "test"
    ) -> Instances:
        """To evaluate on: ``limit`` instances of a ``split``, of one ``difficulty``, or those of the user's ``file``.

        Raises:
            UnmaskError: a limit below 1; a file or a difficulty, where the task has none, as by default.
        """
        check("limit", limit, AtLeast1 | None)
        if file is not None or difficulty != "all":
            raise UnmaskError(f"--puzzles and --difficulty are for Sudoku tasks; {self.name} is not one")
        return self.heldout(limit, split)

    def split_generator(self, split: str) -> torch.Generator:
        """The generator of what is fixed for a split. Raises :class:`UnmaskError` for a split of another name."""
        if split not in SPLITS:
            raise UnmaskError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        return torch.Generator().manual_seed(2**31 + SPLITS.index(split))

    def first(self, n: int | None, instances: Instances, what: str) -> Instances:
        """The first ``n``, or all. Raises :class:`UnmaskError`, counting ``what`` there are, where they are fewer."""
        if n is not None and not 1 <= n <= len(instances):
            raise UnmaskError(f"{self.name} has {len(instances)} {what}; cannot take {n}")
        return instances[:n]

    def behind_prompt(self, answers: Tensor) -> Instances:
        """Instances of complete sequences (N, L): the prompt is given, everything behind it hidden."""
        hidden = torch.arange(self.length, device=answers.device) >= self.prompt_length
        return Instances(torch.where(hidden, self.mask_id, answers), answers)

    def settled(self, tokens: Tensor) -> Tensor | None:
        """``tokens`` (N, L) with the holes filled that nothing depends on any more, such as those behind the end of an
        answer; None, the default, where there are never any. Asked after every step, whatever the order was."""
        return None

    def all_answers(self, instances: Instances) -> Tensor:
        """(N, K, L): the right answers in the task's own form, the instances' own first; rows with fewer repeat it."""
        return instances.answers.unsqueeze(1)

    def accuracy(self, tokens: Tensor, instances: Instances) -> Tensor:
        """(N,) float32 share of an instance's holes where ``tokens`` (N, L) are its answer's."""
        holes = instances.tokens == self.mask_id
        return ((tokens == instances.answers) & holes).sum(1) / holes.sum(1).clamp(min=1)

    @abstractmethod
    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        """(N,) float32 reward in [0, 1] of the finished sequences ``tokens`` (N, L)."""

    def metrics(self, tokens: Tensor, instances: Instances) -> dict[str, Tensor]:
        """Named (N,) float32 measures of finished sequences; the first is the one that tables are read for."""
        return {"reward": self.reward(tokens, instances)}

    def symbol(self, token: int) -> str:
        """``token`` as people see it; a hole is a dot."""
        return "." if token == self.mask_id else self.symbols[token]

    def draw(self, tokens: Tensor) -> str:
        """One sequence (L,) as text, boxes framed by blanks and bars."""
        rows, columns = self.shape
        height, width = self.box or (rows, columns)
        wide = max(len(s) for s in self.symbols)
        lines = []
        for r in range(rows):
            if r and r % height == 0:
                lines.append("")
            cells = [self.symbol(int(tokens[r * columns + c])).rjust(wide) for c in range(columns)]
            groups = [" ".join(cells[c : c + width]) for c in range(0, columns, width)]
            lines.append(" | ".join(groups))
        return "\n".join(lines)


def check_task(task: Task) -> None:
    """Hold a task's attributes to their types. Raises :class:`UnmaskError`, naming the one that is wrong."""
    symbols, shape, what = getattr(task, "symbols", None), getattr(task, "shape", None), f"task {type(task).__name__}"
    if not isinstance(getattr(task, "name", None), str):
        raise UnmaskError(f"{what} needs a name, which is text")
    if not isinstance(symbols, tuple | list) or not symbols or not all(isinstance(symbol, str) for symbol in symbols):
        raise UnmaskError(f"{what} needs symbols, a tuple of strings, one at least")
    sides = [type(side) is int and side > 0 for side in shape] if isinstance(shape, tuple | list) else []
    if sides != [True, True]:
        raise UnmaskError(f"{what} needs a shape, (rows, columns), whole numbers of at least 1, not {shape!r:.60}")
    if type(task.prompt_length) is not int or not 0 <= task.prompt_length < task.length:
        raise UnmaskError(f"{what} needs a prompt_length from 0 to {task.length - 1}, not {task.prompt_length!r:.60}")
    fill_temperature_of(task)


def fill_temperature_of(task: Task) -> float:
    """At which temperature a task's symbols are filled in. Raises :class:`UnmaskError`: it is no number from 0 on."""
    given = task.fill_temperature
    if type(given) not in (int, float) or not 0 <= given < math.inf:
        raise UnmaskError(
            f"task {type(task).__name__} needs a fill_temperature, a number of at least 0, not {given!r:.60}"
        )
    return float(given)


def check_instances(task: Task, given: Any, n: int | None = None, what: str | None = None) -> Instances:
    """``given``, if it is instances of ``task``, ``n`` of them where that is said.

    Args:
        what: what it is called in the message.

    Raises:
        UnmaskError: it is none, or of another shape or type, or holds tokens that the task has not.
    """
    what = what or f"what task {task.name} draws"
    parts = [given.tokens, given.answers] if isinstance(given, Instances) else [None]
    count = len(parts[0]) if n is None and isinstance(parts[0], Tensor) and parts[0].ndim else n
    if not all(isinstance(part, Tensor) and part.shape == (count, task.length) for part in parts):
        number = "" if n is None else f"{n} "
        raise UnmaskError(f"{what} must hold {number}instances of length {task.length}, as tasks.Instances")
    if any(part.dtype != torch.int64 or bool(((part < 0) | (part > task.mask_id)).any()) for part in parts):
        raise UnmaskError(f"{what} must hold int64 tokens from 0 to {task.mask_id}, which is a mask")
    return given


class Infilling(Task):
    """Complete sequences of which an instance hides a share; the reward is the share of that which comes back right.

    A subclass implements :meth:`clean` and :meth:`heldout_answers`.

    Args:
        shape: (rows, columns). hide: share of the positions that instances hide.
        span: how many positions are hidden in a row, where there is room; 1 hides each for itself.

    Raises:
        UnmaskError: sizes below 1, or nothing or more than everything to hide.
    """

    @checked
    def __init__(self, shape: tuple[int, int], hide: ShareAbove0, span: int = 1) -> None:
        self.shape, self.hide, self.span = shape, hide, span
        check("length", min(shape), AtLeast1)
        if not 1 <= span <= self.length:
            raise UnmaskError(f"span must be between 1 and {self.length}, the length, not {span}")

    @abstractmethod
    def clean(self, n: int, generator: torch.Generator) -> Tensor: ...

    @abstractmethod
    def heldout_answers(self, n: int | None, split: str) -> Tensor:
        """(N, L) complete sequences of a split, always the same."""

    def _hidden(self, answers: Tensor, generator: torch.Generator) -> Instances:
        # Runs of ``span`` positions are hidden in random order up to the share; each sequence is cut at its own place.
        n, device, span = len(answers), answers.device, self.span
        cut = torch.randint(span, (n, 1), generator=generator, device=device) if span > 1 else 0
        run = (torch.arange(self.length, device=device) + cut) // span  # (N, L)
        draw = torch.rand((n, (self.length + span - 2) // span + 1), generator=generator, device=device)
        rank = draw.argsort(1).argsort(1).gather(1, run.expand(n, -1)) * self.length
        rank = rank + torch.arange(self.length, device=device)  # of positions: by run, then from its left
        holes = rank.argsort(1).argsort(1) < max(1, round(self.hide * self.length))
        return Instances(torch.where(holes, self.mask_id, answers), answers)

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        return self._hidden(self.clean(n, generator), generator)

    def heldout(self, n: int | None = None, split: str = "test") -> Instances:
        generator = self.split_generator(split)
        return self._hidden(self.heldout_answers(n, split), generator)

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        """The share of the hidden symbols that comes back right."""
        return self.accuracy(tokens, instances)

    def metrics(self, tokens: Tensor, instances: Instances) -> dict[str, Tensor]:
        """``token_accuracy`` over the hidden symbols, and ``exact``: whether all are right."""
        exact = (tokens == instances.answers).all(1).float()
        return {"token_accuracy": self.reward(tokens, instances), "exact": exact}
