"""Tasks by name, and names with options: ``text:novel.txt,length=128``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Annotated, Literal, get_args, get_origin

from tasks.errors import UnknownNameError, UnmaskError
from tasks.settings import alternatives
from tasks.task import Task

_TASKS: dict[str, Callable[..., Task]] = {}
UNQUOTED_COMMA = re.compile(r',(?=(?:[^"]*"[^"]*")*[^"]*$)')


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
    by commas; each as the type that the factory's annotations ask for. Double quotes hold what has a comma or an equals
    sign: ``text:"a,b=c.txt",length=16``.

    Args:
        what: what it is part of, for messages. given: options from elsewhere.

    Raises:
        UnmaskError: an option that the factory does not take, or takes in another form.
    """
    known = inspect.signature(factory, eval_str=True).parameters
    options = dict(given or {})
    for place, detail in enumerate(UNQUOTED_COMMA.split(text) if text is not None else []):
        option, equals, value = ("", "", "") if detail.startswith('"') else detail.partition("=")
        if not equals and place == 0:
            option, value = "source", detail
        elif not equals:
            raise UnmaskError(f'{what}: {detail!r} is not of the form option=value; quote names with commas: "a,b"')
        value = value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
        if option in options:
            raise UnmaskError(f"{what}: {option} is given twice")
        options[option] = _converted(what, option, value, known[option].annotation) if option in known else value
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise UnmaskError(f"{what} takes {', '.join(known) or 'no options'}; not {', '.join(unknown)}")
    return options


def _converted(what: str, option: str, value: str, kind: object) -> object:
    """``value`` as the type ``kind`` that the factory's annotation asks for; its range is for the factory to check."""
    types = [get_args(part)[0] if get_origin(part) is Annotated else part for part in alternatives(kind)]
    literals = {str(choice): choice for part in types if get_origin(part) is Literal for choice in get_args(part)}
    try:
        if bool in types:
            return {"true": True, "false": False}[value.lower()]
        if literals:
            return literals[value]
        if str in types and value:
            return value
        return int(value) if int in types else float(value)
    except (KeyError, ValueError):
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}
        wanted = " or ".join(literals) or next(words[part] for part in words if part in types)
        raise UnmaskError(f"{what}: {option} must be {wanted}, not {value!r}") from None
