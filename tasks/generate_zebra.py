"""Zebra puzzles (Einstein's riddle): draws solvable sets of clues, and writes the packaged files.

    python -m tasks.generate_zebra --houses 3 4

H houses stand in a row; each of A attributes has H values, one per house. Every solution is the same up to renaming
values, so puzzles are kept with value v of every attribute in house v, and :class:`tasks.Zebra` renames them. A clue is
(relation, attribute, value, attribute, value); of ``at`` the last two are (0, house).
"""

from __future__ import annotations

import argparse
import itertools
from bisect import bisect_left
from functools import cache

import numpy as np

from tasks.task import DATA
from tasks.zebra import MAX_CLUES, RELATIONS

WEIGHTS = {"at": 0.5, "same": 2.0, "different": 0.5, "left": 1.5, "next": 2.0}  # how early a kind of clue is tried
Clue = tuple[int, int, int, int, int]


def holds(relation: str, first: int, second: int) -> bool:
    """Whether two things in these houses (of ``at``: a thing's house and the named one) satisfy the relation."""
    return {
        "at": first == second,
        "same": first == second,
        "different": first != second,
        "left": first + 1 == second,
        "next": abs(first - second) == 1,
    }[relation]


def true_clues(houses: int, attributes: int) -> list[Clue]:
    """Every clue that is true where value v of each attribute is in house v."""
    things = list(itertools.product(range(attributes), range(houses)))
    clues: list[Clue] = [(RELATIONS.index("at"), a, v, 0, v) for a, v in things]
    for (a, v), (b, w) in itertools.permutations(things, 2):
        for number, relation in enumerate(RELATIONS[1:], 1):
            if a == b and relation in ("same", "different"):
                continue  # true of all puzzles, or of none
            if relation != "left" and (a, v) > (b, w):
                continue  # it says the same the other way round
            if holds(relation, v, w):
                clues.append((number, a, v, b, w))
    return clues


@cache
def permutations(houses: int) -> np.ndarray:
    """(H!, H) the house of each value."""
    return np.array(list(itertools.permutations(range(houses))))


@cache
def allowed(clue: Clue, houses: int) -> tuple[int, int, tuple[int, ...]]:
    """The clue as a relation between the arrangements of two attributes a <= b: bit sets of b's, one per arrangement
    of a. A clue about one attribute alone allows an arrangement all of b's or none."""
    number, a, v, b, w = clue
    relation, orders = RELATIONS[number], permutations(houses)
    first = orders[:, v]
    if relation == "at":
        b, second, square = a, np.full(len(orders), w), False
    else:
        second, square = orders[:, w], a != b
    if not square:
        fits = np.array([holds(relation, int(x), int(y)) for x, y in zip(first, second, strict=True)])
        every = (1 << len(orders)) - 1
        return a, a, tuple(every if fit else 0 for fit in fits)
    table = np.array([[holds(relation, x, y) for y in range(houses)] for x in range(houses)])
    fits = table[first[:, None], second[None, :]]
    if a > b:
        a, b, fits = b, a, fits.T
    rows = [sum(1 << int(j) for j in np.flatnonzero(row)) for row in fits]
    return a, b, tuple(rows)


def count_solutions(clues: list[Clue], houses: int, attributes: int, limit: int = 2) -> int:
    """How many arrangements satisfy the clues, at most ``limit``."""
    many = len(permutations(houses))
    every = (1 << many) - 1
    tables: dict[tuple[int, int], list[int]] = {}
    own = [every] * attributes
    for clue in clues:
        a, b, rows = allowed(clue, houses)
        if a == b:
            own[a] &= sum(1 << i for i, row in enumerate(rows) if row)
        else:
            known = tables.setdefault((a, b), [every] * many)
            tables[a, b] = [x & y for x, y in zip(known, rows, strict=True)]

    def search(attribute: int, left: tuple[int, ...], found: int) -> int:
        if attribute == attributes:
            return found + 1
        choices = left[attribute]
        while choices and found < limit:
            lowest = choices & -choices
            choices ^= lowest
            i = lowest.bit_length() - 1
            after = tuple(
                mask & tables[attribute, b][i] if (attribute, b) in tables else mask for b, mask in enumerate(left)
            )
            if all(after[attribute + 1 :]):
                found = search(attribute + 1, after, found)
        return found

    return search(0, tuple(own), 0)


def minimal_clues(houses: int, attributes: int, rng: np.random.Generator) -> list[Clue]:
    """A random set of clues with exactly one solution, none of which can be left out."""
    clues = true_clues(houses, attributes)
    speed = np.array([WEIGHTS[RELATIONS[clue[0]]] for clue in clues])
    order = np.argsort(rng.exponential(size=len(clues)) / speed)  # in proportion to the weights
    shuffled = [clues[i] for i in order]

    def unique(clues: list[Clue]) -> bool:
        return count_solutions(clues, houses, attributes) == 1

    high = 4 * houses * attributes
    while not unique(shuffled[:high]):
        high *= 2
    kept = shuffled[: bisect_left(range(high), True, lo=1, key=lambda k: unique(shuffled[:k]))]  # the shortest prefix
    for clue in list(kept):
        without = [other for other in kept if other != clue]
        if unique(without):
            kept = without
    return kept


def generate(
    houses: int, attributes: int, puzzles: int, max_clues: int, rng: np.random.Generator, known: set[tuple[Clue, ...]]
) -> np.ndarray:
    """(puzzles, max_clues, 5) int8 sets of clues, -1 behind the last; none of ``known``, which they are added to."""
    sets = np.full((puzzles, max_clues, 5), -1, dtype=np.int8)
    for row in sets:
        clues = minimal_clues(houses, attributes, rng)
        while len(clues) > max_clues or tuple(sorted(clues)) in known:
            clues = minimal_clues(houses, attributes, rng)
        known.add(tuple(sorted(clues)))
        row[: len(clues)] = clues
    return sets


SIZES = {"validation": 1000, "test": 2000, "train": 20_000}
FEWER = {5: 4}  # the larger, the longer they take: as many times fewer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--houses", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for houses in args.houses:
        rng, known = np.random.default_rng([args.seed, houses]), set()
        sizes = {split: n // FEWER.get(houses, 1) for split, n in SIZES.items()}
        files = {split: generate(houses, houses, n, MAX_CLUES[houses], rng, known) for split, n in sizes.items()}
        np.savez_compressed(DATA / f"zebra{houses}.npz", **files)
        print(f"zebra{houses}: " + ", ".join(f"{len(clues):,} {split}" for split, clues in files.items()))


if __name__ == "__main__":
    main()
