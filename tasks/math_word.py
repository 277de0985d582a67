"""Word problems with an answer that can be checked, in the formats of GSM8K and MATH-500, for pretrained models.

A sequence is the prompt, padded on its left, and an answer region of fixed length, which an instance hides. What is
written there is right if the answer found in it equals the problem's (library ``math-verify``).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks import reasoning
from tasks.errors import UnmaskError, library, read_text
from tasks.lines import all_tokens, load_tokenizer
from tasks.settings import AtLeast1, checked
from tasks.task import DATA, SPLITS, Instances, Task, random_rows
from tasks.text import load_datasets

SAMPLE = DATA / "math_sample.jsonl"
LONGEST = 4000  # characters of an answer that are read
TOWER = re.compile(r"(\*\*|\^)[\s{(]*[^\s})]*(\*\*|\^)|(\*\*|\^)[\s{(]*\d{4}|!\s*!|\d{4}\s*!")  # takes for ever


class Problem(NamedTuple):
    """``answer`` is the final one alone; ``solution`` how to get there."""

    question: str
    solution: str
    answer: str

    def is_right(self, text: str) -> bool:
        return is_right(text, self.answer)


def read_problem(record: dict[str, Any]) -> Problem:
    """A record of GSM8K (question, and an answer that ends in ``#### 42``) or of MATH-500 (problem, solution, answer).

    Raises:
        UnmaskError: it is neither.
    """
    question, answer = record.get("question", record.get("problem")), record.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str) or not question.strip():
        raise UnmaskError(f"a problem needs 'question' or 'problem', and 'answer', as text; it has {sorted(record)}")
    if "problem" in record:
        return Problem(question.strip(), str(record.get("solution", answer)), answer.strip())
    _, marked, final = answer.rpartition("####")
    if not final.strip():
        raise UnmaskError("an answer ends in '####' without anything behind it")
    return Problem(question.strip(), answer.strip() if marked else final.strip(), final.strip().replace(",", ""))


def is_right(text: str, answer: str) -> bool:
    """Whether the answer found in ``text`` equals ``answer``: the last number or formula, or what is marked as it
    (``\\boxed{}``, ``####``). Text is parsed, never run; towers of powers count as wrong.

    Raises:
        UnmaskError: the library is missing.
    """
    math_verify = library("math_verify", "checking answers takes the extra text", "'unmask[text]'")
    if len(text) > LONGEST or TOWER.search(text):
        return False
    marked = text.rpartition("####")[2] if "####" in text else text
    try:
        return bool(
            math_verify.verify(
                math_verify.parse(f"${answer}$", parsing_timeout=None),
                math_verify.parse(marked, parsing_timeout=None),
                timeout_seconds=None,
            )
        )
    except (ValueError, TypeError, RecursionError, OverflowError, ZeroDivisionError):
        return False


class MathWord(Task):
    """Answer word problems, with a pretrained model as the denoiser (``hf:``).

    Args:
        source: ``sample`` (30 short problems written for this package), a file of JSON lines, of which a tenth each is
            for validation and test, ``hf:`` and a dataset id, whose splits are used, or ``gym:`` and a kind of problem
            of reasoning-gym, which then scores the answers (1,000 for training, 200 for validation and test each).
        tokenizer: a folder or hub id of a tokenizer of ``transformers``, or one of them. One with a chat template is
            asked in its form.
        answer_length: tokens of the answer region. subset: of a dataset.

    Attributes:
        pad_id: the token of padding, left of shorter prompts (``pad_side``).

    Raises:
        UnmaskError: what cannot be read, is in neither format, or has too few problems; a tokenizer without padding.
    """

    one_answer = False

    @checked
    def __init__(
        self,
        source: str = "sample",
        tokenizer: str | Any = None,
        answer_length: AtLeast1 = 64,
        subset: str | None = None,
    ) -> None:
        if tokenizer is None:
            raise UnmaskError("name the model's tokenizer: math:sample,tokenizer=FOLDER_OR_ID")
        splits = _read(source, subset)  # before the tokenizer, which may have to come from a hub
        self.tokenizer = load_tokenizer(tokenizer)
        self.name, self.pad_id, self.pad_side = "math", int(self.tokenizer.pad_token_id), "left"
        self.symbols = all_tokens(self.tokenizer)
        prompts = {split: [self._prompt(p.question) for p in problems] for split, problems in splits.items()}
        self.prompt_length = max(map(len, itertools.chain(*prompts.values())))
        self.shape = (1, self.prompt_length + answer_length)
        end = self.tokenizer.eos_token_id
        fill = self.pad_id if end is None else end
        self._answers: dict[str, Tensor] = {}
        self._right: dict[tuple[int, ...], Callable[[str], bool]] = {}  # by prompt
        for split, problems in splits.items():
            rows = []
            for prompt, problem in zip(prompts[split], problems, strict=True):
                given = [self.pad_id] * (self.prompt_length - len(prompt)) + prompt
                solution = self.tokenizer.encode(" " + problem.solution, add_special_tokens=False)[:answer_length]
                rows.append(given + solution + [fill] * (answer_length - len(solution)))
                self._right[tuple(given)] = problem.is_right
            self._answers[split] = torch.tensor(rows, dtype=torch.int64)

    def _prompt(self, question: str) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None):
            asked = [{"role": "user", "content": question}]
            text = self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
            return self.tokenizer.encode(text, add_special_tokens=False)
        return self.tokenizer.encode(f"Question: {question}\nAnswer:", add_special_tokens=False)

    def _split(self, split: str) -> Tensor:
        if split not in self._answers:  # MATH-500, for example, is for testing alone
            raise UnmaskError(f"{self.name} has no {split} problems, only {', '.join(self._answers)}")
        return self._answers[split]

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        answers = self._split("train")
        return self.behind_prompt(answers[random_rows(len(answers), n, generator)].to(generator.device))

    def heldout(self, n: int | None = None, split: str = "test") -> Instances:
        return self.first(n, self.behind_prompt(self._split(split)), f"{split} problems")

    def written(self, tokens: Tensor) -> str:
        """The text of the answer region of one sequence."""
        return self.tokenizer.decode(tokens[self.prompt_length :].tolist(), skip_special_tokens=True)

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        """1 where the answer is complete and right."""
        prompts = instances.tokens[:, : self.prompt_length].tolist()
        right = [
            bool((row != self.mask_id).all()) and self._right[tuple(prompt)](self.written(row))
            for row, prompt in zip(tokens.cpu(), prompts, strict=True)
        ]
        return torch.tensor(right, dtype=torch.float32, device=tokens.device)

    def metrics(self, tokens: Tensor, instances: Instances) -> dict[str, Tensor]:
        return {"solved": self.reward(tokens, instances)}

    def draw(self, tokens: Tensor) -> str:
        """Prompt and answer as text, holes as blanks."""
        kept = [int(token) for token in tokens if int(token) != self.pad_id]
        runs = [(hole, [*run]) for hole, run in itertools.groupby(kept, lambda token: token == self.mask_id)]
        return "".join("_" * len(run) if hole else self.tokenizer.decode(run) for hole, run in runs)


def _read(source: str, subset: str | None) -> Mapping[str, Sequence[Problem | reasoning.Scored]]:
    if source.startswith("gym:"):
        kind, sizes = source.removeprefix("gym:"), (1000, 200, 200)
        return {split: reasoning.problems(kind, n, split) for split, n in zip(SPLITS, sizes, strict=True)}
    if source.startswith("hf:"):
        records: dict[str, Sequence[dict[str, Any]]] = load_datasets(source.removeprefix("hf:"), subset)
        splits = {split: _problems(records[split], source) for split in SPLITS if split in records}
        if not splits:
            raise UnmaskError(f"{source} has none of the splits {', '.join(SPLITS)}, only {', '.join(records)}")
        return splits
    path = SAMPLE if source == "sample" else Path(source)
    parsed = []
    for number, line in enumerate(filter(str.strip, read_text(path).splitlines()), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            raise UnmaskError(f"{path}, line {number}: not JSON") from None
        if not isinstance(record, dict):
            raise UnmaskError(f"{path}, line {number}: not a record of JSON")
        parsed.append(record)
    problems = _problems(parsed, str(path))
    if len(problems) < len(SPLITS):
        raise UnmaskError(f"{path} has {len(problems)} problems; at least {len(SPLITS)} are needed, one for each split")
    held = max(1, len(problems) // 10)
    mixed = problems[::3] + problems[1::3] + problems[2::3]  # files may be sorted by kind
    return {"train": mixed[: -2 * held], "validation": mixed[-2 * held : -held], "test": mixed[-held:]}


def _problems(records: Sequence[dict[str, Any]], source: str) -> list[Problem]:
    problems = []
    for number, record in enumerate(records, 1):
        try:
            problems.append(read_problem(record))
        except UnmaskError as error:
            raise UnmaskError(f"{source}, problem {number}: {error}") from None
    return problems
