"""Sudoku: the solver and the symmetries by exhaustion, the packaged files by proof, the metrics by hand."""

import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import tasks
from tasks import Instances, Sudoku, UnknownNameError, UnmaskError
from tasks.sudoku import BOXES
from tasks.sudoku_solver import canonical, dig, random_grid, solvable_by_singles, solve, split_of, units
from tasks.task import DATA

NAMES = list(BOXES)
SPLITS = ("train", "validation", "test")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def files() -> dict[str, dict[str, np.ndarray]]:
    """The packaged arrays, by task name."""
    loaded = {}
    for name in NAMES:
        with np.load(DATA / f"{name}.npz", allow_pickle=False) as arrays:
            loaded[name] = {key: arrays[key] for key in arrays.files}
    return loaded


def legal(board: np.ndarray, h: int, w: int) -> bool:
    """Whether a complete board obeys the rules, checked with slices instead of the package's ``units``."""
    n, square = h * w, np.asarray(board).reshape(h * w, h * w)
    want = set(range(1, n + 1))
    boxes = [square[r : r + h, c : c + w].ravel() for r in range(0, n, h) for c in range(0, n, w)]
    return all(set(map(int, unit)) == want for unit in [*square, *square.T, *boxes])


@pytest.fixture(scope="module")
def all_4x4() -> list[tuple[int, ...]]:
    """Every legal 4x4 grid, from all 24^4 stacks of row permutations: no solver involved."""
    rows = list(itertools.permutations(range(1, 5)))
    pairs = [(a, b) for a in rows for b in rows if {*a[:2], *b[:2]} == {1, 2, 3, 4} == {*a[2:], *b[2:]}]
    return [
        (*top, *upper, *lower, *bottom)
        for top, upper in pairs
        for lower, bottom in pairs
        if all(len(set(column)) == 4 for column in zip(top, upper, lower, bottom, strict=True))
    ]


# ---------------------------------------------------------------------- solving
def test_the_solver_finds_exactly_the_288_grids(all_4x4):
    found = solve([0] * 16, 2, 2, limit=1000)
    assert len(found) == 288
    assert {tuple(grid) for grid in found} == set(all_4x4)
    assert len(all_4x4) == 288


def test_the_solver_agrees_with_brute_force_on_random_4x4_puzzles(all_4x4):
    rng = random.Random(0)
    counts = Counter()
    for _ in range(200):
        puzzle = [v if rng.random() < 0.25 else 0 for v in rng.choice(all_4x4)]
        if rng.random() < 0.3:  # a clue at random, often one that contradicts the rest
            puzzle[rng.randrange(16)] = rng.randint(1, 4)
        brute = {grid for grid in all_4x4 if all(p in (0, v) for p, v in zip(puzzle, grid, strict=True))}
        found = solve(puzzle, 2, 2, limit=1000)
        assert len(found) == len(brute)
        assert {tuple(grid) for grid in found} == brute
        assert len(solve(puzzle, 2, 2, limit=2)) == min(2, len(brute))
        counts[min(2, len(brute))] += 1
    assert min(counts[k] for k in range(3)) >= 5, "all three cases (none, one, several solutions) must occur"


def test_the_solver_leaves_its_argument_alone():
    puzzle = [1] + [0] * 15
    solve(puzzle, 2, 2, limit=3)
    assert puzzle == [1] + [0] * 15


@pytest.mark.parametrize("name", NAMES)
def test_units_are_rows_columns_and_boxes(name):
    h, w = BOXES[name]
    n = h * w
    boxes = np.arange(n).reshape(n // h, n // w).repeat(h, 0).repeat(w, 1)
    rows, columns = np.indices((n, n))
    expected = np.stack([rows, columns, boxes], -1).reshape(-1, 3)
    np.testing.assert_array_equal(np.array(units(h, w)), expected)
    np.testing.assert_array_equal(tasks.get(name).coordinates.numpy(), expected)


def test_random_grids_are_legal_varied_and_follow_their_generator():
    for name in NAMES:
        h, w = BOXES[name]
        grids = [random_grid(h, w, random.Random(seed)) for seed in range(5)]
        assert all(legal(grid, h, w) for grid in grids)
        assert len({tuple(grid) for grid in grids}) == 5
        assert grids[0] == random_grid(h, w, random.Random(0))


# ---------------------------------------------------------------------- digging
def assert_minimal(puzzle: list[int], h: int, w: int) -> None:
    for i, v in enumerate(puzzle):
        if v:
            fewer = [*puzzle[:i], 0, *puzzle[i + 1 :]]
            assert len(solve(fewer, h, w, limit=2)) == 2, f"clue {i} can be removed"


@pytest.mark.parametrize(("name", "count"), [("sudoku4", 10), ("sudoku6", 8), ("sudoku9", 2)])
def test_dug_puzzles_are_unique_and_minimal(name, count):
    (h, w), rng = BOXES[name], random.Random(1)
    for _ in range(count):
        grid = random_grid(h, w, rng)
        puzzle = dig(grid, h, w, rng)
        assert solve(puzzle, h, w, limit=2) == [grid]
        assert_minimal(puzzle, h, w)


@pytest.mark.parametrize(("name", "clues"), [("sudoku4", 8), ("sudoku6", 20), ("sudoku9", 40)])
def test_digging_stops_at_the_asked_number_of_clues(name, clues):
    (h, w), rng = BOXES[name], random.Random(2)
    for _ in range(5):
        grid = random_grid(h, w, rng)
        puzzle = dig(grid, h, w, rng, clues=clues)
        assert sum(v > 0 for v in puzzle) == clues
        assert solve(puzzle, h, w, limit=2) == [grid]


def test_digging_below_the_least_number_of_clues_still_gives_a_minimal_puzzle():
    rng = random.Random(3)
    grid = random_grid(2, 2, rng)
    puzzle = dig(grid, 2, 2, rng, clues=1)
    assert sum(v > 0 for v in puzzle) >= 4, "no 4x4 puzzle with fewer than 4 clues is unique"
    assert_minimal(puzzle, 2, 2)


def test_puzzles_that_singles_solve_by_hand(files):
    grid = [1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]
    assert solvable_by_singles([0, *grid[1:]], 2, 2)
    assert not solvable_by_singles([0] * 16, 2, 2)
    two_ways = [0, 0, 3, 4, 3, 4, 1, 2, 0, 0, 4, 3, 4, 3, 2, 1]  # 1 and 2 can swap in four cells
    assert not solvable_by_singles(two_ways, 2, 2)
    for name, arrays in files.items():
        for split in SPLITS:
            for puzzle, flag in zip(arrays[f"{split}_puzzles"][:15], arrays[f"{split}_singles"][:15], strict=True):
                assert solvable_by_singles(puzzle, *BOXES[name]) == flag


# ---------------------------------------------------------------------- symmetry
def moves(h: int, w: int) -> dict[str, object]:
    """Hand-written symmetries of an (n, n) array: each takes (square, rng)."""

    def rows_in_a_band(square, rng):
        order = np.arange(h * w)
        start = rng.randrange(w) * h
        order[start : start + h] = rng.sample(range(start, start + h), h)
        return square[order]

    def bands(square, rng):
        return np.concatenate([square[b * h : (b + 1) * h] for b in rng.sample(range(w), w)])

    def columns_in_a_stack(square, rng):
        order = np.arange(h * w)
        start = rng.randrange(h) * w
        order[start : start + w] = rng.sample(range(start, start + w), w)
        return square[:, order]

    def stacks(square, rng):
        return np.concatenate([square[:, s * w : (s + 1) * w] for s in rng.sample(range(h), h)], 1)

    def digits(square, rng):
        return np.array(rng.sample(range(1, h * w + 1), h * w))[square - 1]

    named = {f.__name__: f for f in (rows_in_a_band, bands, columns_in_a_stack, stacks, digits)}
    if h == w:
        named["transpose"] = lambda square, rng: square.T
    return named


@pytest.mark.parametrize("name", NAMES)
def test_the_canonical_form_is_invariant_under_each_kind_of_move(name):
    (h, w), rng = BOXES[name], random.Random(4)
    for _ in range(3):
        square = np.array(random_grid(h, w, rng)).reshape(h * w, h * w)
        form = canonical(square.ravel(), h, w)
        mixed = square
        for what, move in moves(h, w).items():
            moved = move(square, rng)
            assert legal(moved, h, w)
            assert canonical(moved.ravel(), h, w) == form, what
            mixed = move(mixed, rng)
        assert canonical(mixed.ravel(), h, w) == form, "all moves together"


@pytest.mark.parametrize("name", NAMES)
def test_the_canonical_form_is_a_member_of_its_class_and_a_fixed_point(name):
    h, w = BOXES[name]
    form = canonical(random_grid(h, w, random.Random(5)), h, w)
    grid = np.frombuffer(form, np.uint8).astype(int) + 1
    assert legal(grid, h, w)
    assert canonical(grid, h, w) == form
    assert list(form[: h * w]) == list(range(h * w))


@pytest.mark.parametrize(("name", "draws"), [("sudoku4", 40), ("sudoku6", 40), ("sudoku9", 20)])
def test_the_canonical_form_is_invariant_under_random_symmetries(name, draws, files):
    task = tasks.get(name)
    row = task._encode(torch.from_numpy(files[name]["train_grids"][:1]))
    moved = task.random_symmetry([row.repeat(draws, 1)], generator(1))[0].numpy() + 1
    form = canonical(row[0].numpy() + 1, *task.box)
    assert len({grid.tobytes() for grid in moved}) > draws // 2
    for grid in moved:
        assert canonical(grid, *task.box) == form


def test_4x4_has_two_classes_and_a_random_symmetry_reaches_every_member(all_4x4):
    classes: dict[bytes, set[tuple[int, ...]]] = {}
    for grid in all_4x4:
        classes.setdefault(canonical(grid, 2, 2), set()).add(grid)
    assert sorted(len(members) for members in classes.values()) == [96, 192]  # known: 288 = 96 + 192
    for members in classes.values():
        row = torch.tensor([min(members)]) - 1
        moved = Sudoku(2, 2).random_symmetry([row.repeat(6000, 1)], generator(2))[0] + 1
        counts = Counter(map(tuple, moved.tolist()))
        assert set(counts) == members
        expected = 6000 / len(members)  # uniform over the class: every count within 6 standard deviations
        assert max(abs(c - expected) for c in counts.values()) < 6 * expected**0.5


@pytest.fixture(scope="module")
def classes_6x6() -> dict[bytes, bytes]:
    """Normal form -> canonical form for all 6x6 grids (see ``normal_form_6x6``)."""
    start = [1, 2, 3, 4, 5, 6, 4, 5, 6, *[0] * 27]
    grids = solve(start, 2, 3, limit=10**5)
    # Relabelling (6!) and the order of row 2's first three (3!) reach every grid: 28,200,960 of them are known.
    assert len(grids) * 720 * 6 == 28_200_960
    return {form: canonical(list(form), 2, 3) for form in {normal_form_6x6(grid) for grid in grids}}


def normal_form_6x6(grid: list[int]) -> bytes:
    """An equivalent grid with first row 123456, second row 456..., sorted rows and bands: cheap, not canonical."""
    square = np.asarray(grid).reshape(6, 6)
    first, second = square[0].tolist(), square[1].tolist()
    square = square[:, [0, 1, 2, *(first.index(v) for v in second[:3])]]
    label = np.zeros(7, np.uint8)
    label[square[0]] = range(1, 7)
    square = label[square]
    bands = sorted((square[b : b + 2][square[b : b + 2, 0].argsort()] for b in (2, 4)), key=lambda band: band[0, 0])
    return np.concatenate([square[:2], *bands]).tobytes()


def test_6x6_has_its_known_49_classes(classes_6x6):
    assert len(set(classes_6x6.values())) == 49


def test_9x9_grids_that_are_not_equivalent_differ():
    """A cyclic grid and one with two rows of different bands exchanged differ in how many 2x2 swaps they allow."""
    h = w = 3
    cyclic = np.array([[(3 * r + r // 3 + c) % 9 + 1 for c in range(9)] for r in range(9)])
    other = np.array(random_grid(h, w, random.Random(6))).reshape(9, 9)

    def swaps(square: np.ndarray) -> int:  # an invariant: pairs of rows and of columns with the same two digits
        return sum(
            {square[r, a], square[r, b]} == {square[s, a], square[s, b]}
            for r, s in itertools.combinations(range(9), 2)
            for a, b in itertools.combinations(range(9), 2)
        )

    assert legal(cyclic, h, w)
    assert legal(other, h, w)
    assert swaps(cyclic) != swaps(other)
    assert canonical(cyclic.ravel(), h, w) != canonical(other.ravel(), h, w)


@pytest.mark.parametrize("name", NAMES)
def test_random_symmetry_keeps_boards_legal_and_puzzles_with_their_answers(name):
    task = tasks.get(name)
    before = task.heldout(50)
    tokens, answers = task.random_symmetry([before.tokens, before.answers], generator(3))
    hole = tokens == task.mask_id
    assert torch.equal(tokens[~hole], answers[~hole])
    assert torch.equal(hole.sum(1), (before.tokens == task.mask_id).sum(1))
    assert all(legal(grid + 1, *task.box) for grid in answers.numpy())
    assert not torch.equal(answers, before.answers)
    again = task.random_symmetry([before.tokens, before.answers], generator(3))
    assert torch.equal(tokens, again[0])
    assert torch.equal(answers, again[1])
    other = task.random_symmetry([before.answers], generator(4))[0]
    assert not torch.equal(answers, other)


# ---------------------------------------------------------------------- packaged files
@pytest.mark.parametrize("name", NAMES)
def test_packaged_puzzles_belong_to_their_solutions(name, files):
    arrays, n = files[name], BOXES[name][0] * BOXES[name][1]
    seen: set[bytes] = set()
    for split in SPLITS:
        puzzles, answers = arrays[f"{split}_puzzles"], arrays[f"{split}_solutions"]
        assert puzzles.shape == answers.shape == (len(arrays[f"{split}_singles"]), n * n)
        assert ((puzzles == 0) | (puzzles == answers)).all()
        assert (puzzles == 0).any(1).all()
        assert all(legal(grid, *BOXES[name]) for grid in answers[:200])
        task = tasks.get(name)
        instances = task.heldout(split=split)
        assert task.valid(instances.answers, instances).all()
        assert torch.equal(instances.answers, torch.from_numpy(answers).long() - 1)
        rows = {row.tobytes() for row in puzzles}
        assert len(rows) == len(puzzles), "no puzzle occurs twice"
        assert not rows & seen, "no puzzle is in two splits"
        seen |= rows
    grids = arrays["train_grids"]
    assert len({row.tobytes() for row in grids}) == len(grids)
    assert all(legal(grid, *BOXES[name]) for grid in grids[:: len(grids) // 200])


@pytest.mark.parametrize(("name", "count"), [("sudoku4", 60), ("sudoku6", 40), ("sudoku9", 6)])
def test_a_sample_of_packaged_puzzles_is_unique_and_minimal(name, count, files):
    h, w = BOXES[name]
    for split in SPLITS:
        puzzles, answers = files[name][f"{split}_puzzles"], files[name][f"{split}_solutions"]
        for i in random.Random(7).sample(range(len(puzzles)), count // 3):
            assert solve(puzzles[i], h, w, limit=2) == [answers[i].tolist()]
            assert_minimal(puzzles[i].tolist(), h, w)


@pytest.mark.parametrize(("name", "count"), [("sudoku4", 300), ("sudoku6", 60), ("sudoku9", 15)])
def test_a_sample_of_packaged_grids_is_in_the_split_of_its_class(name, count, files):
    rng = random.Random(8)
    for key, split in [("train_grids", "train"), *((f"{s}_solutions", s) for s in SPLITS)]:
        for grid in rng.sample(list(files[name][key]), min(count, len(files[name][key]))):
            assert split_of(grid, *BOXES[name]) == split
    puzzle_grid = list(files[name]["test_solutions"][0])
    assert split_of([int(v) for v in puzzle_grid], *BOXES[name]) == "test", "lists and arrays agree"


def test_no_4x4_grid_is_in_two_splits(files):
    sets = {split: {row.tobytes() for row in files["sudoku4"][f"{split}_solutions"]} for split in SPLITS}
    sets["train"] |= {row.tobytes() for row in files["sudoku4"]["train_grids"]}
    assert sum(len(members) for members in sets.values()) == len(set().union(*sets.values())) <= 288
    assert not tasks.get("sudoku4").symmetric
    train = tasks.get("sudoku4").clean(500, generator()) + 1
    assert {row.astype(np.uint8).tobytes() for row in train.numpy()} <= sets["train"]


def test_no_6x6_class_is_in_two_splits(files, classes_6x6):
    sets = {}
    for split in SPLITS:
        grids = list(files["sudoku6"][f"{split}_solutions"])
        if split == "train":
            grids += list(files["sudoku6"]["train_grids"])
        sets[split] = {classes_6x6[normal_form_6x6(grid)] for grid in grids}
    assert all(sets.values())
    for one, other in itertools.combinations(SPLITS, 2):
        assert not sets[one] & sets[other]


def test_no_9x9_class_of_a_sample_is_in_two_splits(files):
    arrays, rng = files["sudoku9"], random.Random(9)
    train = {canonical(grid, 3, 3) for grid in rng.sample(list(arrays["train_grids"]), 40)}
    held = {canonical(g, 3, 3) for s in SPLITS[1:] for g in rng.sample(list(arrays[f"{s}_solutions"]), 20)}
    assert len(train) >= 39, "9x9 classes hardly ever repeat"
    assert not train & held


@pytest.mark.parametrize(("name", "split"), [("sudoku9", "test"), ("sudoku6", "train")])
def test_balanced_splits_hold_as_many_easy_puzzles_as_hard_ones(name, split, files):
    singles = torch.from_numpy(files[name][f"{split}_singles"])
    assert singles.sum() * 2 == len(singles)
    task = tasks.get(name)
    both = task.heldout(split=split)
    for difficulty, solvable in (("easy", True), ("hard", False)):
        chosen = task.heldout(50, split, difficulty)
        assert torch.equal(chosen.tokens, both.tokens[singles == solvable][:50])
        if split == "test":
            assert torch.equal(task.select(50, difficulty=difficulty).tokens, chosen.tokens)


# ---------------------------------------------------------------------- drawing instances
@pytest.mark.parametrize("name", NAMES)
def test_samples_are_legal_puzzles_and_follow_their_generator(name):
    task = tasks.get(name)
    one, same, other = (task.sample(64, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.tokens, same.tokens)
    assert torch.equal(one.answers, same.answers)
    assert not torch.equal(one.tokens, other.tokens)
    hole = one.tokens == task.mask_id
    assert hole.any(1).all()
    assert torch.equal(one.tokens[~hole], one.answers[~hole])
    assert task.valid(one.answers, one).all()
    clean = task.clean(64, generator(2))
    assert clean.shape == (64, task.length)
    assert all(legal(grid + 1, *task.box) for grid in clean.numpy())
    assert torch.equal(clean, task.clean(64, generator(2)))


def rows(boards) -> set[bytes]:
    return {bytes(row) for row in boards}


@pytest.mark.parametrize("name", ["sudoku6", "sudoku9"])
def test_training_puzzles_and_grids_are_drawn_under_symmetries(name, files):
    """Hardly one is as the file has it, and each is equivalent to one that the file has."""
    task, arrays = tasks.get(name), files[name]
    puzzles, grids = task.sample(300, generator(0)), task.clean(300, generator(0)) + 1
    shown = torch.where(puzzles.tokens == task.mask_id, 0, puzzles.tokens + 1)
    for drawn, packaged in (
        (shown, arrays["train_puzzles"]),
        (puzzles.answers + 1, arrays["train_solutions"]),
        (grids, arrays["train_grids"]),
    ):
        assert len(rows(drawn.tolist()) & rows(packaged.tolist())) <= 3
    draws = torch.randint(len(arrays["train_puzzles"]), (300,), generator=generator(0))  # the first that sample draws
    for i in range(3):
        solution = arrays["train_solutions"][draws[i]]
        assert canonical((puzzles.answers[i] + 1).tolist(), *task.box) == canonical(solution.tolist(), *task.box)


def test_4x4_shows_its_training_grids_as_they_are(files):
    """Symmetries would carry them into the held-out ones."""
    task, arrays = tasks.get("sudoku4"), files["sudoku4"]
    assert rows((task.sample(300, generator(0)).answers + 1).tolist()) <= rows(arrays["train_solutions"].tolist())
    assert rows((task.clean(300, generator(0)) + 1).tolist()) <= rows(arrays["train_grids"].tolist())


def test_options_in_the_name_leave_the_packaged_puzzles_where_they_are():
    by_name, by_argument = (
        task.heldout(5) for task in (tasks.get("sudoku6:blanks=20"), tasks.get("sudoku6", blanks=20))
    )
    assert torch.equal(by_name.tokens, by_argument.tokens)


@pytest.mark.parametrize(("name", "blanks"), [("sudoku4", 8), ("sudoku4", 1), ("sudoku6", 20)])
def test_blanks_reveals_to_the_exact_count_and_stays_unique(name, blanks):
    minimal, task = tasks.get(name), tasks.get(name, blanks=blanks)
    for instances in (task.sample(30, generator(3)), task.heldout(30)):
        assert ((instances.tokens == task.mask_id).sum(1) == blanks).all()
        for tokens, answer in zip(instances.tokens, instances.answers, strict=True):
            puzzle = torch.where(tokens == task.mask_id, 0, tokens + 1).tolist()
            assert solve(puzzle, *task.box, limit=2) == [(answer + 1).tolist()]
    before, after = minimal.heldout(30), task.heldout(30)
    clue = before.tokens != task.mask_id
    assert torch.equal(after.tokens[clue], before.tokens[clue]), "clues of the minimal puzzle stay"
    assert torch.equal(after.tokens, task.heldout(30).tokens), "held-out puzzles are fixed"


# ---------------------------------------------------------------------- metrics, by hand
ANSWER = [1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]
OTHER = [2, 1, 3, 4, 3, 4, 1, 2, 1, 2, 4, 3, 4, 3, 2, 1]  # 1 and 2 swapped in cells 0, 1, 8 and 9
M = 5  # a blank, in digits: mask_id + 1


def measured(board: list[int], blanks: list[int], answer: list[int] = ANSWER) -> dict[str, float]:
    puzzle = [M if i in blanks else v for i, v in enumerate(answer)]
    instances = Instances(torch.tensor([puzzle]) - 1, torch.tensor([answer]) - 1)
    values = Sudoku(2, 2).metrics(torch.tensor([board]) - 1, instances)
    assert all(value.shape == (1,) and value.dtype == torch.float32 for value in values.values())
    assert list(values) == ["solved", "cell_accuracy", "valid"]
    return {key: float(value) for key, value in values.items()}


def changed(cells: dict[int, int], board: list[int] = ANSWER) -> list[int]:
    return [cells.get(i, v) for i, v in enumerate(board)]


def test_metrics_of_the_answer():
    assert measured(ANSWER, [0, 5, 10]) == {"solved": 1, "cell_accuracy": 1, "valid": 1}


def test_metrics_of_wrong_cells():
    assert measured(changed({0: 2}), [0, 5, 10, 15]) == {"solved": 0, "cell_accuracy": 0.75, "valid": 0}
    assert measured(changed({0: 4, 5: 1, 10: 2, 15: 3}), [0, 5, 10, 15]) == {
        "solved": 0,
        "cell_accuracy": 0,
        "valid": 0,
    }


def test_metrics_of_an_incomplete_board():
    assert measured(changed({5: M}), [0, 5, 10, 15]) == {"solved": 0, "cell_accuracy": 0.75, "valid": 0}
    assert measured(changed({0: M, 5: M}), [0, 5]) == {"solved": 0, "cell_accuracy": 0, "valid": 0}
    # A hole must not pass for the last digit, which is the right one in cell 3.
    assert measured(changed({3: M}), [3]) == {"solved": 0, "cell_accuracy": 0, "valid": 0}


def test_metrics_of_a_changed_clue():
    assert measured(changed({15: 2}), [0, 1]) == {"solved": 0, "cell_accuracy": 1, "valid": 0}
    relabelled = [v % 4 + 1 for v in ANSWER]  # obeys the rules, contradicts every clue
    assert measured(relabelled, [0, 1]) == {"solved": 0, "cell_accuracy": 0, "valid": 0}


def test_the_other_solution_of_an_ambiguous_puzzle_is_solved():
    blanks = [0, 1, 8, 9]
    puzzle = [0 if i in blanks else v for i, v in enumerate(ANSWER)]
    assert sorted(solve(puzzle, 2, 2, limit=9)) == [ANSWER, OTHER]
    assert measured(OTHER, blanks) == {"solved": 1, "cell_accuracy": 1, "valid": 1}
    assert measured(ANSWER, blanks, answer=OTHER) == {"solved": 1, "cell_accuracy": 1, "valid": 1}
    mixed = changed({0: 2, 1: 1})  # one pair of each solution
    assert measured(mixed, blanks) == {"solved": 0, "cell_accuracy": 0.5, "valid": 0}


def test_each_kind_of_unit_is_checked():
    """Complete boards that break the rules in boxes only, or in columns only."""
    everywhere = list(range(16))
    latin = [1, 2, 3, 4, 2, 3, 4, 1, 3, 4, 1, 2, 4, 1, 2, 3]  # rows and columns right, boxes wrong
    columns_wrong = [1, 2, 3, 4, 3, 4, 1, 2, 1, 2, 3, 4, 3, 4, 1, 2]  # rows and boxes right
    rows_wrong = [1, 3, 1, 3, 2, 4, 2, 4, 3, 1, 3, 1, 4, 2, 4, 2]  # columns and boxes right
    for board in (latin, columns_wrong, rows_wrong):
        assert measured(board, everywhere)["valid"] == 0
    assert measured(OTHER, everywhere)["valid"] == 1


def test_the_metrics_of_a_batch_are_those_of_its_rows():
    task = tasks.get("sudoku6")
    instances = task.heldout(60)
    tokens = instances.answers.clone()
    tokens[20:40] = torch.randint(0, task.mask_id + 1, (20, 36), generator=generator(5))
    tokens[40:] = instances.tokens[40:]
    batch = task.metrics(tokens, instances)
    assert batch["solved"].tolist() == [1.0] * 20 + [0.0] * 40
    for i in range(0, 60, 7):
        alone = task.metrics(tokens[i : i + 1], instances[i : i + 1])
        assert {key: float(value[i]) for key, value in batch.items()} == {k: float(v) for k, v in alone.items()}
    perfect = task.metrics(instances.answers, instances)
    assert all(float(value.min()) == 1.0 for value in perfect.values())


@pytest.mark.parametrize("metric", ["solved", "cell_accuracy", "valid"])
def test_the_reward_is_the_metric_it_was_asked_to_be(metric):
    task = Sudoku(2, 2, reward=metric)
    instances = task.heldout(40)
    tokens = torch.where(torch.rand(40, 16, generator=generator(6)) < 0.03, 0, instances.answers)
    assert torch.equal(task.reward(tokens, instances), task.metrics(tokens, instances)[metric])


# ---------------------------------------------------------------------- for people, and errors
def test_a_board_is_drawn_with_its_boxes():
    text = Sudoku(2, 2).draw(torch.tensor(changed({0: M})) - 1)
    assert text == ". 2 | 3 4\n3 4 | 1 2\n\n2 1 | 4 3\n4 3 | 2 1"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sudoku(2, 2, reward="fast"), "reward must be solved or cell_accuracy or valid, not 'fast'"),
        (lambda: Sudoku(2, 2, blanks=0), "blanks must be between 1 and 15, not 0"),
        (lambda: Sudoku(2, 3, blanks=36), "blanks must be between 1 and 35, not 36"),
        (lambda: Sudoku(2, 2).heldout(2001), "sudoku4 has 2000 test puzzles; cannot take 2001"),
        (lambda: Sudoku(2, 2).heldout(1001, "validation"), "sudoku4 has 1000 validation puzzles; cannot take 1001"),
        (lambda: Sudoku(3, 3).heldout(2001, difficulty="hard"), "sudoku9 has 2000 hard test puzzles; cannot take 2001"),
        (lambda: Sudoku(2, 2).heldout(difficulty="singles"), "difficulty must be all or easy or hard, not 'singles'"),
        (lambda: Sudoku(2, 2).select(0), "limit must be a whole number of at least 1, not 0"),
        (lambda: Sudoku(2, 2).select(file=Path("a.csv"), difficulty="easy"), "your own file is taken whole"),
        (lambda: Sudoku(2, 2).heldout(0), "cannot take 0"),
        (lambda: Sudoku(2, 2).heldout(split="dev"), "unknown split 'dev'; known: train, validation, test"),
        (lambda: Sudoku(2, 2, blanks=13).heldout(), "fewer than 13 blanks"),
        (lambda: Sudoku(2, 2, blanks=13).sample(500, generator()), "fewer than 13 blanks"),
        (lambda: Sudoku(2, 4).heldout(), "no packaged puzzles for sudoku8; packaged are: sudoku4, sudoku6, sudoku9"),
    ],
)
def test_a_users_mistake_is_named_in_one_line(make, message):
    with pytest.raises(UnmaskError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_task_lists_the_known_ones():
    with pytest.raises(
        UnknownNameError,
        match=r"unknown task 'sudoku5'; did you mean sudoku4 or sudoku6\? known: .*sudoku4, sudoku6, sudoku9",
    ):
        tasks.get("sudoku5")
