"""Zebra puzzles against a solver that shares nothing with the generator's: brute force over arrangements."""

import itertools

import numpy as np
import pytest
import torch

import tasks
from tasks import Instances, UnmaskError, Zebra
from tasks.generate_zebra import count_solutions, minimal_clues, true_clues
from tasks.zebra import MAX_CLUES, RELATIONS

RULES = {
    "at": lambda x, y: x == y,
    "same": lambda x, y: x == y,
    "different": lambda x, y: x != y,
    "left": lambda x, y: y - x == 1,
    "next": lambda x, y: y - x in (1, -1),
}


def solutions(clues, houses, attributes):
    """Brute force: every way of placing the values of every attribute."""
    found = []
    for rows in itertools.product(itertools.permutations(range(houses)), repeat=attributes):
        if all(RULES[RELATIONS[r]](rows[a][v], w if r == 0 else rows[b][w]) for r, a, v, b, w in clues):
            found.append(rows)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_generated_puzzles_have_one_solution_and_no_clue_too_many(seed):
    clues = minimal_clues(3, 3, np.random.default_rng(seed))
    assert solutions(clues, 3, 3) == [tuple((0, 1, 2) for _ in range(3))]
    for clue in clues:
        without = [other for other in clues if other != clue]
        assert len(solutions(without, 3, 3)) > 1


@pytest.mark.parametrize("seed", range(20))
def test_the_solver_counts_as_brute_force_does(seed):
    rng = np.random.default_rng(seed)
    every = true_clues(3, 3)
    clues = [every[i] for i in rng.choice(len(every), size=rng.integers(0, 7), replace=False)]
    assert count_solutions(clues, 3, 3, limit=10**6) == len(solutions(clues, 3, 3))


def clues_of(task: Zebra, tokens):
    """(relation, thing, thing or house) as numbers, from the tokens of a sequence."""
    size, houses = task.houses, task.houses * task.attributes
    for relation, first, second in tokens[: task.prompt_length].view(-1, 3).tolist():
        if task.symbols[relation] == "-":
            assert first == second == relation
            continue
        name = RELATIONS[relation - houses - size]
        yield name, divmod(first, size), second - houses if name == "at" else divmod(second, size)


@pytest.mark.parametrize("houses", [3, 4])
def test_shown_puzzles_are_true_of_their_tables_under_every_symmetry(houses):
    task = Zebra(houses)
    instances = task.sample(300, torch.Generator().manual_seed(0))
    assert ((instances.tokens == task.mask_id) == (torch.arange(task.length) >= task.prompt_length)).all()
    tables_shown = set()
    for answer in instances.answers:
        table = answer[task.prompt_length :].view(houses, houses)
        assert (table // houses == torch.arange(houses).unsqueeze(1)).all(), "a row per attribute"
        assert (table.sort(1).values % houses == torch.arange(houses)).all(), "each value once"
        house = {divmod(int(token), houses): h for row in table for h, token in enumerate(row)}
        found = list(clues_of(task, answer))
        for name, first, second in found:
            assert RULES[name](house[first], second if name == "at" else house[second])
        tables_shown.add(tuple(table.flatten().tolist()))
    assert len(tables_shown) > (140 if houses == 3 else 290)
    names = [name for answer in instances.answers for name, _, _ in clues_of(task, answer)]
    assert set(names) == set(RELATIONS)


@pytest.mark.parametrize("seed", range(3))
def test_a_puzzle_under_a_symmetry_has_still_one_solution(seed):
    """By brute force on the tokens as shown."""
    task = Zebra(3)
    answer = task.sample(1, torch.Generator().manual_seed(seed)).answers[0]
    shown = [
        (RELATIONS.index(name), *first, *((0, second) if name == "at" else second))
        for name, first, second in clues_of(task, answer)
    ]
    found = solutions(shown, 3, 3)
    assert len(found) == 1
    table = answer[task.prompt_length :].view(3, 3) % 3
    assert [[row.tolist().index(v) for v in range(3)] for row in table] == [list(row) for row in found[0]]


def test_boards_in_mid_play_keep_their_holes_and_mistakes_under_a_symmetry():
    task, g = Zebra(3), torch.Generator().manual_seed(0)
    answers = task.heldout(200).answers
    tokens = answers.clone()
    table = tokens[:, task.prompt_length :]  # a view
    mistaken = torch.arange(200) % 2 == 0
    table[mistaken, 0] = answers[mistaken, task.prompt_length + 1]
    table[:, [2, 5, 6]] = task.mask_id
    shown = task.augment(Instances(tokens, answers), g)
    assert not torch.equal(shown.answers, answers)
    assert ((shown.tokens == task.mask_id).sum(1) == 3).all()
    differ = (shown.tokens != shown.answers) & (shown.tokens != task.mask_id)
    assert torch.equal(differ.sum(1), mistaken.long())
    assert not differ[:, : task.prompt_length].any()
    assert len({tuple(row) for row in (shown.tokens == task.mask_id).tolist()}) > 5, "rows and columns move"
    for answer in shown.answers:
        house = {divmod(int(t), 3): h for row in answer[task.prompt_length :].view(3, 3) for h, t in enumerate(row)}
        for name, first, second in clues_of(task, answer):
            assert RULES[name](house[first], second if name == "at" else house[second])


def test_heldout_puzzles_are_fixed_apart_from_training_and_scored():
    task = tasks.get("zebra:houses=4")
    assert (task.name, task.length) == ("zebra:houses=4", 3 * MAX_CLUES[4] + 16)
    assert torch.equal(task.heldout(50).tokens, task.heldout(2000).tokens[:50])
    sets = [{tuple(sorted(map(tuple, clues.tolist()))) for clues in task._files[s]} for s in ("train", "test")]
    assert not sets[0] & sets[1]
    instances = task.heldout(4)
    wrong = instances.answers.clone()
    wrong[0, -1], wrong[0, -2] = wrong[0, -2].clone(), wrong[0, -1].clone()
    found = task.metrics(wrong, instances)
    assert found["solved"].tolist() == [0, 1, 1, 1]
    assert found["cell_accuracy"].tolist() == [14 / 16, 1, 1, 1]
    assert task.draw(instances.tokens[0]).splitlines()[-1].split() == ["."] * 4
    for name in ("zebra:houses=7", "zebra:houses=0"):
        with pytest.raises(UnmaskError, match="packaged are those of 3, 4"):
            tasks.get(name)
    with pytest.raises(UnmaskError, match="has 2000 test puzzles; cannot take 2001"):
        task.heldout(2001)
