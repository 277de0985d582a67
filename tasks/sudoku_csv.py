"""A user's own Sudoku puzzles, from a CSV file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.errors import PuzzleFileError, UnmaskError
from tasks.sudoku_solver import solve, units


class PuzzleFile(NamedTuple):
    """Puzzles and solutions of a user's file, (N, n * n) uint8, blanks 0."""

    puzzles: np.ndarray
    solutions: np.ndarray


def read_csv(path: str | Path, h: int, w: int) -> PuzzleFile:
    """Read ``Puzzle,Solution`` lines (one digit string per board; 0 or ``.`` is a blank; ``Solution`` may be absent).

    A missing solution is solved for; of several, the first one found is kept (any valid filling counts as solved).

    Raises:
        PuzzleFileError: with the line number, for a wrong header, length or digit, clues that break a rule, a puzzle
            without a solution, or a solution that does not belong to the puzzle.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [[cell.strip() for cell in line] for line in csv.reader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PuzzleFileError(f"{path}: cannot be read as a text file ({error})") from None
    header = [cell.lower() for cell in lines[0]] if lines else []
    if header not in (["puzzle"], ["puzzle", "solution"]):
        raise PuzzleFileError(f"{path}, line 1: the header must be 'Puzzle,Solution' or 'Puzzle'")
    puzzles, answers = [], []
    for number, cells in enumerate(lines[1:], start=2):
        if not any(cells):
            continue
        try:
            if len(cells) > len(header):
                raise UnmaskError(f"{len(cells)} columns; the header has {len(header)}")
            puzzle, answer = _boards(cells[0], cells[1] if len(cells) > 1 else "", h, w)
        except UnmaskError as error:
            raise PuzzleFileError(f"{path}, line {number}: {error}") from None
        puzzles.append(puzzle)
        answers.append(answer)
    if not puzzles:
        raise PuzzleFileError(f"{path}: no puzzle after the header")
    return PuzzleFile(np.array(puzzles, np.uint8), np.array(answers, np.uint8))


def _boards(puzzle_text: str, solution_text: str, h: int, w: int) -> tuple[list[int], list[int]]:
    """A puzzle and its solution, which is solved for where none is given. Raises :class:`tasks.UnmaskError`."""
    puzzle = _digits(puzzle_text, "puzzle", h * w)
    for k, kind in enumerate(("row", "column", "box")):
        seen: set[tuple[int, int]] = set()
        for v, unit in zip(puzzle, (cell[k] for cell in units(h, w)), strict=True):
            if v and (unit, v) in seen:
                raise UnmaskError(f"illegal clue: digit {v} twice in {kind} {unit + 1}")
            seen.add((unit, v))
    if all(puzzle):
        raise UnmaskError("the puzzle has no blank")
    if not solution_text:
        solutions = solve(puzzle, h, w, limit=1)
        if not solutions:
            raise UnmaskError("the puzzle has no solution")
        return puzzle, solutions[0]
    answer = _digits(solution_text, "solution", h * w)
    if 0 in answer or not solve(answer, h, w, limit=1):
        raise UnmaskError("the solution is not a complete legal board")
    if any(p and p != a for p, a in zip(puzzle, answer, strict=True)):
        raise UnmaskError("the solution contradicts a clue")
    return puzzle, answer


def _digits(text: str, what: str, n: int) -> list[int]:
    digits = {str(v): v for v in range(n + 1)} | {".": 0}
    if len(text) != n * n:
        raise UnmaskError(f"the {what} has {len(text)} characters; a {n}x{n} board has {n * n}")
    wrong = sorted(set(text) - digits.keys())
    if wrong:
        raise UnmaskError(f"the {what} has {wrong[0]!r}; allowed are 1-{n}, and 0 or '.' for a blank")
    return [digits[c] for c in text]
