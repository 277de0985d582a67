"""Countdown's other format: an answer as one expression, checked without running it."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

LONGEST = 200  # characters of an answer that are worth reading
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def check_expression(answer: str, numbers: Sequence[int], target: int) -> bool:
    """Whether ``answer``, one expression like ``(45-7)*2``, uses every number once and equals the target.

    Only + - * / and parentheses around whole numbers of at most six digits count; anything else is wrong, not run.
    """
    if len(answer) > LONGEST or re.search(r"\d{7}", answer) or not re.fullmatch(r"[-+*/() \d]+", answer):
        return False
    try:
        tree = ast.parse(answer.strip(), mode="eval").body
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
