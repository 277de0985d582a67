"""Tasks: data and truth. See :class:`tasks.Task` for what a task must offer."""

import inspect
import json
from collections.abc import Callable
from functools import partial

from tasks.errors import PuzzleFileError, UnknownNameError, UnmaskError
from tasks.sudoku import Sudoku
from tasks.tabular import Tabular
from tasks.task import Infilling, Instances, Task
from tasks.text import Text

__all__ = [
    "Infilling",
    "Instances",
    "PuzzleFileError",
    "Sudoku",
    "Tabular",
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
    """The task registered under ``name``, which may carry what it reads and options: ``text:novel.txt,length=128``.

    After the colon come the task's ``source``, if named, and ``option=value`` pairs, separated by commas.

    Raises:
        UnknownNameError: listing the known names. UnmaskError: an option that the task does not take.
    """
    base, _, details = name.partition(":")
    if base not in _TASKS:
        raise UnknownNameError("task", base, _TASKS)
    for place, detail in enumerate(details.split(",") if details else []):
        option, given, value = detail.partition("=")
        if not given and place == 0:
            options["source"] = detail
        elif not given:
            raise UnmaskError(f"task {name!r}: {detail!r} is not of the form option=value")
        else:
            try:
                options[option] = json.loads(value.lower() if value in ("True", "False") else value)
            except json.JSONDecodeError:
                options[option] = value
    try:
        inspect.signature(_TASKS[base]).bind(**options)
    except TypeError:
        known = [*inspect.signature(_TASKS[base]).parameters]
        raise UnmaskError(f"task {base!r} takes {', '.join(known) or 'no options'}; not {', '.join(options)}") from None
    return _TASKS[base](**options)


register("sudoku4", partial(Sudoku, 2, 2))
register("sudoku6", partial(Sudoku, 2, 3))
register("sudoku9", partial(Sudoku, 3, 3))
register("text", Text)
register("tabular", Tabular)
