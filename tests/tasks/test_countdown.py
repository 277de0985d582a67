"""Countdown: what counts as right, what is refused, and what is drawn."""

import itertools
import time

import pytest
import torch

import tasks
from tasks import Countdown, UnmaskError
from tasks.countdown import check_steps
from tasks.reasoning import check_expression


@pytest.mark.parametrize(
    ("answer", "numbers", "target", "right"),
    [
        ("45-7=38,38+12=50", [12, 7, 45], 50, True),
        ("  45-7=38,38+12=50   ", [12, 7, 45], 50, True),
        ("45-7=38,12+38=50", [12, 7, 45], 50, True),
        ("45-7=38,38+12=51", [12, 7, 45], 51, False),  # untrue
        ("45-7=38,38+12=50", [12, 7, 45], 51, False),  # another target
        ("45+5=50", [12, 7, 45], 50, False),  # a number that is not there
        ("45-7=38", [12, 7, 45], 38, False),  # one left over
        ("45-7=38,45+12=57", [12, 7, 45], 57, False),  # one used twice
        ("7+7=14,14+7=21", [7, 7, 7], 21, True),
        ("8/3=2,2+7=9", [8, 3, 7], 9, False),  # not exact
        ("8/2=4,4*7=28", [8, 2, 7], 28, True),
        ("8/0=0,0+7=7", [8, 0, 7], 7, False),
        ("7-8=1,1+3=4", [7, 8, 3], 4, False),
        ("", [1, 2, 3], 6, False),
        ("1+2=3,3+3=6,", [1, 2, 3], 6, False),
        ("1+2=3 ,3+3=6", [1, 2, 3], 6, False),
        ("__import__('os')", [1, 2, 3], 6, False),
        ("9**9**9", [9, 9, 9], 6, False),
        ("45-\u0667=38,38+12=50", [12, 7, 45], 50, False),  # digits of other scripts are none of the symbols
        ("\uff14\uff15-7=38,38+12=50", [12, 7, 45], 50, False),
        ("\u200345-7=38,38+12=50\n", [12, 7, 45], 50, False),
    ],
)
def test_steps_by_hand(answer, numbers, target, right):
    assert check_steps(answer, numbers, target) == right


@pytest.mark.parametrize(
    ("answer", "numbers", "target", "right"),
    [
        ("(45-7)+12", [12, 7, 45], 50, True),
        ("12+45-7", [12, 7, 45], 50, True),
        ("12+45-7", [12, 7, 46], 50, False),
        ("8/3*3", [8, 3, 3], 8, True),  # fractions on the way are fine
        ("8/(3-3)", [8, 3, 3], 8, False),
        ("-8+9+1", [8, 9, 1], 2, False),  # no signs
        ("8+9+1 if 1 else 2", [8, 9, 1], 18, False),
        ("((8)", [8], 8, False),
        ("(8)", [8], 8, True),
        ("08", [8], 8, False),
        ("", [], 0, False),
    ],
)
def test_expressions_by_hand(answer, numbers, target, right):
    assert check_expression(answer, numbers, target) == right


@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os')",
        "9**9**9",
        "9" * 100_000,
        "(" * 100_000,
        "(" * 90 + "1" + ")" * 90,
        "1+" * 99 + "1",
        "1" + "*999999" * 28,
        "1//1",
        "\x00",
        "lambda: 1",
    ],
)
def test_malicious_answers_score_nothing_at_once(answer):
    spent = []
    for _ in range(3):  # a collection of garbage may fall into one of them
        started = time.process_time()
        assert not check_expression(answer, [9, 9, 9], 6)
        assert not check_steps(answer, [9, 9, 9], 6)
        spent.append(time.process_time() - started)
    assert min(spent) < 0.01


@pytest.mark.parametrize("numbers", [3, 4])
def test_drawn_puzzles_are_solved_by_their_answers(numbers):
    task = Countdown(numbers)
    for instances in (task.sample(200, torch.Generator().manual_seed(0)), task.heldout(200)):
        assert task.reward(instances.answers, instances).tolist() == [1.0] * 200
        assert set(task.metrics(instances.answers, instances)) == {"solved", "true_steps"}
        hidden = instances.tokens == task.mask_id
        assert torch.equal(hidden, (torch.arange(task.length) >= task.prompt_length).expand(200, -1))
        operations = {symbol for row in instances.answers for symbol in task.text(row)} & set("+-*/")
        assert operations == set("+-*/")


def test_any_right_answer_counts():
    task = tasks.get("countdown:numbers=3")
    first = task.encode([([12, 7, 45], 50, "45-7=38,38+12=50")])
    other = task.encode([([12, 7, 45], 50, "12+45=57,57-7=50")])
    wrong = task.encode([([12, 7, 45], 50, "12+45=57,57-7=49")])
    assert task.draw(first.tokens[0]).startswith("12,07,45|050.....")
    assert task.reward(other.answers, first).tolist() == [1]
    found = task.metrics(wrong.answers, first)
    assert (found["solved"].tolist(), found["true_steps"].tolist()) == ([0], [0.5])
    cheat = other.answers.clone()
    cheat[0, : task.prompt_length] = task.encode([([12, 45, 7], 50, "")]).answers[0, : task.prompt_length]
    assert task.reward(cheat, first).tolist() == [1], "the prompt that counts is the instance's"


def test_heldout_numbers_are_never_trained_on():
    task = Countdown(3)
    trained = {tuple(sorted(p[0])) for p in task._draw(20_000, False, torch.Generator().manual_seed(1))}
    held = {tuple(sorted(p[0])) for p in task._draw(2000, True, torch.Generator().manual_seed(1))}
    assert not trained & held
    assert len(held) > 1500
    assert torch.equal(task.heldout(5).tokens, task.heldout(5).tokens)
    assert not torch.equal(task.heldout(5).tokens, task.heldout(5, "validation").tokens)


def test_wrong_settings():
    with pytest.raises(UnmaskError, match="numbers must be 3 or 4, not 5"):
        Countdown(5)
    with pytest.raises(UnmaskError, match="target_low must be at most target_high, not 50 and 20"):
        tasks.get("countdown:target_low=50,target_high=20")
    with pytest.raises(UnmaskError, match="not 3 numbers to 99"):
        Countdown(3).encode([([1, 2], 3, "1+2=3")])
    with pytest.raises(UnmaskError, match="too long, or has other symbols"):
        Countdown(3).encode([([1, 2, 3], 6, "print(1)")])
    with pytest.raises(UnmaskError, match="unknown split"):
        Countdown(3).heldout(3, "rest")
    with pytest.raises(UnmaskError, match="--puzzles and --difficulty are for Sudoku tasks; countdown3 is not one"):
        Countdown(3).select(3, difficulty="hard")


@pytest.mark.parametrize("numbers", [3, 4])
def test_all_answers_are_right_and_complete(numbers: int) -> None:
    task = tasks.get(f"countdown:numbers={numbers}")
    instances = task.heldout(20)
    found = task.all_answers(instances)
    assert torch.equal(found[:, 0], instances.answers)
    assert task.all_answers(instances[:0]).shape[::2] == (0, task.length)
    for answers in found.unbind(1):
        assert task.reward(answers, instances).eq(1).all()
    texts = {task.text(row[task.prompt_length :]).strip() for row in found[3]}
    values, target = task._puzzle(instances.answers[3])
    # Every way of writing steps with the larger number first, checked by the checker.
    tried = set()

    def write(there: tuple[int, ...], text: str) -> None:
        if len(there) == 1:
            tried.add(text.strip(","))
            return
        for i, j in itertools.permutations(range(len(there)), 2):
            a, b = there[i], there[j]
            if a < b:
                continue
            rest = tuple(there[k] for k in range(len(there)) if k not in (i, j))
            for sign, result in (("+", a + b), ("-", a - b), ("*", a * b), ("/", a // b)):
                if 1 <= result <= 999:
                    write((*rest, result), f"{text},{a}{sign}{b}={result}")

    write(tuple(values), "")
    assert texts == {text for text in tried if check_steps(text, values, target)}
