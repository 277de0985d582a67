"""Problems of the library ``reasoning-gym``, which writes them anew for every seed.

Its scorers are never called: several hand the text of an answer to Python's ``eval``. What has one right answer is
compared with it here, and Countdown's expressions are worked out step by step.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

from tasks.errors import UnmaskError, first_line, optional
from tasks.grading import grade

SEEDS = {"train": 0, "validation": 10**9, "test": 2 * 10**9}  # problem i is drawn from the seed plus i
LONGEST = 200  # characters of an expression that are worth reading
NUMBER = re.compile(r"-?[0-9][0-9,]*(\.[0-9]+)?")
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
# Kinds with a scorer of their own (version 0.1.25) that gives full marks to one answer alone, or to that in any case.
CASELESS = {
    *("chain_sum", "color_cube_rotation", "decimal_chain_sum", "dice", "family_relationships", "figlet_font"),
    *("gsm_symbolic", "letter_jumble", "needle_haystack", "products", "rectangle_count", "sentence_reordering"),
    *("spell_backward", "tsumego", "zebra_puzzles"),
}
ONE_ANSWER = CASELESS | {
    *("ab", "binary_matrix", "calendar_arithmetic", "circuit_logic", "emoji_mystery", "futoshiki", "manipulate_matrix"),
    *("mini_sudoku", "path_star", "self_reference", "spiral_matrix", "string_insertion", "sudoku", "survo"),
    *("word_sorting",),
}


class Problem(NamedTuple):
    """``answer`` is the final one alone; ``solution`` how to get there. ``check`` says whether a text is right; None:
    :func:`tasks.grading.grade` does."""

    question: str
    solution: str
    answer: str
    check: Callable[[str], bool] | None = None

    def is_right(self, text: str) -> bool:
        """Whether ``text`` answers it."""
        return grade([(text, self.answer)])[0] if self.check is None else self.check(text)


def problems(name: str, n: int, split: str, **options: Any) -> list[Problem]:
    """``n`` problems of the kind ``name``, for example ``countdown``, always the same ones for a split.

    Args:
        options: of the kind, for example ``min_numbers=3``.

    Raises:
        UnmaskError: the library is missing, does not know the kind or its options, or the kind has many right answers.
    """
    with optional("problems of reasoning-gym", "reasoning-gym==0.1.25"):
        import reasoning_gym
    try:
        source = reasoning_gym.create_dataset(name, size=n, seed=SEEDS[split], **options)
        plain = type(source).score_answer is reasoning_gym.dataset.ProceduralDataset.score_answer
        entries = [*source] if plain or name in (*ONE_ANSWER, "countdown") else None
    except Exception as error:  # unknown kinds are ValueErrors, wrong options TypeErrors and AssertionErrors
        raise UnmaskError(f"reasoning-gym cannot make problems {name!r}: {first_line(error)}") from None
    if entries is None:
        raise UnmaskError(
            f"problems {name!r} of reasoning-gym are judged by its own code, which may run an answer's text and is not "
            "called here; take a kind with one right answer, such as chain_sum, gsm_symbolic or sudoku, or countdown"
        )
    return [_problem(name, entry) for entry in entries]


def _problem(name: str, entry: dict[str, Any]) -> Problem:
    answer, check = str(entry["answer"]), None
    if name == "countdown":
        made_of = entry["metadata"]
        check = partial(check_expression, numbers=made_of["numbers"], target=made_of["target"])
    elif not NUMBER.fullmatch(answer):
        check = partial(same_words, answer=answer, caseless=name in CASELESS)
    return Problem(entry["question"], answer, answer, check)


def same_words(text: str, answer: str, caseless: bool = False) -> bool:
    """Whether ``text`` is ``answer`` line by line, whatever the spaces."""
    if caseless:
        text, answer = text.casefold(), answer.casefold()
    words, right = ([line.split() for line in part.strip().split("\n")] for part in (text, answer))
    return bool(answer) and words == right


def check_expression(answer: str, numbers: Sequence[int], target: int) -> bool:
    """Whether ``answer``, one expression like ``(45-7)*2``, uses every number once and equals the target.

    Only + - * / and parentheses around whole numbers of at most six digits count; anything else is wrong, not run.
    """
    answer = answer.strip()
    if len(answer) > LONGEST or re.search(r"[0-9]{7}", answer) or not re.fullmatch(r"[-+*/() 0-9]+", answer):
        return False
    try:
        tree = ast.parse(answer, mode="eval").body
        used: list[int] = []
        return _value(tree, used) == target and Counter(used) == Counter(numbers)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False


def _value(node: ast.expr, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise ValueError("not arithmetic")
