"""A user's own Sudoku puzzles, from a CSV file."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.errors import PuzzleFileError, UnmaskError
from tasks.files import read_rows
from tasks.sudoku_solver import BudgetError, solve, units

PUZZLE, SOLUTION = ("puzzle", "puzzles", "quiz", "quizzes", "question"), ("solution", "solutions", "answer")
BUDGET = 20_000  # positions that are tried to solve one puzzle: some seconds


class PuzzleFile(NamedTuple):
    """Puzzles and solutions of a user's file, (N, n * n) uint8, blanks 0."""

    puzzles: np.ndarray
    solutions: np.ndarray


def read_csv(path: str | Path, h: int, w: int, limit: int | None = None) -> PuzzleFile:
    """Read one puzzle a line, as a string of digits with 0 or ``.`` for a blank.

    A header says which column it is (``puzzle``, ``quizzes`` or ``question``) and where its solution is (``solution``
    or ``answer``), if there is one; other columns are not read. Without a header these are the first two columns. A
    missing solution is solved for; of several, the first one found is kept (any valid filling counts as solved).

    Args:
        limit: puzzles to read; the file is not read further.

    Raises:
        PuzzleFileError: with the line number, for a wrong header, length or digit, clues that break a rule, a puzzle
            without a solution or with one that takes too long to find, or a solution that does not belong to it.
    """
    puzzles, solutions = bytearray(), bytearray()
    columns: tuple[int, int | None, int] | None = None
    for number, row in read_rows(path, PuzzleFileError):
        cells = [cell.strip() for cell in row]
        try:
            if columns is None:
                columns, named = _columns(cells, (h * w) ** 2)
                if named:
                    continue
            if not any(cells):
                continue
            at, other, count = columns
            if len(cells) > count:
                raise UnmaskError(f"{len(cells)} columns; the first line has {count}")
            cells += [""] * (count - len(cells))
            puzzle, answer = _boards(cells[at], "" if other is None else cells[other], h, w)
        except UnmaskError as error:
            raise PuzzleFileError(f"{path}, line {number}: {error}") from None
        puzzles += bytes(puzzle)
        solutions += bytes(answer)
        if limit is not None and len(puzzles) >= limit * len(puzzle):
            break
    if not puzzles:
        raise PuzzleFileError(f"{path}: it holds no puzzle")
    boards = (np.frombuffer(board, np.uint8).reshape(-1, (h * w) ** 2) for board in (puzzles, solutions))
    return PuzzleFile(*boards)


def _columns(cells: list[str], size: int) -> tuple[tuple[int, int | None, int], bool]:
    """Which columns hold the puzzle and its solution, how many there are, and whether the first line names them."""
    names = [cell.lower() for cell in cells]
    at, other = ([names.index(name) for name in known if name in names] for known in (PUZZLE, SOLUTION))
    if len(at) == 1 and len(other) < 2:
        return (at[0], other[0] if other else None, len(cells)), True
    if len(cells[0]) == size and set(cells[0]) <= set("0123456789."):
        return (0, 1 if len(cells) > 1 else None, len(cells)), False
    raise UnmaskError(
        f"the header must name a column 'puzzle' and may name one 'solution', or the line be a board; not "
        f"{','.join(cells)[:80]!r}"
    )


def _boards(puzzle_text: str, solution_text: str, h: int, w: int) -> tuple[list[int], list[int]]:
    """A puzzle and its solution, which is solved for where none is given. Raises :class:`tasks.UnmaskError`."""
    puzzle = _digits(puzzle_text, "puzzle", h * w)
    clues = [(v, places) for v, places in zip(puzzle, units(h, w), strict=True) if v]
    for k, kind in enumerate(("row", "column", "box")):
        seen: set[tuple[int, int]] = set()
        for v, places in clues:
            if (places[k], v) in seen:
                raise UnmaskError(f"illegal clue: digit {v} twice in {kind} {places[k] + 1}")
            seen.add((places[k], v))
    if all(puzzle):
        raise UnmaskError("the puzzle has no blank")
    if not solution_text:
        try:
            solutions = solve(puzzle, h, w, limit=1, budget=BUDGET)
        except BudgetError:
            raise UnmaskError("its solution takes too long to find; write it beside the puzzle") from None
        if not solutions:
            raise UnmaskError("the puzzle has no solution")
        return puzzle, solutions[0]
    answer = _digits(solution_text, "solution", h * w)
    if 0 in answer or not solve(answer, h, w, limit=1):
        raise UnmaskError("the solution is not a complete legal board")
    if any(p and p != a for p, a in zip(puzzle, answer, strict=True)):
        raise UnmaskError("the solution contradicts a clue")
    return puzzle, answer


@cache
def _values(n: int) -> dict[str, int]:
    return {str(v): v for v in range(n + 1)} | {".": 0}


def _digits(text: str, what: str, n: int) -> list[int]:
    digits = _values(n)
    if len(text) != n * n:
        raise UnmaskError(f"the {what} has {len(text)} characters; a {n}x{n} board has {n * n}")
    wrong = sorted(set(text) - digits.keys())
    if wrong:
        raise UnmaskError(f"the {what} has {wrong[0]!r}; allowed are 1-{n}, and 0 or '.' for a blank")
    return [digits[c] for c in text]
