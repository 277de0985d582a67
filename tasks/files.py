"""Reading the files that users name, bounded and the same for every task, and writing files, atomically.

Lines end at a line feed, a carriage return or both, and nowhere else; a byte order mark is skipped; a line has the
number that it has in the file.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from tasks.errors import UnmaskError, first_line

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


def of_package(package: str, ending: str) -> list[Path]:
    """The files of an installed package that end so, in order; none where it is not installed.

    Args:
        package: its name in the registry; a version behind it (``name==1.2``) is not asked for.
    """
    try:
        files = importlib.metadata.files(package.partition("==")[0]) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    paths = (Path(str(file.locate())) for file in files if str(file).endswith(ending))
    return sorted(path for path in paths if path.is_file())


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
        why = ": there is no such file" if isinstance(reason, FileNotFoundError) else f" ({reason.__class__.__name__})"
        raise error(f"cannot read {path} as UTF-8 text{why}") from None


# ---------------------------------------------------------------------- writing
def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """``write`` fills a temporary file beside ``path``; it is flushed to disk, then renamed over ``path``.

    Raises:
        UnmaskError: the file cannot be written, for example on a full disk, or is a device or the like.
    """
    _check_place(path, str(path))
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UnmaskError(f"cannot write {path}: {error.strerror or first_line(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _check_place(path: Path, what: str) -> None:
    """Raises :class:`UnmaskError` where something else than a file is: to rename over a device, or over the system's
    links to one, would take it away from the whole machine."""
    try:
        if path.is_dir():
            raise UnmaskError(f"{what} is a folder; name a file")
        if (path.exists() and not path.is_file()) or (path.is_symlink() and path.parent.resolve() == Path("/dev")):
            raise UnmaskError(f"{what} is no regular file; name another")
    except (OSError, RuntimeError) as error:  # too long a name; links in a circle
        raise UnmaskError(f"cannot write {what}: {getattr(error, 'strerror', None) or first_line(error)}") from None


STDOUT = Path("-")
"""What ``--json -`` means."""


def check_writable(path: Path | None, option: str) -> None:
    """Before long work: a file can be written at ``path``, if any, its folder made where it is missing; nothing stays.

    Raises:
        UnmaskError: it cannot; ``option`` is what the message calls it.
    """
    if path is None or path == STDOUT:
        return
    if "\0" in str(path):
        raise UnmaskError(f"{option} cannot have a name with a null")
    _check_place(path, f"{option} {path}")
    made = absent(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _temporary(path).touch()
        _temporary(path).unlink()
        with contextlib.suppress(FileNotFoundError):
            os.close(os.open(path, os.O_WRONLY))  # a file that is there may be written over
    except OSError as error:
        raise UnmaskError(f"cannot write {option} {path}: {error.strerror}; name another file") from None
    finally:
        remove_empty(made)  # what is asked for may yet be refused


def absent(folder: Path) -> list[Path]:
    """``folder`` and those around it that do not exist, the innermost first."""
    return [each for each in (folder, *folder.parents) if not each.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Those of ``folders`` that hold nothing, in their order."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def report_json(path: Path | None, value: Any) -> None:
    """Write what a command's ``--json`` asks for: nothing, a file, or ``-``, stdout."""
    if path == STDOUT:
        print(json.dumps(value, indent=2))
    elif path is not None:
        write_json(path, value)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; a reader sees the old file or the whole new one."""
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))
