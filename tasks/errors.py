"""The errors that mean "the user can mend this": the command line prints them as one line and exits with 2."""

import contextlib
import difflib
import shlex
from collections.abc import Iterable, Iterator

LONGEST = 300  # characters of a message


def suggestion(name: str, known: Iterable[str], before: str = "") -> str:
    """``; did you mean ...?`` with the names nearest to ``name``, two at most, each with ``before`` in front of it;
    empty where none is near."""
    by_lower = {other.lower(): other for other in known}
    alike = {other: difflib.SequenceMatcher(None, other, name.lower()).ratio() for other in by_lower}
    least = max(0.65, max(alike.values(), default=0.0) - 0.05)
    near = sorted((other for other in alike if alike[other] >= least), key=lambda other: -alike[other])[:2]
    return f"; did you mean {' or '.join(before + by_lower[other] for other in near)}?" if near else ""


class UnmaskError(ValueError):
    """A user's mistake. The message says in one line what was wrong, what is allowed and what to do; of a long one the
    middle is left out."""

    def __init__(self, message: str) -> None:
        line = " ".join(str(message).split())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST - 103]} … {line[-100:]}")


class UnknownNameError(UnmaskError):
    """A name (task, environment, denoiser, order, ...) that nothing is registered under; the message says which were
    likely meant, and which there are."""

    def __init__(self, kind: str, name: str, known: Iterable[str], more: str = "") -> None:
        names = sorted(known)
        meant = suggestion(name, names) or ";"
        super().__init__(
            f"unknown {kind} {name!r}{meant} known: {', '.join(names) or '(none)'}{'; ' * bool(more)}{more}"
        )


class IncompatibleDenoiserError(UnmaskError):
    """A denoiser that cannot serve the task: its vocabulary or length is another, or it fills no masks."""


class PuzzleFileError(UnmaskError):
    """A puzzle file that cannot be used; the message carries the file's name and the line number."""


class MissingLibraryError(UnmaskError, ImportError):
    """A library that not everybody needs, and that is not installed; the message names the extra that brings it."""

    def __init__(self, what: str, why: str, install: str) -> None:
        super().__init__(f"{what}: {why}; run: pip install {shlex.quote(install)}")


def first_line(error: Exception) -> str:
    """What another library's error says, in one line: its first, with the next where that one ends in a colon; its type
    where it says nothing."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first


@contextlib.contextmanager
def optional(what: str, install: str) -> Iterator[None]:
    """Around the imports of libraries that only ``what`` needs::

        with optional("workers of Ray", "unmask[ray]"):
            import ray

    Raises:
        MissingLibraryError: one cannot be imported; the message says why, and what pip is to ``install``.
    """
    try:
        yield
    except ImportError as error:
        raise MissingLibraryError(what, first_line(error), install) from None
