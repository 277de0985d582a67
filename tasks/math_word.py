"""Word problems with an answer that can be checked, in the formats of GSM8K and MATH-500, for pretrained models.

A sequence is the prompt, padded on its left, and an answer region of fixed length, which an instance hides. What is
written there is right if the answer found in it equals the problem's (library ``math-verify``).
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks import reasoning
from tasks.errors import UnmaskError, first_line
from tasks.files import read_lines
from tasks.grading import DEADLINE, Deadline, check_library, grade
from tasks.reasoning import Problem
from tasks.settings import AtLeast0, AtLeast1, ShareAbove0, checked
from tasks.task import DATA, SPLITS, Instances, Task, random_rows
from tasks.text import load_datasets
from tasks.tokenizers import all_tokens, load_tokenizer

SAMPLE = DATA / "math_sample.jsonl"
# Tokens that end what a chat model says, where the tokenizer does not tell.
ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end_of_turn|>", "<|eom_id|>", "<|end|>", "<turn|>")


def read_problem(record: dict[str, Any]) -> Problem:
    """A record of GSM8K (question, and an answer that ends in ``#### 42``) or of MATH-500 (problem, solution, answer).

    Raises:
        UnmaskError: it is neither.
    """
    question, answer = record.get("question", record.get("problem")), record.get("answer")
    if not all(isinstance(text, str) and text.strip() for text in (question, answer)):
        names = ", ".join(sorted(record))[:100]
        raise UnmaskError(
            f"a problem needs 'question' or 'problem', and 'answer', as text; it has {names or 'nothing'}"
        )
    if "problem" in record:
        return Problem(question.strip(), str(record.get("solution", answer)), answer.strip())
    _, marked, final = answer.rpartition("####")
    if not final.strip():
        raise UnmaskError("an answer ends in '####' without anything behind it")
    return Problem(question.strip(), answer.strip() if marked else final.strip(), final.strip().replace(",", ""))


def is_right(text: str, answer: str) -> bool:
    """Whether the answer found in ``text`` equals ``answer``: :func:`tasks.grading.grade` of one."""
    return grade([(text, answer)])[0]


class MathWord(Task):
    """Answer word problems, with a pretrained model as the denoiser (``hf:``).

    Args:
        source: ``sample`` (30 short problems written for this package, all for test), a file of JSON lines, ``hf:``
            and a dataset id, whose splits are used, or ``gym:`` and a kind of problem of reasoning-gym with one right
            answer, or Countdown (1,000 for training, 200 for validation and test each).
        tokenizer: a folder or hub id of a tokenizer of ``transformers``, or one of them. One with a chat template is
            asked in its form.
        answer_length: tokens of the answer region. subset: of a dataset.
        train: a file of problems to train on, of which the last tenth is for validation; all of ``source``, another
            file, is then for test.
        test: share of a file's problems that are for test, and as many for validation where that leaves some; by
            default a tenth, and all of ``sample``.
        shots: how many training problems stand solved before each question, always the first ones; in a chat as turns.
        deadline: seconds that grading an answer may take; one that takes longer is wrong.
        trust_remote_code: run the tokenizer's own code, where it brings some. Only for sources that you trust.

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
        deadline: Deadline = DEADLINE,
        trust_remote_code: bool = False,
        train: str | None = None,
        test: ShareAbove0 | None = None,
        shots: AtLeast0 = 0,
    ) -> None:
        if tokenizer is None:
            raise UnmaskError("name the model's tokenizer: math:sample,tokenizer=FOLDER_OR_ID")
        splits = _read(source, subset, train, test)  # before the tokenizer, which may have to come from a hub
        if any(problem.check is None for problems in splits.values() for problem in problems):
            check_library()  # before a run, not at its first answer
        self.tokenizer, self.deadline = load_tokenizer(tokenizer, trust_remote_code, pads=True), deadline
        self.name, self.pad_id, self.pad_side = "math", int(self.tokenizer.pad_token_id), "left"
        self.symbols = all_tokens(self.tokenizer)
        self._shots = _examples(splits.get("train", ()), shots)
        splits = {split: problems[shots if split == "train" else 0 :] for split, problems in splits.items()}
        prompts = {split: [self._prompt(p.question) for p in problems] for split, problems in splits.items()}
        self.prompt_length = max(map(len, itertools.chain(*prompts.values())))
        self.shape = (1, self.prompt_length + answer_length)
        end = self.tokenizer.eos_token_id
        self._fill = fill = self.pad_id if end is None else end
        self._ends = {fill, *self._end_of_turn()} | ({self.tokenizer.sep_token_id} if end is None else set())
        self._answers: dict[str, Tensor] = {}
        self._problems: dict[tuple[int, ...], Problem] = {}  # by prompt
        for split, problems in splits.items():
            rows = []
            for prompt, problem in zip(prompts[split], problems, strict=True):
                given = [self.pad_id] * (self.prompt_length - len(prompt)) + prompt
                solution = self.tokenizer.encode(" " + problem.solution, add_special_tokens=False)[:answer_length]
                rows.append(given + solution + [fill] * (answer_length - len(solution)))
                self._problems[tuple(given)] = problem
            self._answers[split] = torch.tensor(rows, dtype=torch.int64)

    def _prompt(self, question: str) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None):
            return self.tokenizer.encode(self._chat(question), add_special_tokens=False)
        solved = "".join(f"Question: {p.question}\nAnswer: {p.solution}\n\n" for p in self._shots)
        return self.tokenizer.encode(f"{solved}Question: {question}\nAnswer:", add_special_tokens=False)

    def _chat(self, question: str, *replies: str) -> str:
        """Question and replies in the form of the chat template, with its prompt for a reply where there is none."""
        turns = [turn for p in self._shots for turn in (("user", p.question), ("assistant", p.solution))]
        turns += [("user", question), *(("assistant", text) for text in replies)]
        said = [{"role": role, "content": text} for role, text in turns]
        try:
            return self.tokenizer.apply_chat_template(said, add_generation_prompt=not replies, tokenize=False)
        except Exception as error:  # templates are programs, in as many forms as there are models
            raise UnmaskError(f"the tokenizer's chat template fails: {first_line(error)}") from None

    def _end_of_turn(self) -> set[int]:
        """The tokens that end a reply, as the chat template says or by their usual names."""
        ends = {self.symbols.index(name) for name in ENDS_OF_TURN if name in self.symbols}
        if getattr(self.tokenizer, "chat_template", None):
            with contextlib.suppress(UnmaskError):  # a template may know no replies
                behind = self._chat("a", "reply").rpartition("reply")[2]
                first = self.tokenizer.encode(behind, add_special_tokens=False)[:1]
                ends |= {*first} & {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        return ends

    def _split(self, split: str) -> Tensor:
        if split not in self._answers:  # MATH-500, for example, is for testing alone
            more = "; test=0.1, or train=FILE, gives some" if [*self._answers] == ["test"] else ""
            raise UnmaskError(f"{self.name} has no {split} problems, only {', '.join(self._answers)}{more}")
        return self._answers[split]

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        answers = self._split("train")
        return self.behind_prompt(answers[random_rows(len(answers), n, generator)].to(generator.device))

    def heldout(self, n: int | None = None, split: str = "test") -> Instances:
        return self.first(n, self.behind_prompt(self._split(split)), f"{split} problems")

    def settled(self, tokens: Tensor) -> Tensor:
        """As :meth:`tasks.Task.settled`: an answer is over at its first end token that no hole stands before."""
        answers = tokens[:, self.prompt_length :]
        ends = torch.isin(answers, torch.tensor(sorted(self._ends), device=tokens.device))
        open_before = (answers == self.mask_id).long().cumsum(1) > 0
        over = (ends & ~open_before).long().cumsum(1) > 0
        answers = torch.where(over & (answers == self.mask_id), self._fill, answers)
        return torch.cat([tokens[:, : self.prompt_length], answers], 1)

    def written(self, tokens: Tensor) -> str:
        """The text of the answer region of one sequence, up to its first end token or end of a turn."""
        answer = itertools.takewhile(lambda token: token not in self._ends, tokens[self.prompt_length :].tolist())
        return self.tokenizer.decode([*answer], skip_special_tokens=True)

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        """1 where the answer is complete and right."""
        right = (tokens != self.mask_id).all(1).tolist()
        prompts, tokens = instances.tokens[:, : self.prompt_length].tolist(), tokens.cpu()
        graded = {}  # by row, text and answer
        for row in [row for row, complete in enumerate(right) if complete]:
            problem, text = self._problems[tuple(prompts[row])], self.written(tokens[row])
            if problem.check is None:
                graded[row] = text, problem.answer
            else:
                right[row] = problem.check(text)
        for row, verdict in zip(graded, grade([*graded.values()], self.deadline), strict=True):
            right[row] = verdict
        return torch.tensor(right, dtype=torch.float32, device=instances.tokens.device)

    def metrics(self, tokens: Tensor, instances: Instances) -> dict[str, Tensor]:
        return {"solved": self.reward(tokens, instances)}

    def draw(self, tokens: Tensor) -> str:
        """Prompt and answer as text, holes as blanks."""
        kept = [int(token) for token in tokens if int(token) != self.pad_id]
        runs = [(hole, [*run]) for hole, run in itertools.groupby(kept, lambda token: token == self.mask_id)]
        return "".join("_" * len(run) if hole else self.tokenizer.decode(run) for hole, run in runs)


def _read(source: str, subset: str | None, train: str | None, test: float | None) -> Mapping[str, Sequence[Problem]]:
    of_file = not source.startswith(("gym:", "hf:"))
    if not of_file and (train is not None or test is not None):
        raise UnmaskError(f"train and test divide files; {source} has splits of its own")
    if source.startswith("gym:"):
        kind, sizes = source.removeprefix("gym:"), (1000, 200, 200)
        return {split: reasoning.problems(kind, n, split) for split, n in zip(SPLITS, sizes, strict=True)}
    if source.startswith("hf:"):
        records: dict[str, Sequence[dict[str, Any]]] = load_datasets(source.removeprefix("hf:"), subset)
        splits = {
            split: _problems({f"problem {i}": record for i, record in enumerate(records[split], 1)}, source)
            for split in SPLITS
            if split in records
        }
        if not splits:
            raise UnmaskError(f"{source} has none of the splits {', '.join(SPLITS)}, only {', '.join(records)}")
        return splits
    problems = _of_file(source)
    if train is not None:
        if test is not None:
            raise UnmaskError("name train or test: with a train file all of the source is for test")
        learned = _of_file(train)
        held = max(1, len(learned) // 10)
        if len(learned) <= held:
            raise UnmaskError(f"{train} has {len(learned)} problems; at least 2 are needed")
        return {"train": learned[:-held], "validation": learned[-held:], "test": problems}
    share = test or (1.0 if source == "sample" else 0.1)
    if share < 1 and len(problems) < len(SPLITS):
        raise UnmaskError(
            f"{source} has {len(problems)} problems; at least {len(SPLITS)} are needed, one for each split, or test=1"
        )
    if share == 1:
        return {"test": problems}
    held = max(1, int(share * len(problems)))
    mixed = problems[::3] + problems[1::3] + problems[2::3]  # files may be sorted by kind
    rest = len(mixed) - held
    looked_at = min(held, rest // 2)
    return {"train": mixed[: rest - looked_at], "validation": mixed[rest - looked_at : rest], "test": mixed[rest:]}


def _examples(problems: Sequence[Problem], shots: int) -> Sequence[Problem]:
    """The training problems that stand solved before each question, and are not trained on."""
    if shots and shots >= len(problems):
        raise UnmaskError(
            f"{shots} shots need more training problems than the {len(problems)} there are; name train=FILE"
        )
    return problems[:shots]


def _of_file(source: str) -> list[Problem]:
    path = SAMPLE if source == "sample" else Path(source)
    parsed: dict[str, dict[str, Any]] = {}
    for number, line in read_lines(path).items():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise UnmaskError(f"{path}, line {number}: not JSON") from None
        if not isinstance(record, dict):
            raise UnmaskError(f"{path}, line {number}: not a record of JSON")
        parsed[f"line {number}"] = record
    return _problems(parsed, str(path))


def _problems(records: Mapping[str, dict[str, Any]], source: str) -> list[Problem]:
    """Of records by where they stand in ``source``."""
    problems = []
    for place, record in records.items():
        try:
            problems.append(read_problem(record))
        except UnmaskError as error:
            raise UnmaskError(f"{source}, {place}: {error}") from None
    return problems
