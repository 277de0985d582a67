"""The numbers in the tables of results and examples: each is in a JSON of benchmarks/results that its page names, or
follows from the numbers of its row or column."""

import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
STORED = ROOT / "benchmarks" / "results"
PAGES = sorted(page for page in (ROOT / "docs" / "results").glob("*.md") if page.name != "README.md")
PAGES.append(ROOT / "docs" / "examples.md")
SCALES = (1.0, 100.0, 1 / 60, 1e-3, 1e-6, 2.0**-20, 2.0**-30)
"""A value as it stands, in per cent, in minutes, in thousands, millions, MiB, GiB."""
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t at 97.5 %, by the number of seeds."""
NUMBER = r"\d[\d,]*\.?\d*"


def stored(value: Any) -> Iterator[float]:
    """The numbers of a JSON, those in its texts too, and what its rows mean: failures, passes of all networks."""
    match value:
        case bool() | None:
            return
        case int() | float():
            yield float(value)
        case str():
            yield from map(float, re.findall(r"\d+\.?\d*", value))
        case list():
            for item in value:
                yield from stored(item)
            if len(value) > 1 and all(type(item) in (int, float) for item in value):
                yield statistics.fmean(value)
        case dict():
            if isinstance(value.get("solve_rate"), float) and "n" in value:
                yield (1 - value["solve_rate"]) * value["n"]
            if isinstance(value.get("passes"), float) and "policy_passes" in value:
                yield value["passes"] + value["policy_passes"]
            for item in value.values():
                yield from stored(item)


def named(text: str) -> Iterator[Path]:
    """The JSON that a text names, ``benchmarks/results/rewards-{a,b}.json`` included."""
    for stem in re.findall(r"benchmarks/results/([\w{},\-]+)\.json", text):
        before, _, rest = stem.partition("{")
        inside, _, after = rest.partition("}")
        for part in inside.split(","):
            yield STORED / f"{before}{part}{after}.json"


def linked(page: Path, text: str) -> Iterator[Path]:
    """The pages of results that a line links to."""
    for file in re.findall(r"\]\(([\w\-]+\.md)", text):
        yield page.parent / file


def cells(line: str) -> list[list[str]]:
    """The numbers of each cell of a table's line, without those in code and links."""
    plain = re.sub(r"`[^`]*`|\[[^\]]*\]\([^)]*\)|\b[0-9a-f]{7}\b", "", line)
    return [[n.rstrip(".,").replace(",", "") for n in re.findall(NUMBER, cell)] for cell in plain.strip("|").split("|")]


def tables(page: Path) -> Iterator[list[str]]:
    """The lines of each table below its head; those that describe a measurement (an empty head) are left out."""
    for block in re.findall(r"(?:^\|.*\n){3,}", page.read_text() + "\n", flags=re.MULTILINE):
        head, _, *lines = block.splitlines()
        if head.replace("|", "").strip():
            yield lines


def written(values: Iterable[float], digits: int) -> set[str]:
    """As a table has them. Halves may go either way."""
    return {f"{abs(v) + nudge:.{digits}f}" for v in values if abs(v) < 1e12 for nudge in (-1e-6, 1e-6)}


def over_seeds(numbers: Sequence[str]) -> Iterator[float]:
    """Mean and half of the 95 % interval over the seeds, of signs unknown."""
    for signs in itertools.product((1, -1), repeat=len(numbers)) if len(numbers) in T else ():
        values = [sign * float(number) for sign, number in zip(signs, numbers, strict=True)]
        yield statistics.fmean(values)
        yield T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def compared(these: Iterable[str], those: Iterable[str]) -> Iterator[float]:
    """Differences and shares of two numbers."""
    for first, second in itertools.product({float(n) for n in these}, {float(n) for n in those}):
        yield first - second
        if second:
            yield first / second


def follows(rows: list[list[list[str]]], row: list[list[str]]) -> Iterator[float]:
    """What the numbers of a table say of those of one of its rows: the seeds are in a cell, in the row, or the rows; a
    number in the row is compared with another there, or with one of its column."""
    first = [cell[0] for cell in row if cell]
    for seeds in (*row, *(cell[::3] for cell in row), first[:-1], first):
        yield from over_seeds(seeds)
    yield from compared(itertools.chain(*row), itertools.chain(*row))
    for column, cell in enumerate(row):
        others = [other[column] for other in rows if column < len(other) and other[column]]
        for start in range(len(others)):
            yield from over_seeds([other[0] for other in others[start : start + 3]])
        yield from compared(cell, itertools.chain(*others))


class Known:
    """The numbers of the JSON that pages name, as tables have them."""

    def __init__(self) -> None:
        self.values: dict[Path, list[float]] = {}
        self.sets: dict[tuple[Path, int], set[str]] = {}

    def has(self, page: Path, number: str, digits: int) -> bool:
        if page not in self.values:
            found = (json.loads(file.read_text()) for file in named(page.read_text()) if file.exists())
            self.values[page] = [v * scale for content in found for v in stored(content) for scale in SCALES]
        if (page, digits) not in self.sets:
            self.sets[page, digits] = written(self.values[page], digits)
        return number in self.sets[page, digits]


@pytest.fixture(scope="module")
def known() -> Known:
    return Known()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_number_of_a_table_is_in_a_committed_json(page: Path, known: Known) -> None:
    strange = []
    for lines in tables(page):
        rows = [cells(line)[1:] for line in lines]
        for line, row in zip(lines, rows, strict=True):
            for number in itertools.chain(*row):
                digits = len(number.partition(".")[2])
                if any(known.has(source, number, digits) for source in (page, *linked(page, line))):
                    continue
                last = 10.0**-digits  # what follows from rounded numbers may differ in the last place
                if all(abs(abs(value) - float(number)) > 1.01 * last for value in follows(rows, row)):
                    strange.append(f"{number}: {line[:110]}")
    assert not strange, "\n".join(strange)
