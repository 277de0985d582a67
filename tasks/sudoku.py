"""Sudoku as a task, for boxes of any shape: 4x4, 6x6 (boxes of 2 rows by 3 columns) and 9x9 are packaged.

Digit d is token d - 1 and a blank is ``mask_id``. Training never sees a grid that a symmetry relates to a held-out
grid (see :func:`tasks.sudoku_solver.split_of`), and shows its grids under random symmetries; 4x4 is split by grid, so
there a symmetry would carry training grids into the held-out ones and is not used.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tasks.errors import UnmaskError
from tasks.settings import AtLeast1, check, checked
from tasks.sudoku_csv import read_csv
from tasks.task import DATA, Instances, Task, random_rows, random_subset

BOXES = {"sudoku4": (2, 2), "sudoku6": (2, 3), "sudoku9": (3, 3)}  # of the packaged puzzles
Difficulty = Literal["all", "easy", "hard"]
Reward = Literal["solved", "cell_accuracy", "valid"]


class Sudoku(Task):
    """Fill the blanks of a Sudoku; every puzzle of the packaged files is minimal and has exactly one solution.

    Args:
        box_height, box_width: shape of a box; the board is ``n x n`` with ``n = box_height * box_width``.
        blanks: if given, clues of the solution are revealed at random until exactly that many blanks are left
            (a minimal puzzle with more clues stays unique). The default leaves minimal puzzles as they are.
        reward: which metric :meth:`reward` returns.

    Raises:
        UnmaskError: sizes, blanks or a reward that are not allowed.
    """

    box: tuple[int, int]

    @checked
    def __init__(
        self, box_height: AtLeast1, box_width: AtLeast1, blanks: int | None = None, reward: Reward = "solved"
    ) -> None:
        n = box_height * box_width
        self.shape, self.box, self.name = (n, n), (box_height, box_width), f"sudoku{n}"
        if BOXES.get(self.name, self.box) != self.box:  # not the boxes of the packaged puzzles of that size
            self.name += f"-{box_height}x{box_width}"
        self.symbols = tuple(str(d) for d in range(1, n + 1))
        if blanks is not None and not 1 <= blanks < n * n:
            raise UnmaskError(f"blanks must be between 1 and {n * n - 1}, not {blanks}")
        self.blanks, self.reward_metric = blanks, reward
        self.symmetric = self.name != "sudoku4"
        self._path = DATA / f"{self.name}.npz"

    @cached_property
    def _files(self) -> dict[str, Tensor]:
        if not self._path.exists():
            known = ", ".join(sorted(path.stem for path in DATA.glob("sudoku*.npz")))
            raise UnmaskError(f"no packaged puzzles for {self.name}; packaged are: {known}")
        with np.load(self._path, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    def _encode(self, boards: Tensor) -> Tensor:
        """Digits 1..n to tokens 0..n-1, blank 0 to ``mask_id``."""
        boards = boards.long()
        return torch.where(boards == 0, self.mask_id, boards - 1)

    def _instances(self, puzzles: Tensor, solutions: Tensor) -> Instances:
        return Instances(self._encode(puzzles), self._encode(solutions))

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        rows = random_rows(len(self._files["train_puzzles"]), n, generator)
        instances = self._instances(self._files["train_puzzles"][rows], self._files["train_solutions"][rows])
        return self.augment(self._reveal(instances.to(generator.device), generator), generator)

    def clean(self, n: int, generator: torch.Generator) -> Tensor:
        grids = self._files["train_grids"]
        boards = self._encode(grids[random_rows(len(grids), n, generator)]).to(generator.device)
        return self.random_symmetry([boards], generator)[0] if self.symmetric else boards

    def augment(self, instances: Instances, generator: torch.Generator) -> Instances:
        if not self.symmetric:
            return instances
        return Instances(*self.random_symmetry([instances.tokens, instances.answers], generator))

    def heldout(self, n: int | None = None, split: str = "test", difficulty: Difficulty = "all") -> Instances:
        """The first ``n`` packaged puzzles of ``validation`` or ``test`` (or of ``train``, unaugmented).

        Args:
            difficulty: ``easy`` takes those that naked and hidden singles alone solve, ``hard`` the others.
        """
        self.split_generator(split)  # a split of another name
        check("difficulty", difficulty, Difficulty)
        instances = self._instances(self._files[f"{split}_puzzles"], self._files[f"{split}_solutions"])
        if difficulty != "all":
            instances = instances[self._files[f"{split}_singles"] == (difficulty == "easy")]
        kind = f"{split} puzzles" if difficulty == "all" else f"{difficulty} {split} puzzles"
        return self._reveal(self.first(n, instances, kind), torch.Generator().manual_seed(0))

    def select(
        self, limit: int | None = None, file: Path | None = None, difficulty: Difficulty = "all", split: str = "test"
    ) -> Instances:
        check("limit", limit, AtLeast1 | None)
        if file is None:
            return self.heldout(limit, split, difficulty)
        if difficulty != "all":
            raise UnmaskError("--difficulty is for the packaged puzzles; your own file is taken whole")
        return self.from_csv(file, limit)

    def from_csv(self, path: str | Path, limit: int | None = None) -> Instances:
        """A user's own puzzles; see :func:`tasks.sudoku_csv.read_csv` for the format and the errors."""
        puzzles, solutions = read_csv(path, *self.box, limit)
        return self._instances(torch.from_numpy(puzzles), torch.from_numpy(solutions))

    def _reveal(self, instances: Instances, generator: torch.Generator) -> Instances:
        if self.blanks is None:
            return instances
        hole = instances.tokens == self.mask_id
        if int(hole.sum(1).min()) < self.blanks:
            raise UnmaskError(f"a puzzle of {self.name} has fewer than {self.blanks} blanks; ask for fewer")
        kept = random_subset(hole, self.blanks, generator)
        return Instances(torch.where(kept, self.mask_id, instances.answers), instances.answers)

    def random_symmetry(self, boards: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        """Apply one random symmetry per row, the same to each (N, L) tensor of ``boards``.

        Digits, bands, rows in a band, stacks and columns in a stack are permuted; square boxes also transpose.
        """
        (h, w), n, device = self.box, self.shape[0], generator.device
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
        valid = self.valid(tokens, instances)
        solved = valid | (tokens == instances.answers).all(1)
        accuracy = self.accuracy(tokens, instances).masked_fill(valid, 1.0)
        return {"solved": solved.float(), "cell_accuracy": accuracy, "valid": valid.float()}

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        """(N,) the metric that ``reward`` names: by default 1 where the board is solved, else 0."""
        return self.metrics(tokens, instances)[self.reward_metric]
