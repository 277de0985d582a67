"""Whether what is decoded depends on the batch, on padding beside it, or on the number of threads.

    python benchmarks/invariance.py --out benchmarks/results/invariance.json

Packaged denoisers play held-out boards greedily; *order* is the sequence of positions that are filled,
and what they are filled with. A random model in the layout of each family of language models sees rows of all lengths,
padded on either side. Rows that differ are counted, with the largest difference of a log-probability at one forward of
the same boards (of padding: at masked positions); 0 is equality to the bit. *ties* has, of each row that differs, how
far apart the two choices were in log-probability, at most, on the last board that both plays share: below the
differences between forwards it was a tie.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from cache import LAYOUTS
from common import report
from torch import Tensor

import tasks
from tasks import Instances, Task, UnmaskError
from unmask_env.denoiser import load_denoiser
from unmask_env.families import FAMILIES, configure
from unmask_env.process import Unmasking
from unmask_env.reference import reference

PLAYED = {"sudoku4": "sudoku4", "countdown3": "countdown", "sudoku6-tiny": "sudoku6", "sudoku6-recurrent": "sudoku6"}
LETTERS = 12  # of the random models; then the padding, and the mask


Play = list[tuple[list[int], Tensor]]
"""Of one row its boards in turn, each with the log-probabilities (L, V) that were seen of it."""


def orders(process: Unmasking, instances: Instances, rule: str, batch: int) -> list[Play]:
    """Of every row, the boards of each step, by a greedy rule, in batches."""
    rows = []
    for start in range(0, len(instances), batch):
        played = process.rollout(reference(rule), instances[start : start + batch], record=True)
        boards = torch.stack([step.observation.tokens for step in played.steps] + [played.tokens], 1)  # (b, T, L)
        seen = torch.stack([step.observation.denoised.log_probs for step in played.steps], 1)  # (b, T, L, V)
        for each, said in zip(boards.tolist(), seen, strict=True):  # rows that end earlier idle
            changed = [t for t in range(len(each)) if t + 1 == len(each) or each[t] != each[t + 1]]
            rows.append([(each[t], said[min(t, len(said) - 1)]) for t in changed])
    return rows


def ties(one: Sequence[Play], other: Sequence[Play]) -> list[float]:
    """Of each row that was played otherwise, how far apart what was chosen was in log-probability, at most."""
    found = []
    for a, b in zip(one, other, strict=True):
        boards, again = ([board for board, _ in play] for play in (a, b))
        if boards == again:
            continue
        at = next(t for t in range(len(boards)) if boards[t] != again[t])
        before = boards[at - 1]
        choices = []
        for after in (boards[at], again[at]):
            position = next(i for i in range(len(before)) if before[i] != after[i])
            choices.append((position, after[position]))
        found.append(max(abs(float(play[at - 1][1][choices[0]] - play[at - 1][1][choices[1]])) for play in (a, b)))
    return found


def log_probs(denoiser: Any, tokens: Tensor, batch: int) -> Tensor:
    return torch.cat([denoiser(rows).log_probs for rows in tokens.split(batch)])


def difference(a: Tensor, b: Tensor) -> float:
    """The largest, where both are finite."""
    return float(torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(torch.inf).max())


def of_batch_and_threads(name: str, task_name: str, boards: int, rule: str, threads: tuple[int, int]) -> dict[str, Any]:
    """A denoiser at batches of 1 and 16, and at both numbers of threads."""
    task = tasks.get(task_name)
    denoiser, instances = load_denoiser(name, task), task.heldout(boards)
    process, found, likely = Unmasking(task, denoiser), {}, {}
    for count in threads:
        torch.set_num_threads(count)
        for batch in (1, 16):
            found[count, batch] = orders(process, instances, rule, batch)
            likely[count, batch] = log_probs(denoiser, instances.tokens, batch)
    torch.set_num_threads(threads[0])
    row: dict[str, Any] = {"denoiser": name, "task": task_name, "rows": boards}
    few, many = threads
    for what, one, other in (("batch", (few, 1), (few, 16)), ("threads", (few, 16), (many, 16))):
        row[f"{what}_ties"] = ties(found[one], found[other])
        row[f"{what}_rows_that_differ"] = len(row[f"{what}_ties"])
        row[f"{what}_difference"] = difference(likely[one], likely[other])
    return row


class Padded(Task):
    """Rows of letters, some of them masked, padded on one ``side`` to one length."""

    name, one_answer, pad_id = "padded", False, LETTERS

    def __init__(self, length: int, side: str) -> None:
        self.symbols, self.shape, self.pad_side = tuple(map(str, range(LETTERS + 1))), (1, length), side

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        raise UnmaskError("rows are made here; none can be drawn")

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return torch.zeros(len(tokens))

    def place(self, line: Tensor) -> slice:
        """Where a line stands among its padding."""
        return slice(self.length - len(line), None) if self.pad_side == "left" else slice(len(line))


def of_padding(layout: str, rows: int, rule: str) -> dict[str, Any]:
    """A random model of a family: rows of all lengths in one batch, padded on either side, and each row alone."""
    import transformers

    family, draws = FAMILIES[layout], torch.Generator().manual_seed(0)
    size = {"vocab_size": LETTERS + 2, "mask_token_id": LETTERS + 1, "pad_token_id": LETTERS}
    published = LAYOUTS[layout] | {"model_type": layout} | size
    torch.manual_seed(0)
    model = getattr(transformers, family.architecture)(configure(family, published, layout))
    for weight in model.parameters():  # as large as a trained model's
        weight.data.mul_(1.0 if weight.dim() == 1 else 8.0)
    lines = [torch.randint(LETTERS, (5 + i % 20,), generator=draws) for i in range(rows)]
    lines = [line.masked_fill(torch.rand(len(line), generator=draws) < 0.6, LETTERS + 1) for line in lines]
    found: dict[str, list[Any]] = {"alone": [], "left": [], "right": []}
    likely: dict[str, list[Tensor]] = {"alone": [], "left": [], "right": []}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        (Path(folder) / "config.json").write_text(json.dumps(published))
        for side in found:
            for batch in [[line] for line in lines] if side == "alone" else [lines]:
                task = Padded(max(map(len, batch)), "left" if side == "alone" else side)
                tokens = torch.full((len(batch), task.length), LETTERS)
                for row, line in zip(tokens, batch, strict=True):
                    row[task.place(line)] = line
                denoiser = load_denoiser(f"hf:{folder}", task)
                process = Unmasking(task, denoiser)
                played = orders(process, Instances(tokens, torch.zeros_like(tokens)), rule, len(batch))
                for line, boards, p in zip(batch, played, log_probs(denoiser, tokens, len(batch)), strict=True):
                    found[side].append([(board[task.place(line)], said[task.place(line)]) for board, said in boards])
                    likely[side].append(p[task.place(line)][line == LETTERS + 1])
    row: dict[str, Any] = {"layout": layout, "rows": rows}
    for what, one, other in (("batch", "alone", "left"), ("side", "left", "right")):
        row[f"{what}_ties"] = ties(found[one], found[other])
        row[f"{what}_rows_that_differ"] = len(row[f"{what}_ties"])
        row[f"{what}_difference"] = max(
            difference(a, b) for a, b in zip(likely[one], likely[other], strict=True) if a.numel()
        )
    return row


def main(boards: int = 16, rule: str = "max_confidence", out: Path | None = None) -> None:
    """Args: boards: of each task. rule: deterministic, over single positions."""
    work = [partial(of_batch_and_threads, name, task, boards, rule, (1, 2)) for name, task in PLAYED.items()]
    rows = []
    for measure in [*work, *(partial(of_padding, layout, boards, rule) for layout in FAMILIES)]:
        rows.append(measure())
        print(json.dumps(rows[-1]), flush=True)
        report(out, boards=boards, rule=rule, torch=torch.__version__, rows=rows)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
