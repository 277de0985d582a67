"""Sudoku without a network: solving, generating with proved uniqueness, canonical forms.

Boards are flat arrays of ``n * n`` integers, 0 for a blank, with boxes of ``h`` rows by ``w`` columns, ``n = h * w``.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence
from functools import cache

import numpy as np

from tasks.errors import UnmaskError


@cache
def units(h: int, w: int) -> tuple[tuple[int, int, int], ...]:
    """(row, column, box) of every cell."""
    n = h * w
    return tuple((i // n, i % n, (i // n) // h * h + (i % n) // w) for i in range(n * n))


@cache
def _slots(h: int, w: int) -> tuple[tuple[int, int, int], ...]:
    """:func:`units`, counted through: rows, then columns, then boxes."""
    n = h * w
    return tuple((r, n + c, 2 * n + b) for r, c, b in units(h, w))


class BudgetError(UnmaskError):
    """A board took more of the solver's time than it was given."""


def _digits_used(board: list[int], slots: Sequence[tuple[int, int, int]], units: int) -> list[int] | None:
    """Per row, column and box: the digits in it, as a set of bits. None: a digit stands there twice."""
    used = [0] * units
    for i, v in enumerate(board):
        if v:
            (r, c, b), bit = slots[i], 1 << v - 1
            if (used[r] | used[c] | used[b]) & bit:
                return None
            used[r] |= bit
            used[c] |= bit
            used[b] |= bit
    return used


def _single_place(cells: list[tuple[int, int, int]], used: list[int], full: int) -> tuple[int, int, int] | None:
    """A digit with one place in a unit: 1 candidate, its bit, and which of the empty ``cells``, given by their units. 0
    candidates if one has no place; None if there is no such digit."""
    once, twice = [0] * len(used), [0] * len(used)
    candidates = []
    for r, c, b in cells:
        free = full & ~(used[r] | used[c] | used[b])
        candidates.append(free)
        for slot in (r, c, b):
            twice[slot] |= once[slot] & free
            once[slot] |= free
    if any(full & ~digits & ~places for digits, places in zip(used, once, strict=True)):
        return 0, 0, 0
    for j, cell in enumerate(cells):
        for slot in cell:
            alone = candidates[j] & once[slot] & ~twice[slot]
            if alone:
                return 1, alone & -alone, j
    return None


def solve(
    puzzle: Sequence[int], h: int, w: int, limit: int = 2, rng: random.Random | None = None, budget: int | None = None
) -> list[list[int]]:
    """Up to ``limit`` solutions by backtracking on the most constrained cell; one found with limit 2 proves it unique.

    Args:
        rng: tries digits in random order, which makes the first solution of an empty board a random grid.
        budget: positions to try; with one, a digit that has a single place in a unit is filled in first, too.

    Raises:
        BudgetError: the budget is spent.
    """
    n = h * w
    full = (1 << n) - 1
    slots = _slots(h, w)  # of each cell, in ``used``
    board = [int(v) for v in puzzle]
    used = _digits_used(board, slots, 3 * n)
    if used is None:
        return []
    empty = [i for i, v in enumerate(board) if not v]
    solutions: list[list[int]] = []
    tried = 0

    def search(k: int) -> None:
        """Fill the first ``k`` cells of ``empty`` in all ways that the others allow."""
        nonlocal tried
        tried += 1
        if budget is not None and tried > budget:
            raise BudgetError(f"not solved after {budget} positions")
        if k == 0:
            solutions.append(board.copy())
            return
        fewest, best, at = n + 1, 0, 0
        for j in range(k):
            r, c, b = slots[empty[j]]
            free = full & ~(used[r] | used[c] | used[b])
            size = free.bit_count()
            if size < fewest:
                fewest, best, at = size, free, j
                if size < 2:
                    break
        if fewest > 1 and budget is not None:
            fewest, best, at = _single_place([slots[i] for i in empty[:k]], used, full) or (fewest, best, at)
        if fewest == 0:
            return
        empty[at], empty[k - 1] = empty[k - 1], empty[at]
        i = empty[k - 1]
        values = [v for v in range(n) if best >> v & 1]
        if rng is not None:
            rng.shuffle(values)
        r, c, b = slots[i]
        for v in values:
            bit = 1 << v
            used[r] ^= bit
            used[c] ^= bit
            used[b] ^= bit
            board[i] = v + 1
            search(k - 1)
            used[r] ^= bit
            used[c] ^= bit
            used[b] ^= bit
            if len(solutions) >= limit:
                break
        board[i] = 0
        empty[at], empty[k - 1] = empty[k - 1], empty[at]

    search(len(empty))
    return solutions


def random_grid(h: int, w: int, rng: random.Random) -> list[int]:
    """A random complete grid (randomised backtracking; not exactly uniform)."""
    return solve([0] * (h * w) ** 2, h, w, limit=1, rng=rng)[0]


def dig(grid: Sequence[int], h: int, w: int, rng: random.Random, clues: int | None = None) -> list[int]:
    """Remove cells in random order while the solution stays unique.

    ``clues=None`` digs until the puzzle is minimal (no clue can be removed); otherwise it stops at that many clues,
    or earlier where no further clue can be removed.
    """
    puzzle, left = list(grid), len(grid)
    for i in rng.sample(range(len(grid)), len(grid)):
        if clues is not None and left <= clues:
            break
        value, puzzle[i] = puzzle[i], 0
        if len(solve(puzzle, h, w, limit=2)) == 1:
            left -= 1
        else:
            puzzle[i] = value
    return puzzle


def solvable_by_singles(puzzle: Sequence[int], h: int, w: int) -> bool:
    """True if naked and hidden singles alone fill the board: what makes a puzzle easy."""
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
            rest = sorted((band for b, band in enumerate(bands) if b != r // h), key=lambda band: band[0, 0])
            candidate = np.concatenate([bands[r // h], *rest]).astype(np.uint8).tobytes()
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
