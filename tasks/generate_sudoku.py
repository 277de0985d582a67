"""Makes the packaged Sudoku files: ``python -m tasks.generate_sudoku sudoku4 sudoku6 sudoku9 --seed 0``."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tasks.sudoku import BOXES
from tasks.sudoku_solver import dig, random_grid, solvable_by_singles, split_of
from tasks.task import DATA

COUNTS = {  # grids to train denoisers on; puzzles to train policies on; puzzles per held-out split
    "sudoku4": {"grids": 230, "train": 4000, "validation": 1000, "test": 2000},
    "sudoku6": {"grids": 5000, "train": 8000, "validation": 2000, "test": 2000},
    "sudoku9": {"grids": 10000, "train": 3000, "validation": 400, "test": 4000},
}
BALANCED = {"sudoku6": "train", "sudoku9": "test"}
SHUFFLED = BALANCED | {"sudoku4": "test"}  # so that the first puzzles of the split are like the others


def build(name: str, seed: int, log: Callable[[str], None] = print) -> dict[str, np.ndarray]:
    """The arrays of one packaged file: ``train_grids`` and, per split, minimal ``puzzles``, ``solutions``, ``singles``.

    Two splits hold as many easy puzzles (solvable by singles) as hard ones: the training puzzles of 6x6, where
    only 7 % of minimal puzzles need more than singles and those are what an order is learned from, and the test
    puzzles of 9x9, which are reported by difficulty. All others are minimal puzzles as they come.
    """
    h, w = BOXES[name]
    want, rng = COUNTS[name], random.Random(f"{name}-{seed}")
    balanced, shuffled = BALANCED.get(name), SHUFFLED[name]
    grids: set[tuple[int, ...]] = set()
    seen: set[tuple[int, ...]] = set()
    puzzles: dict[str, list] = {"train": [], "validation": [], "test": []}
    stale = 0
    while stale < 3000 and (len(grids) < want["grids"] or any(len(p) < want[s] for s, p in puzzles.items())):
        grid = random_grid(h, w, rng)
        split = split_of(grid, h, w)
        stale += 1
        if split == "train" and len(grids) < want["grids"] and tuple(grid) not in grids:
            grids.add(tuple(grid))
            stale = 0
        if len(puzzles[split]) >= want[split]:
            continue
        puzzle = dig(grid, h, w, rng)
        if tuple(puzzle) in seen:
            continue
        singles = solvable_by_singles(puzzle, h, w)
        if split == balanced and sum(s == singles for *_, s in puzzles[split]) >= want[split] // 2:
            continue
        seen.add(tuple(puzzle))
        puzzles[split].append((puzzle, grid, singles))
        stale = 0
        if len(seen) % 1000 == 0:
            log(f"{name}: {len(grids)} grids, " + ", ".join(f"{s} {len(p)}" for s, p in puzzles.items()))
    arrays = {"train_grids": np.array(sorted(grids), np.uint8)}
    for split, rows in puzzles.items():
        if split == shuffled:
            rng.shuffle(rows)
        arrays[f"{split}_puzzles"] = np.array([p for p, _, _ in rows], np.uint8)
        arrays[f"{split}_solutions"] = np.array([g for _, g, _ in rows], np.uint8)
        arrays[f"{split}_singles"] = np.array([s for _, _, s in rows], bool)
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate the packaged Sudoku files.")
    parser.add_argument("names", nargs="+", choices=sorted(BOXES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DATA)
    args = parser.parse_args()
    for name in args.names:
        arrays = build(name, args.seed)
        np.savez_compressed(args.out / f"{name}.npz", **arrays)
        print(name, {key: value.shape for key, value in arrays.items()})


if __name__ == "__main__":
    main()
