"""Sudoku as a task, for boxes of any shape: 4x4, 6x6 (boxes of 2 rows by 3 columns) and 9x9 are packaged.

Digit d is token d - 1 and a blank is ``mask_id``. Training never sees a grid that a symmetry relates to a held-out
grid (see :func:`tasks.sudoku_puzzles.split_of`), and shows its grids in random symmetric guises; 4x4 is split by grid,
so there a symmetry would carry training grids into the held-out ones and is not used.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tasks import sudoku_puzzles
from tasks.errors import UnmaskError
from tasks.task import SPLITS, Instances, Task

Reward = Literal["solved", "cell_accuracy", "valid"]


class Sudoku(Task):
    """Fill the blanks of a Sudoku; every puzzle of the packaged files is minimal and has exactly one solution.

    Args:
        box_height, box_width: shape of a box; the board is ``n x n`` with ``n = box_height * box_width``.
        blanks: if given, clues of the solution are revealed at random until exactly that many blanks are left
            (a minimal puzzle with more clues stays unique). The default leaves minimal puzzles as they are.
        reward: which metric :meth:`reward` returns.
    """

    def __init__(
        self,
        box_height: int,
        box_width: int,
        blanks: int | None = None,
        reward: Reward = "solved",
    ) -> None:
        if min(box_height, box_width) < 1:
            raise UnmaskError(f"a box needs at least one row and one column, not {box_height} by {box_width}")
        n = box_height * box_width
        box, self.name = (box_height, box_width), f"sudoku{n}"
        if sudoku_puzzles.BOXES.get(self.name, box) != box:  # not the boxes of the packaged puzzles of that size
            self.name += f"-{box_height}x{box_width}"
        self.symbols = tuple(str(d) for d in range(1, n + 1))
        self.shape = (n, n)
        self.box = (box_height, box_width)
        if reward not in ("solved", "cell_accuracy", "valid"):
            raise UnmaskError(f"unknown reward {reward!r}; known: solved, cell_accuracy, valid")
        if blanks is not None and not 1 <= blanks < n * n:
            raise UnmaskError(f"blanks must be between 1 and {n * n - 1}, not {blanks}")
        self.blanks = blanks
        self.reward_metric = reward
        self.symmetric = self.name != "sudoku4"

    # ------------------------------------------------------------------ sizes
    @cached_property
    def coordinates(self) -> Tensor:
        """(L, 3): row, column and box of each cell."""
        return torch.tensor(sudoku_puzzles.units(*self._box))

    @property
    def _box(self) -> tuple[int, int]:
        height, width = self.box or self.shape
        return height, width

    # ------------------------------------------------------------------ data
    @cached_property
    def _files(self) -> dict[str, Tensor]:
        path = sudoku_puzzles.DATA / f"{self.name}.npz"
        if not path.exists():
            known = ", ".join(sorted(p.stem for p in sudoku_puzzles.DATA.glob("sudoku*.npz")))
            raise UnmaskError(f"no packaged puzzles for {self.name}; packaged are: {known}")
        with np.load(path, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    def _encode(self, boards: Tensor) -> Tensor:
        """Digits 1..n to tokens 0..n-1, blank 0 to ``mask_id``."""
        boards = boards.long()
        return torch.where(boards == 0, self.mask_id, boards - 1)

    def _instances(self, puzzles: Tensor, solutions: Tensor) -> Instances:
        return Instances(self._encode(puzzles), self._encode(solutions))

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        puzzles = self._files["train_puzzles"]
        rows = torch.randint(len(puzzles), (n,), generator=generator, device=generator.device).cpu()
        instances = self._instances(puzzles[rows], self._files["train_solutions"][rows]).to(generator.device)
        return self.augment(self._reveal(instances, generator), generator)

    def clean(self, n: int, generator: torch.Generator) -> Tensor:
        grids = self._files["train_grids"]
        rows = torch.randint(len(grids), (n,), generator=generator, device=generator.device).cpu()
        boards = self._encode(grids[rows]).to(generator.device)
        return self.random_symmetry([boards], generator)[0] if self.symmetric else boards

    def augment(self, instances: Instances, generator: torch.Generator) -> Instances:
        if not self.symmetric:
            return instances
        tokens, answers = self.random_symmetry([instances.tokens, instances.answers], generator)
        return Instances(tokens, answers)

    def heldout(self, n: int | None = None, split: str = "test", singles: bool | None = None) -> Instances:
        """The first ``n`` packaged puzzles of ``validation`` or ``test`` (or of ``train``, unaugmented).

        Args:
            singles: only puzzles that naked and hidden singles alone solve (True), or only the others (False).
        """
        if split not in SPLITS:
            raise UnmaskError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        instances = self._instances(self._files[f"{split}_puzzles"], self._files[f"{split}_solutions"])
        if singles is not None:
            instances = instances[self._files[f"{split}_singles"] == singles]
        if n is not None:
            if not 1 <= n <= len(instances):
                raise UnmaskError(f"{self.name} has {len(instances)} {split} puzzles of that grade; cannot take {n}")
            instances = instances[:n]
        return self._reveal(instances, torch.Generator().manual_seed(0))

    def from_csv(self, path: str | Path) -> Instances:
        """A user's own puzzles; see :func:`tasks.sudoku_puzzles.read_csv` for the format and the errors."""
        file = sudoku_puzzles.read_csv(path, *self._box)
        return self._instances(torch.from_numpy(file.puzzles), torch.from_numpy(file.solutions))

    def _reveal(self, instances: Instances, generator: torch.Generator) -> Instances:
        if self.blanks is None:
            return instances
        hole = instances.tokens == self.mask_id
        if int(hole.sum(1).min()) < self.blanks:
            raise UnmaskError(f"a puzzle of {self.name} has fewer than {self.blanks} blanks; ask for fewer")
        rank = (
            torch.rand(hole.shape, generator=generator, device=hole.device)
            .masked_fill(~hole, 2.0)
            .argsort(1)
            .argsort(1)
        )
        return Instances(torch.where(rank < self.blanks, self.mask_id, instances.answers), instances.answers)

    def random_symmetry(self, boards: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        """Apply one random symmetry per row, the same to each (N, L) tensor of ``boards``.

        Digits, bands, rows in a band, stacks and columns in a stack are permuted; square boxes also transpose.
        """
        (h, w), n, device = self._box, self.shape[0], generator.device
        count = boards[0].shape[0]

        def order(groups: int, size: int) -> Tensor:  # (N, n): groups stay together, members and groups are shuffled
            outer = torch.rand(count, groups, generator=generator, device=device).argsort(1)
            inner = torch.rand(count, groups, size, generator=generator, device=device).argsort(2)
            return (outer.unsqueeze(2) * size + inner).reshape(count, n)

        cells = (order(n // h, h).unsqueeze(2) * n + order(n // w, w).unsqueeze(1)).reshape(count, n * n)
        if h == w:
            flip = torch.rand(count, 1, generator=generator, device=device) < 0.5
            cells = torch.where(flip, cells % n * n + cells // n, cells)
        digits = torch.rand(count, n, generator=generator, device=device).argsort(1)
        digits = torch.cat([digits, torch.full((count, 1), self.mask_id, device=device)], 1)
        return [digits.gather(1, board.gather(1, cells)) for board in boards]

    # ------------------------------------------------------------------ truth
    def valid(self, tokens: Tensor, instances: Instances) -> Tensor:
        """(N,) bool: complete, every unit holds every digit once, and no clue was changed."""
        n = self.shape[0]
        coordinates = self.coordinates.to(tokens.device)
        filled = (tokens < n).all(1)
        safe = tokens.clamp(max=n - 1)
        ok = filled & ((instances.tokens == self.mask_id) | (tokens == instances.tokens)).all(1)
        for kind in range(3):
            slot = coordinates[:, kind] * n + safe  # (N, L) one slot per (unit, digit)
            seen = torch.zeros_like(tokens).scatter(1, slot, 1)
            ok &= seen.all(1)
        return ok

    def metrics(self, tokens: Tensor, instances: Instances) -> dict[str, Tensor]:
        """``solved`` (equals the answer, or any valid filling where there are several), ``cell_accuracy`` over the
        blanks (1 for a valid filling), ``valid`` (rules and clues obeyed). With a unique solution a complete board
        is solved exactly when it is valid."""
        blank = instances.tokens == self.mask_id
        right = (tokens == instances.answers) & blank
        valid = self.valid(tokens, instances)
        solved = valid | (tokens == instances.answers).all(1)
        accuracy = right.sum(1) / blank.sum(1).clamp(min=1)
        return {
            "solved": solved.float(),
            "cell_accuracy": torch.where(valid, 1.0, accuracy.float()),
            "valid": valid.float(),
        }

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return self.metrics(tokens, instances)[self.reward_metric]
