"""Countdown: reach a target from all of the given numbers, each used once, with + - * and exact /.

A sequence reads ``12,07,45|086`` and then the steps, ``45-7=38,38+...``, padded with spaces. Numbers and target are
given; an instance hides all of the steps. Most puzzles have several answers: what counts is whether the arithmetic is
right, uses every number once and ends at the target, which is checked step by step and never by running the text.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from tasks.errors import UnmaskError
from tasks.settings import AtLeast1, Range, check, checked
from tasks.task import Instances, Task

SYMBOLS = (*"0123456789+-*/=,| ",)
LARGEST = 999  # of what a step may give
LONGEST = 200  # characters of an answer that are worth reading
Target = Annotated[int, Range(1, LARGEST)]
STEP = re.compile(r"([0-9]{1,6})([-+*/])([0-9]{1,6})=([0-9]{1,6})")


def check_steps(answer: str, numbers: Sequence[int], target: int) -> bool:
    """Whether ``answer``, steps like ``45-7=38,38+12=50``, is right: every step true, on numbers that are there, each
    used once, none left over, the last result the target. Spaces around it do not matter."""
    if len(answer) > LONGEST:
        return False
    there, result = Counter(numbers), None
    for step in answer.strip(" ").split(","):
        parts = _true_parts(step)
        if parts is None:
            return False
        a, b, result = parts
        for used in (a, b):
            if there[used] < 1:
                return False
            there[used] -= 1
        there[result] += 1
    return result == target and sum(there.values()) == 1


def _true_parts(step: str) -> tuple[int, int, int] | None:
    """Both numbers and the result of a step that is true; None of any other text."""
    parts = STEP.fullmatch(step)
    if parts is None:
        return None
    a, b, result = int(parts[1]), int(parts[3]), int(parts[4])
    return (a, b, result) if _apply(parts[2], a, b) == result else None


def _apply(operation: str, a: int, b: int) -> int | None:
    """None of a division that is not exact."""
    if operation == "/":
        return a // b if b and a % b == 0 else None
    return {"+": a + b, "-": a - b, "*": a * b}[operation]


def _solutions(numbers: Sequence[int], target: int) -> list[str]:
    """All answers, as steps with the larger number first and results between 1 and ``LARGEST``; some come twice."""
    if len(numbers) == 1:
        return [""] if numbers[0] == target else []
    answers = []
    for i, j in itertools.combinations(range(len(numbers)), 2):
        a, b = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
        rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
        for operation in "+-*/":
            result = _apply(operation, a, b)
            if result is not None and 1 <= result <= LARGEST:
                step = f"{a}{operation}{b}={result}"
                answers += [",".join(filter(None, (step, more))) for more in _solutions([*rest, result], target)]
    return answers


class Countdown(Task):
    """Write down the steps that reach the target. Training puzzles are drawn anew each time.

    Held-out puzzles are those whose numbers, sorted, fall into a tenth of all combinations by a fixed rule; training
    never draws them.

    Args:
        numbers: 3 or 4. largest: of the numbers given. target_low, target_high: which targets are asked for.

    Raises:
        UnmaskError: sizes that are not allowed.
    """

    one_answer = False

    @checked
    def __init__(
        self,
        numbers: Literal[3, 4] = 3,
        largest: Annotated[int, Range(10, 99)] = 99,
        target_low: Target = 10,
        target_high: Target = 100,
    ) -> None:
        if target_low > target_high:
            raise UnmaskError(f"target_low must be at most target_high, not {target_low} and {target_high}")
        self.name, self.numbers, self.largest = f"countdown{numbers}", numbers, largest
        self.targets, self.symbols = (target_low, target_high), SYMBOLS
        self.prompt_length = 3 * numbers + 3
        self.shape = (1, self.prompt_length + 12 * (numbers - 1) - 1)

    def _draw(self, n: int, heldout: bool, generator: torch.Generator) -> list[tuple[list[int], int, str]]:
        """``n`` puzzles of the held-out or the training kind: numbers, target, one answer."""
        puzzles: list[tuple[list[int], int, str]] = []
        while len(puzzles) < n:
            many = (60 if heldout else 8) * (n - len(puzzles)) + 64
            given = torch.randint(1, self.largest + 1, (many, self.numbers), generator=generator, device="cpu")
            kept = (_key(given) % 10 == 0) == heldout
            values, text = [given[:, i] for i in range(self.numbers)], []
            # Numbers come in random order, so taking the first two each time, and putting the result anywhere, is
            # every way of combining them.
            for _ in range(self.numbers - 1):
                a, b = torch.maximum(values[0], values[1]), torch.minimum(values[0], values[1])
                operation = torch.randint(4, (many,), generator=generator)
                results = torch.stack([a + b, a - b, a * b, a // b.clamp(min=1)])
                result = results.gather(0, operation.unsqueeze(0)).squeeze(0)
                kept &= (result >= 1) & (result <= LARGEST) & ((operation != 3) | (a % b.clamp(min=1) == 0))
                text.append((a, operation, b, result))
                values = [result, *values[2:]]
                if len(values) > 2:
                    place = torch.rand(len(values), many, generator=generator).argsort(0)
                    values = list(torch.stack(values).gather(0, place))
            kept &= (values[0] >= self.targets[0]) & (values[0] <= self.targets[1])
            for row in kept.nonzero().flatten().tolist():
                steps = ",".join(f"{a[row]}{'+-*/'[o[row]]}{b[row]}={r[row]}" for a, o, b, r in text)
                puzzles.append((given[row].tolist(), int(values[0][row]), steps))
        return puzzles[:n]

    def encode(self, puzzles: Sequence[tuple[Sequence[int], int, str]]) -> Instances:
        """Puzzles of (numbers, target, answer) as instances.

        Raises:
            UnmaskError: numbers or answers that do not fit.
        """
        rows = []
        for given, target, answer in puzzles:
            if len(given) != self.numbers or not all(1 <= g <= 99 for g in given) or not 1 <= target <= LARGEST:
                raise UnmaskError(f"not {self.numbers} numbers to 99 and a target to {LARGEST}: {given}, {target}")
            text = ",".join(f"{g:02d}" for g in given) + f"|{target:03d}" + answer
            if len(text) > self.length or set(text) - set(SYMBOLS):
                raise UnmaskError(f"the answer {answer!r} is too long, or has other symbols than {''.join(SYMBOLS)!r}")
            rows.append([SYMBOLS.index(symbol) for symbol in text.ljust(self.length)])
        answers = torch.tensor(rows, dtype=torch.int64).view(len(rows), self.length)
        return self.behind_prompt(answers)

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        source = generator
        if generator.device.type != "cpu":  # drawn on the CPU: it is text
            seed = torch.randint(2**62, (1,), generator=generator, device=generator.device)
            source = torch.Generator().manual_seed(int(seed))
        return self.encode(self._draw(n, False, source)).to(generator.device)

    def heldout(self, n: int | None = None, split: str = "test") -> Instances:
        generator = self.split_generator(split)
        check("n", n, AtLeast1 | None)
        return self.encode(self._draw(1000 if n is None else n, split != "train", generator))

    def all_answers(self, instances: Instances) -> Tensor:
        """(N, K, L): the instances' own, then all that write the larger number of each step first."""
        if not len(instances):
            return super().all_answers(instances)
        right = []
        for answer in instances.answers.cpu():
            numbers, target = self._puzzle(answer)
            steps = dict.fromkeys([self.text(answer[self.prompt_length :]).strip(), *_solutions(numbers, target)])
            right.append(self.encode([(numbers, target, text) for text in steps]).answers)
        count = max(len(answers) for answers in right)
        padded = [torch.cat([answers, answers[:1].expand(count - len(answers), -1)]) for answers in right]
        return torch.stack(padded).to(instances.answers.device)

    def _puzzle(self, tokens: Tensor) -> tuple[list[int], int]:
        """The numbers and the target of a board."""
        numbers, target = self.text(tokens[: self.prompt_length]).split("|")
        return [int(number) for number in numbers.split(",")], int(target)

    def text(self, tokens: Tensor) -> str:
        """``tokens`` (L,) as a string; a hole is a dot."""
        return "".join(self.symbol(int(token)) for token in tokens)

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        """1 where the steps are right."""
        solved = []
        for row, given in zip(tokens.cpu(), instances.answers.cpu(), strict=True):
            solved.append(check_steps(self.text(row[self.prompt_length :]), *self._puzzle(given)))
        return torch.tensor(solved, dtype=torch.float32, device=tokens.device)

    def metrics(self, tokens: Tensor, instances: Instances) -> dict[str, Tensor]:
        """``solved``, and ``true_steps``: the share of the steps whose arithmetic is right."""
        shares = []
        for row in tokens.cpu():
            steps = self.text(row[self.prompt_length :]).strip().split(",")
            shares.append(sum(_true_parts(step) is not None for step in steps) / len(steps))
        true_steps = torch.tensor(shares, dtype=torch.float32, device=tokens.device)
        return {"solved": self.reward(tokens, instances), "true_steps": true_steps}

    def draw(self, tokens: Tensor) -> str:
        return self.text(tokens)


def _key(given: Tensor) -> Tensor:
    """(N,) a number per combination of numbers, whatever their order, well spread modulo 10."""
    key = torch.zeros(len(given), dtype=torch.int64)
    for column in given.sort(1).values.unbind(1):
        key = (key * 1_000_003 + column * 7919) % 2_147_483_647
    return (key >> 7) ^ key
