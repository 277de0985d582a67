"""Sudoku without a network: solving, generating with proved uniqueness, canonical forms, users' files.

Boards are flat arrays of ``n * n`` integers, 0 for a blank, with boxes of ``h`` rows by ``w`` columns, ``n = h * w``.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from tasks.errors import PuzzleFileError

DATA = Path(__file__).parent / "data"
BOXES = {"sudoku4": (2, 2), "sudoku6": (2, 3), "sudoku9": (3, 3)}


# ---------------------------------------------------------------------- solving
@cache
def units(h: int, w: int) -> tuple[tuple[int, int, int], ...]:
    """(row, column, box) of every cell."""
    n = h * w
    return tuple((i // n, i % n, (i // n) // h * h + (i % n) // w) for i in range(n * n))


def solutions(
    puzzle: Sequence[int], h: int, w: int, limit: int = 2, rng: random.Random | None = None
) -> list[list[int]]:
    """Up to ``limit`` solutions by backtracking on the most constrained cell; one found with limit 2 proves it unique.

    ``rng`` tries digits in random order, which makes the first solution of an empty board a random grid.
    """
    n, unit_of = h * w, units(h, w)
    full = (1 << n) - 1
    rows, cols, boxes = [0] * n, [0] * n, [0] * n
    board = [int(v) for v in puzzle]
    for i, v in enumerate(board):
        if v:
            r, c, b = unit_of[i]
            bit = 1 << (v - 1)
            if (rows[r] | cols[c] | boxes[b]) & bit:
                return []
            rows[r] |= bit
            cols[c] |= bit
            boxes[b] |= bit
    empty = [i for i, v in enumerate(board) if not v]
    found: list[list[int]] = []

    def search(k: int) -> None:
        if k == 0:
            found.append(board.copy())
            return
        fewest, best, at = n + 1, 0, 0
        for j in range(k):
            r, c, b = unit_of[empty[j]]
            free = full & ~(rows[r] | cols[c] | boxes[b])
            size = free.bit_count()
            if size < fewest:
                fewest, best, at = size, free, j
                if size < 2:
                    break
        if fewest == 0:
            return
        empty[at], empty[k - 1] = empty[k - 1], empty[at]
        i = empty[k - 1]
        r, c, b = unit_of[i]
        values = [v for v in range(n) if best >> v & 1]
        if rng is not None:
            rng.shuffle(values)
        for v in values:
            bit = 1 << v
            rows[r] |= bit
            cols[c] |= bit
            boxes[b] |= bit
            board[i] = v + 1
            search(k - 1)
            rows[r] ^= bit
            cols[c] ^= bit
            boxes[b] ^= bit
            if len(found) >= limit:
                break
        board[i] = 0
        empty[at], empty[k - 1] = empty[k - 1], empty[at]

    search(len(empty))
    return found


def random_grid(h: int, w: int, rng: random.Random) -> list[int]:
    """A random complete grid (randomised backtracking; not exactly uniform)."""
    return solutions([0] * (h * w) ** 2, h, w, limit=1, rng=rng)[0]


def dig(grid: Sequence[int], h: int, w: int, rng: random.Random, clues: int | None = None) -> list[int]:
    """Remove cells in random order while the solution stays unique.

    ``clues=None`` digs until the puzzle is minimal (no clue can be removed); otherwise it stops at that many clues,
    or earlier if the order of digging got stuck above it.
    """
    puzzle, left = list(grid), len(grid)
    for i in rng.sample(range(len(grid)), len(grid)):
        if clues is not None and left <= clues:
            break
        value, puzzle[i] = puzzle[i], 0
        if len(solutions(puzzle, h, w, limit=2)) == 1:
            left -= 1
        else:
            puzzle[i] = value
    return puzzle


def solvable_by_singles(puzzle: Sequence[int], h: int, w: int) -> bool:
    """True if naked and hidden singles alone fill the board: the easier of our two grades."""
    n, unit_of = h * w, units(h, w)
    board, candidates = [0] * (n * n), [set(range(1, n + 1)) for _ in range(n * n)]
    members: list[list[int]] = [[i for i in range(n * n) if unit_of[i][k] == u] for k in range(3) for u in range(n)]

    def place(i: int, v: int) -> None:
        board[i] = v
        candidates[i] = set()
        for k in range(3):
            for j in members[k * n + unit_of[i][k]]:
                candidates[j].discard(v)

    for i, v in enumerate(puzzle):
        if v:
            place(i, int(v))
    while True:
        moves = {i: next(iter(c)) for i, c in enumerate(candidates) if len(c) == 1}
        for unit, v in itertools.product(members, range(1, n + 1)):
            spots = [i for i in unit if v in candidates[i]]
            if len(spots) == 1:
                moves[spots[0]] = v
        if not moves:
            return all(board)
        for i, v in moves.items():
            if v in candidates[i]:
                place(i, v)


# ---------------------------------------------------------------------- symmetry
@cache
def _column_orders(h: int, w: int) -> np.ndarray:
    """(K, n) every order of the columns that keeps stacks together: (n / w)! * (w!) ** (n / w) of them."""
    stacks = [range(s * w, (s + 1) * w) for s in range(h)]
    orders = [
        [c for part in parts for c in part]
        for stack_order in itertools.permutations(stacks)
        for parts in itertools.product(*(itertools.permutations(s) for s in stack_order))
    ]
    return np.array(orders)


def canonical(grid: Sequence[int], h: int, w: int) -> bytes:
    """The least grid, read as a string, that symmetries reach: two grids are equivalent iff these bytes agree.

    Symmetries: relabelling, permutations of bands, of rows in a band, of stacks, of columns in a stack, and
    transposition when the box is square. For each choice of first row and column order the rest is forced: relabel so
    that the first row reads 1..n, then sort rows inside bands and bands by their first column.
    """
    n = h * w
    square = np.asarray(grid, dtype=np.int64).reshape(n, n) - 1
    orders = _column_orders(h, w)
    best: bytes | None = None
    for board in [square, square.T] if h == w else [square]:
        # The second row decides nearly always: rank (first row, column order) pairs by it before doing the rest.
        firsts, seconds, labels = [], [], []
        for r in range(n):
            first = board[r, orders]  # (K, n)
            label = np.empty_like(first)  # (K, n) old digit -> new digit
            np.put_along_axis(label, first, np.broadcast_to(np.arange(n), first.shape), 1)
            mates = [q for q in range(r // h * h, r // h * h + h) if q != r]
            relabelled = np.stack([np.take_along_axis(label, board[q, orders], 1) for q in mates], 1)
            pick = relabelled[:, :, 0].argmin(1)
            firsts.append(np.full(len(orders), r))
            seconds.append(relabelled[np.arange(len(orders)), pick])
            labels.append(label)
        second, first_row, label = np.concatenate(seconds), np.concatenate(firsts), np.concatenate(labels)
        keys = second @ (n ** np.arange(n)[::-1])
        for k in np.flatnonzero(keys == keys.min()):
            r, order = first_row[k], orders[k % len(orders)]
            full = label[k][board[:, order]]  # (n, n) relabelled, columns in order
            bands = [full[b * h : (b + 1) * h] for b in range(n // h)]
            bands = [band[band[:, 0].argsort()] for band in bands]
            own = r // h
            rest = sorted((band for b, band in enumerate(bands) if b != own), key=lambda band: band[0, 0])
            candidate = np.concatenate([bands[own], *rest]).astype(np.uint8).tobytes()
            if best is None or candidate < best:
                best = candidate
    if best is None:
        raise RuntimeError("a grid has at least one arrangement")
    return best


def split_of(grid: Sequence[int], h: int, w: int) -> str:
    """``train``, ``validation`` or ``test``, from a hash of the grid's canonical form.

    All puzzles of all grids that symmetries relate fall in one split. 4x4 has only 2 classes (288 grids), so there the
    hash is of the grid itself and no symmetry is used in training.
    """
    key = bytes(int(v) for v in grid) if (h, w) == (2, 2) else canonical(grid, h, w)
    byte = hashlib.sha256(key).digest()[0]
    return "test" if byte < 40 else "validation" if byte < 64 else "train"


# ---------------------------------------------------------------------- users' files
@dataclass(frozen=True)
class PuzzleFile:
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
    n = h * w
    digits = {str(v): v for v in range(n + 1)} | {".": 0}

    def fail(line: int, why: str) -> PuzzleFileError:
        return PuzzleFileError(f"{path}, line {line}: {why}")

    def parse(text: str, line: int, what: str) -> list[int]:
        if len(text) != n * n:
            raise fail(line, f"the {what} has {len(text)} characters; a {n}x{n} board has {n * n}")
        wrong = sorted(set(text) - digits.keys())
        if wrong:
            raise fail(line, f"the {what} has {wrong[0]!r}; allowed are 1-{n}, and 0 or '.' for a blank")
        return [digits[c] for c in text]

    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PuzzleFileError(f"{path}: cannot be read as a text file ({error})") from None
    header = [cell.strip().lower() for cell in lines[0]] if lines else []
    if header not in (["puzzle"], ["puzzle", "solution"]):
        raise fail(1, "the header must be 'Puzzle,Solution' or 'Puzzle'")
    puzzles, answers = [], []
    for number, cells in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) > len(header):
            raise fail(number, f"{len(cells)} columns; the header has {len(header)}")
        puzzle = parse(cells[0].strip(), number, "puzzle")
        given = cells[1].strip() if len(cells) > 1 else ""
        unit_of = units(h, w)
        for k, kind in enumerate(("row", "column", "box")):
            seen: set[tuple[int, int]] = set()
            for i, v in enumerate(puzzle):
                if v and (unit_of[i][k], v) in seen:
                    raise fail(number, f"illegal clue: digit {v} twice in {kind} {unit_of[i][k] + 1}")
                seen.add((unit_of[i][k], v))
        if all(puzzle):
            raise fail(number, "the puzzle has no blank")
        if given:
            answer = parse(given, number, "solution")
            if 0 in answer or not solutions(answer, h, w, limit=1):
                raise fail(number, "the solution is not a complete legal board")
            if any(p and p != a for p, a in zip(puzzle, answer, strict=True)):
                raise fail(number, "the solution contradicts a clue")
        else:
            found = solutions(puzzle, h, w, limit=1)
            if not found:
                raise fail(number, "the puzzle has no solution")
            answer = found[0]
        puzzles.append(puzzle)
        answers.append(answer)
    if not puzzles:
        raise PuzzleFileError(f"{path}: no puzzle after the header")
    return PuzzleFile(np.array(puzzles, np.uint8), np.array(answers, np.uint8))
