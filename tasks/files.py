"""Reading the files that users name: bounded, and the same for every task.

Lines end at a line feed, a carriage return or both, and nowhere else; a byte order mark is skipped; a line has the
number that it has in the file.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from tasks.errors import UnmaskError

Read = TypeVar("Read")
LARGEST = 2**30  # bytes of a text that is read at once
LONGEST = 2**20  # characters of a line


def read_text(path: str | Path, error: type[UnmaskError] = UnmaskError) -> str:
    """The text of a UTF-8 file, its lines ended by line feeds.

    Raises:
        UnmaskError: as ``error``: it is missing, unreadable, no regular file, too large, or in another encoding.
    """
    with _opened(path, error) as file:
        if Path(path).stat().st_size > LARGEST:
            raise error(f"{path} has more than {LARGEST // 2**20} MiB; split it into several files")
        return _guarded(path, error, file.read)


def read_lines(path: str | Path, error: type[UnmaskError] = UnmaskError) -> dict[int, str]:
    """By their numbers, the lines of a UTF-8 file that are not blank. Raises ``error`` as :func:`read_text`, and for a
    line of more than a million characters."""
    with _opened(path, error) as file:
        return {number: line.removesuffix("\n") for number, line in _lines(path, error, file) if line.strip()}


def read_rows(path: str | Path, error: type[UnmaskError] = UnmaskError) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of each line of a CSV file that is not empty, read as they are asked for. Raises ``error`` as
    :func:`read_lines`, and for a cell that csv does not take."""
    with _opened(path, error, newline="") as file:
        rows = csv.reader(line for _, line in _lines(path, error, file))
        while True:
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as reason:
                raise error(f"{path}, line {rows.line_num}: {reason}") from None
            if cells:
                yield rows.line_num, cells


def _opened(path: str | Path, error: type[UnmaskError], newline: str | None = None) -> IO[str]:
    if Path(path).exists() and not Path(path).is_file():  # a device or a pipe may never end
        raise error(f"{path} is no regular file; name a text file")
    if Path(path).exists() and Path(path).stat().st_size == 0:  # nor may what the kernel writes as it is read
        return io.StringIO()
    return _guarded(path, error, lambda: open(path, encoding="utf-8-sig", newline=newline))


def _lines(path: str | Path, error: type[UnmaskError], file: IO[str]) -> Iterator[tuple[int, str]]:
    number = 0
    while line := _guarded(path, error, lambda: file.readline(LONGEST + 1)):
        number += 1
        if len(line) > LONGEST:
            raise error(f"{path}, line {number} has more than {LONGEST:,} characters")
        yield number, line


def _guarded(path: str | Path, error: type[UnmaskError], read: Callable[[], Read]) -> Read:
    try:
        return read()
    except (OSError, ValueError) as reason:  # UnicodeDecodeError is a ValueError; so is a name with a null
        raise error(f"cannot read {path} as UTF-8 text ({reason.__class__.__name__})") from None
