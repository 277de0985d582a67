"""Tasks: data and truth. See :class:`tasks.Task` for what a task must offer."""

from collections.abc import Callable

from tasks.errors import PuzzleFileError, UnknownNameError, UnmaskError
from tasks.sudoku import Sudoku
from tasks.task import Instances, Task
from tasks.text import Text

__all__ = [
    "Instances",
    "PuzzleFileError",
    "Sudoku",
    "Task",
    "Text",
    "UnknownNameError",
    "UnmaskError",
    "get",
    "names",
    "register",
]

_TASKS: dict[str, Callable[..., Task]] = {}


def register(name: str, factory: Callable[..., Task]) -> None:
    """Make ``get(name, **options)`` return ``factory(**options)``."""
    _TASKS[name] = factory


def names() -> list[str]:
    return sorted(_TASKS)


def get(name: str, **options) -> Task:
    """The task registered under ``name``.

    Raises:
        UnknownNameError: listing the known names.
    """
    if name not in _TASKS:
        raise UnknownNameError("task", name, _TASKS)
    return _TASKS[name](**options)


register("sudoku4", lambda **options: Sudoku(2, 2, **options))
register("sudoku6", lambda **options: Sudoku(2, 3, **options))
register("sudoku9", lambda **options: Sudoku(3, 3, **options))
register("text", Text)
