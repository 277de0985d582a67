"""The errors that mean "the user can mend this": the command line prints them as one line and exits with 2."""

from collections.abc import Iterable


class UnmaskError(ValueError):
    """A user's mistake. The message says what was wrong, what is allowed and what to do."""


class UnknownNameError(UnmaskError):
    """A name (task, environment, denoiser, order, ...) that nothing is registered under."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown {kind} {name!r}; known: {', '.join(sorted(known)) or '(none)'}")


class PuzzleFileError(UnmaskError):
    """A puzzle file that cannot be used; the message carries the file's name and the line number."""


def first_line(error: Exception) -> str:
    """What another library's error says, in one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
