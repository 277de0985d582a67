"""Tasks by name, and names with options: ``text:novel.txt,length=128``; a user's own as ``my_task.py:Mine,size=4``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_args, get_origin

from tasks.errors import UnknownNameError, UnmaskError, first_line
from tasks.settings import alternatives
from tasks.task import Task, check_task

_TASKS: dict[str, Callable[..., Task]] = {}
_OWN: set[str] = set()  # modules that tasks of one's own were loaded from
WORDS: dict[object, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}
UNQUOTED_COMMA = re.compile(r',(?=(?:[^"]*"[^"]*")*[^"]*$)')


def register(name: str, factory: Callable[..., Task]) -> None:
    """Make ``get(name, **options)`` return ``factory(**options)``."""
    _TASKS[name] = factory


def names() -> list[str]:
    """The registered names, sorted."""
    return sorted(_TASKS)


def get(name: str, **options) -> Task:
    """The task registered under ``name``, which may carry what it reads and options: ``text:novel.txt,length=128``.

    After the colon come the task's ``source``, if named, and ``option=value`` pairs, separated by commas. A class or
    function of one's own that makes a task is named as ``package.module:Class`` or ``file.py:Class``, and what follows
    in the same way: ``my_task.py:Mine,size=4``, ``my_task.py:Mine:words.txt,size=4``.

    Raises:
        UnknownNameError: listing the known names. UnmaskError: an option that the task does not take, takes in another
            form, or cannot do without; a module, file or class that cannot be loaded or makes no task.
    """
    base, factory, details = _factory(name)
    options = read_options(f"task {name!r}", details, factory, options)
    asked = inspect.signature(factory).parameters.values()
    needed = [p.name for p in asked if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [option for option in needed if option not in options]
    if missing:
        example = f"{base}:SOURCE,option=value" if "source" in missing else f"{base}{_before(base)}{missing[0]}=VALUE"
        raise UnmaskError(f"task {name!r} needs {' and '.join(missing)}, as in {example}")
    task = _guarded(f"task {name!r}: {base} failed", partial(factory, **options)) if _own(name) else factory(**options)
    if not isinstance(task, Task):
        raise UnmaskError(f"task {name!r}: {base} made a {type(task).__name__}; it must make a tasks.Task")
    if ":" in name:
        task.name = name
    check_task(task)
    if _own(name):
        _OWN.add(getattr(factory, "__module__", ""))
    return task


def told_of_own(error: BaseException) -> str | None:
    """One line on an error that a task of one's own may have caused: with the last place in its own file that it came
    through, or where play failed over what it had returned. None: no such task was loaded."""
    if not _OWN:
        return None
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [(frame, line) for frame, line in frames if frame.f_globals.get("__name__") in _OWN]
    frame, line = (own or frames)[-1]
    more = "" if own else "; does your own task return what tasks.Task says?"
    return f"{frame.f_code.co_filename}, line {line}: {type(error).__name__}: {first_line(error)}{more}"


def known(name: str) -> bool:
    """Whether ``name``, with or without options, is registered, or may be a class of one's own (not loaded here)."""
    return name.partition(":")[0] in _TASKS or _own(name) is not None


def _before(base: str) -> str:
    """What stands between a task's name and its first option."""
    return "," if ":" in base else ":"


def _own(name: str) -> re.Match[str] | None:
    """``module`` (a file or a dotted name), ``attribute`` and ``details`` of a name of one's own task."""
    form = r"(?P<module>.+?\.py|[A-Za-z_]\w*(?:\.\w+)*):(?P<attribute>[A-Za-z_]\w*)(?:[:,](?P<details>.*))?"
    return None if name.partition(":")[0] in _TASKS else re.fullmatch(form, name, re.DOTALL)


def _unknown(name: str) -> UnknownNameError:
    return UnknownNameError("task", name, _TASKS, "your own: file.py:Class or package.module:Class")


def _factory(name: str) -> tuple[str, Callable[..., Task], str | None]:
    """The name without options, what makes the task, and the text of the options."""
    base, colon, details = name.partition(":")
    if base in _TASKS:
        return base, _TASKS[base], details if colon else None
    own = _own(name)
    if own is None:
        raise _unknown(base)
    module, attribute = own["module"], own["attribute"]
    if not module.endswith(".py") and not _importable(module.partition(".")[0]):
        raise _unknown(base)
    load = partial(_file, Path(module)) if module.endswith(".py") else partial(importlib.import_module, module)
    loaded = _guarded(f"cannot load {module}", load)
    factory = getattr(loaded, attribute, None)
    if not callable(factory):
        makers = [key for key, value in vars(loaded).items() if isinstance(value, type) and issubclass(value, Task)]
        makers = [key for key in makers if getattr(loaded, key).__module__ == loaded.__name__]
        raise UnmaskError(f"{module} has no class or function {attribute}; its tasks are {', '.join(makers) or 'none'}")
    return f"{module}:{attribute}", factory, own["details"]


def _importable(package: str) -> bool:
    """Whether there is such a package; the folder that one stands in is looked at last."""
    if not _found(package) and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return _found(package)


def _found(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # __main__, and others that were not imported
        return False


def _guarded(what: str, call: Callable[[], Any]) -> Any:
    """What ``call`` gives. Raises :class:`UnmaskError` for whatever a user's own code raises, ``SystemExit`` too."""
    try:
        return call()
    except UnmaskError:
        raise
    except (Exception, SystemExit) as error:
        raise UnmaskError(f"{what}: {type(error).__name__}: {first_line(error)}") from error


def _file(path: Path) -> ModuleType:
    """The module of a file, loaded once."""
    name = "unmask_task_" + re.sub(r"\W", "_", str(path.resolve()))
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise UnmaskError(f"there is no file {path}; name a task of your own as file.py:Class")
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def name_and_options(source: str | Path) -> tuple[str, str | None]:
    """``NAME:OPTIONS`` as its parts, for :func:`read_options`; what exists as it is written has no options, None."""
    if Path(source).exists():
        return str(source), None
    name, colon, text = str(source).partition(":")
    return name, text if colon else None


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
    try:
        known = inspect.signature(factory, eval_str=True).parameters
    except (TypeError, ValueError, NameError, AttributeError, SyntaxError) as error:  # annotations of a user's own
        raise UnmaskError(f"{what}: the arguments of {factory!r} cannot be read: {first_line(error)}") from None
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
        options[option] = _converted(what, option, value, _kind(known[option])) if option in known else value
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        bare = f" ({options['source']!r:.60} is not of the form option=value)" if "source" in unknown else ""
        raise UnmaskError(f"{what} takes {', '.join(known) or 'no options'}; not {', '.join(unknown)}{bare}")
    return options


def _kind(parameter: inspect.Parameter) -> object:
    """Its annotation; without one, the type of its default where text can mean that, else text."""
    if parameter.annotation is not parameter.empty:
        return parameter.annotation
    return type(parameter.default) if type(parameter.default) in WORDS else str


def _converted(what: str, option: str, value: str, kind: object) -> object:
    """``value`` as the type ``kind`` that the factory's annotation asks for; its range is for the factory to check."""
    types = [get_args(part)[0] if get_origin(part) is Annotated else part for part in alternatives(kind)]
    if not any(part in WORDS or get_origin(part) is Literal for part in types):
        raise UnmaskError(f"{what}: {option} can be given in Python alone, as it is no text, number, true or false")
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
        wanted = " or ".join(literals) or next(word for part, word in WORDS.items() if part in types)
        raise UnmaskError(f"{what}: {option} must be {wanted}, not {value!r}") from None
