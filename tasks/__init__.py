"""Tasks: data and truth. See :class:`tasks.Task` for what a task must offer."""

import inspect
from collections.abc import Callable
from functools import partial
from types import NoneType, UnionType
from typing import Literal, get_args, get_origin

from tasks.countdown import Countdown
from tasks.errors import PuzzleFileError, UnknownNameError, UnmaskError
from tasks.lines import Lines
from tasks.math_word import MathWord
from tasks.sudoku import Sudoku
from tasks.tabular import Tabular
from tasks.task import Infilling, Instances, Task
from tasks.text import Text
from tasks.zebra import Zebra

__all__ = [
    "Countdown",
    "Infilling",
    "Instances",
    "Lines",
    "MathWord",
    "PuzzleFileError",
    "Sudoku",
    "Tabular",
    "Task",
    "Text",
    "UnknownNameError",
    "UnmaskError",
    "Zebra",
    "get",
    "names",
    "read_options",
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
        UnknownNameError: listing the known names. UnmaskError: an option that the task does not take, takes in another
            form, or cannot do without.
    """
    base, colon, details = name.partition(":")
    if base not in _TASKS:
        raise UnknownNameError("task", base, _TASKS)
    options = read_options(f"task {name!r}", details if colon else None, _TASKS[base], options)
    asked = inspect.signature(_TASKS[base]).parameters.values()
    needed = [p.name for p in asked if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [option for option in needed if option not in options]
    if missing:
        raise UnmaskError(f"task {name!r} needs {' and '.join(missing)}, as in {base}:SOURCE,option=value")
    task = _TASKS[base](**options)
    if colon:
        task.name = name
    return task


def read_options(
    what: str, text: str | None, factory: Callable[..., object], given: dict[str, object] | None = None
) -> dict[str, object]:
    """Keyword arguments of ``factory`` from ``text``: its ``source``, if named, and ``option=value`` pairs, separated
    by commas; each as the type that the factory's annotations ask for.

    Args:
        what: what it is part of, for messages. given: options from elsewhere.

    Raises:
        UnmaskError: an option that the factory does not take, or takes in another form.
    """
    known = inspect.signature(factory, eval_str=True).parameters
    options = dict(given or {})
    for place, detail in enumerate(text.split(",") if text is not None else []):
        option, equals, value = detail.partition("=")
        if not equals and place == 0:
            option, value = "source", detail
        elif not equals:
            raise UnmaskError(f"{what}: {detail!r} is not of the form option=value")
        if option in options:
            raise UnmaskError(f"{what}: {option} is given twice")
        options[option] = _converted(what, option, value, known[option].annotation) if option in known else value
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise UnmaskError(f"{what} takes {', '.join(known) or 'no options'}; not {', '.join(unknown)}")
    return options


def _converted(what: str, option: str, value: str, kind: object) -> object:
    """``value`` as the type that the task's constructor asks for."""
    kinds = [part for part in (get_args(kind) if get_origin(kind) is UnionType else (kind,)) if part is not NoneType]
    literal = [choice for part in kinds if get_origin(part) is Literal for choice in get_args(part)]
    try:
        if bool in kinds:
            return {"true": True, "false": False}[value.lower()]
        if literal and value not in literal:
            raise ValueError
        if str in kinds or literal:
            if not value:
                raise ValueError
            return value
        return int(value) if int in kinds else float(value)
    except (KeyError, ValueError):
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}
        wanted = " or ".join(literal) or next(names[part] for part in names if part in kinds)
        raise UnmaskError(f"{what}: {option} must be {wanted}, not {value!r}") from None


register("sudoku4", partial(Sudoku, 2, 2))
register("sudoku6", partial(Sudoku, 2, 3))
register("sudoku9", partial(Sudoku, 3, 3))
register("text", Text)
register("lines", Lines)
register("zebra", Zebra)
register("countdown", Countdown)
register("math", MathWord)
register("tabular", Tabular)
