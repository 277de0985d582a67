"""What grading answers in processes of their own costs, beside math-verify alone.

    python benchmarks/grading.py --out benchmarks/results/grading.json

Each repeat is a fresh process per side and kind of answer, in turn. *Cold* is the first ``--answers`` of a process: the
import of math-verify counts on both sides, and starting processes on ours. *Warm* is as many others after them. Half of
the answers are right. Processor seconds are those of the process and of those that it starts.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import tyro
from common import median_ratio, report

from tasks import grading

Kind = Literal["numbers", "formulas"]
FORMULAS = (
    "\\frac{{{a}}}{{{b}}}",
    "{a}\\sqrt{{{b}}}",
    "{a}x^2+{b}x-{c}",
    "(-{a}, {b})",
    "{a}.{b}",
    "\\frac{{{a}\\pi}}{{{b}}}",
)


def ordinary(kind: Kind, n: int, seed: int) -> list[tuple[str, str]]:
    """Texts as of GSM8K (numbers) or MATH (formulas), with the answers; no two are equal."""
    draw, asked = random.Random(seed), []
    for index in range(n):
        a, b, c, wrong = draw.randint(2, 5000), draw.randint(2, 99), draw.randint(2, 99), index % 2
        form = "{a}" if kind == "numbers" else FORMULAS[index // 2 % len(FORMULAS)]
        right, given = form.format(a=a, b=b, c=c), form.format(a=a + wrong, b=b, c=c)
        given = given if kind == "numbers" else f"${given}$"
        asked.append((f"First {b} + {c} = {b + c}. Then {c} * 3 = {c * 3}.\nSo the answer is {given}.", right))
    return asked


def seconds() -> tuple[float, float]:
    """By the clock, and of processors: this process's, its ended children's and the graders'."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    spent = sum(usage.ru_utime + usage.ru_stime for usage in used)
    for worker in grading._pool._workers:
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        spent += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), spent


def one_side(side: str, kind: Kind, answers: int, seed: int) -> None:
    """Prints, cold and warm, the seconds by the clock and of processors, and how many were right."""
    rows = []
    for part in range(2):
        asked = ordinary(kind, answers, 2 * seed + part)
        started = seconds()
        if side == "pool":
            right = sum(grading.grade(asked))
        else:
            import math_verify

            logging.disable(logging.CRITICAL)  # says that timeouts are off
            parse, verify = math_verify.parse, math_verify.verify
            right = sum(
                verify(
                    parse(f"${answer}$", parsing_timeout=None), parse(text, parsing_timeout=None), timeout_seconds=None
                )
                for text, answer in asked
            )
        rows.append([*(after - before for after, before in zip(seconds(), started, strict=True)), right])
    print(json.dumps(rows))


def main(
    answers: int = 1000,
    repeats: int = 3,
    side: Literal["both", "pool", "alone"] = "both",
    kind: Kind = "numbers",
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Args: side, kind: other than *both* for one measurement of one kind, which prints its seconds."""
    if side != "both":
        return one_side(side, kind, answers, seed)
    rows = []
    for each in ("numbers", "formulas"):
        taken: dict[str, list[list[list[float]]]] = {"pool": [], "alone": []}
        for repeat in range(repeats):
            for name, found in taken.items():
                how = ["--side", name, "--kind", each, "--answers", str(answers), "--seed", str(repeat)]
                said = subprocess.run([sys.executable, __file__, *how], check=True, capture_output=True, text=True)
                found.append(json.loads(said.stdout))
        for part, when in enumerate(("cold", "warm")):
            sides = {name: [run[part] for run in found] for name, found in taken.items()}
            row = {
                "kind": each,
                "when": when,
                "same_verdicts": [s[2] for s in sides["pool"]] == [s[2] for s in sides["alone"]],
            }
            for index, unit in enumerate(("clock", "processor")):
                columns = {name: [side[index] for side in found] for name, found in sides.items()}
                row |= {f"{name}_{unit}_s": [round(value, 2) for value in column] for name, column in columns.items()}
                row[f"{unit}_ratio"] = round(median_ratio(columns["pool"], columns["alone"]), 2)
            rows.append(row)
            print(json.dumps(row), flush=True)
    report(out, answers=answers, repeats=repeats, cores=os.cpu_count(), load=round(os.getloadavg()[0], 1), rows=rows)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
