"""What a task is: it draws instances, rewards finished sequences and says how a sequence looks to a person.

Everything above this floor (denoisers, environments, agents) knows a task only through this file.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.errors import UnmaskError

SPLITS = ("train", "validation", "test")


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
        return Instances(self.tokens.to(device), self.answers.to(device))

    def repeat(self, times: int) -> Instances:
        """Each instance ``times`` times in a row: the layout of groups, (N * times, L)."""
        return Instances(self.tokens.repeat_interleave(times, 0), self.answers.repeat_interleave(times, 0))


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
    """

    name: str
    symbols: tuple[str, ...]
    shape: tuple[int, int]
    box: tuple[int, int] | None = None
    vocabularies: tuple[int, ...] | None = None
    prompt_length: int = 0
    one_answer: bool = True

    # ------------------------------------------------------------------ sizes
    @property
    def length(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def is_line(self) -> bool:
        """Of positions, not a board: distances along it mean something."""
        return self.shape[0] == 1

    @property
    def vocab_size(self) -> int:
        return len(self.symbols)

    @property
    def mask_id(self) -> int:
        return len(self.symbols)

    @property
    def fingerprint(self) -> str:
        """Tells sets of symbols apart: a denoiser of one means nothing to another, even of the same size."""
        return hashlib.sha256(json.dumps([self.symbols, self.vocabularies]).encode()).hexdigest()[:16]

    @property
    def coordinates(self) -> Tensor:
        """(L, C) int64: where each position stands. The default is its index; a board gives row, column, box."""
        return torch.arange(self.length).unsqueeze(1)

    # ------------------------------------------------------------------ data and truth
    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Instances:
        """``n`` training instances, on the generator's device."""

    def clean(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, L) complete sequences to train a denoiser on. The default is the answers of :meth:`sample`."""
        return self.sample(n, generator).answers

    def augment(self, instances: Instances, generator: torch.Generator) -> Instances:
        """The instances in another guise with the same difficulty (a random symmetry). The default changes nothing."""
        return instances

    def heldout(self, n: int | None = None, split: str = "test") -> Instances:
        """``n`` instances of a fixed split that training never sees, the same in the same order each time. Those of
        another ``n`` may be others: a text spreads them over all that it has.

        The default draws them from a generator seeded apart from training; a task with files reads its files.
        """
        seed = 2**31 + SPLITS.index(split)
        return self.sample(1000 if n is None else n, torch.Generator().manual_seed(seed))

    def behind_prompt(self, answers: Tensor) -> Instances:
        """Instances of complete sequences (N, L): the prompt is given, everything behind it hidden."""
        hidden = torch.arange(self.length, device=answers.device) >= self.prompt_length
        return Instances(torch.where(hidden, self.mask_id, answers), answers)

    def all_answers(self, instances: Instances) -> Tensor:
        """(N, K, L): the right answers in the task's own form, the instances' own first; rows with fewer repeat it."""
        return instances.answers.unsqueeze(1)

    @abstractmethod
    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        """(N,) float32 reward in [0, 1] of the finished sequences ``tokens`` (N, L)."""

    def metrics(self, tokens: Tensor, instances: Instances) -> dict[str, Tensor]:
        """Named (N,) float32 measures of finished sequences; the first is the one that tables are read for."""
        return {"reward": self.reward(tokens, instances)}

    # ------------------------------------------------------------------ for people
    def symbol(self, token: int) -> str:
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


class Infilling(Task):
    """Complete sequences of which an instance hides a share; the reward is the share of that which comes back right.

    A subclass implements :meth:`clean` and :meth:`heldout_answers`.

    Args:
        shape: (rows, columns). hide: share of the positions that instances hide.
        span: how many positions are hidden in a row, where there is room; 1 hides each for itself.

    Raises:
        UnmaskError: sizes below 1, or nothing or more than everything to hide.
    """

    def __init__(self, shape: tuple[int, int], hide: float, span: int = 1) -> None:
        if min(shape) < 1 or not 0 < hide <= 1:
            raise UnmaskError(
                f"length must be at least 1 and hide above 0 and at most 1, not {shape[0] * shape[1]} and {hide}"
            )
        if not 1 <= span <= shape[0] * shape[1]:
            raise UnmaskError(f"span must be between 1 and {shape[0] * shape[1]}, the length, not {span}")
        self.shape, self.hide, self.span = shape, hide, span

    @abstractmethod
    def clean(self, n: int, generator: torch.Generator) -> Tensor: ...

    @abstractmethod
    def heldout_answers(self, n: int | None, split: str) -> Tensor:
        """(N, L) complete sequences of a split, always the same."""

    def _hidden(self, answers: Tensor, generator: torch.Generator) -> Instances:
        # Runs of ``span`` positions, cut at a place of each sequence's own, are hidden in random order up to the share.
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
        return self._hidden(self.heldout_answers(n, split), torch.Generator().manual_seed(2**31 + SPLITS.index(split)))

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        holes = instances.tokens == self.mask_id
        right = (tokens == instances.answers) & holes
        return right.sum(1) / holes.sum(1).clamp(min=1)

    def metrics(self, tokens: Tensor, instances: Instances) -> dict[str, Tensor]:
        exact = (tokens == instances.answers).all(1).float()
        return {"token_accuracy": self.reward(tokens, instances), "exact": exact}
