"""Settings that check themselves: a dataclass says beside each field what is allowed, and :func:`validate` holds it to
that before any work starts.

    @dataclass(frozen=True)
    class Config:
        steps: AtLeast1 = 4000
        lr: NotNegative = 2e-3
        schedule: Literal["cosine", "constant"] = "cosine"
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, wraps
from os import PathLike
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from tasks.errors import UnmaskError

P, R = ParamSpec("P"), TypeVar("R")
# Beyond these nothing is meant: what is larger is a slip, and would run out of memory or never end; what is smaller,
# and divides, would leave float32.
MOST, MOST_WIDE, MOST_DEEP, MOST_THREADS = 10**9, 2**16, 1000, 1024
LEAST = 1e-9


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be: from ``least`` to ``most``, and strictly ``above`` and ``below``, but not
    between 0 and a ``gap``. Messages mention a ``most`` of :data:`MOST` and the gap only to who meets them."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    gap: float = 0.0

    def holds(self, value: float) -> bool:
        """Whether ``value`` is in the range."""
        inside = self.least <= value <= self.most and self.above < value < self.below
        return inside and not 0 < value < self.gap

    def __str__(self) -> str:
        most = math.inf if self.most == MOST else self.most
        if -math.inf < self.least and most < math.inf:
            return f"between {self.least:g} and {most:g}"
        bounds = {"at least": self.least, "above": self.above, "below": self.below, "at most": most}
        shown = {word: "2**63" if bound == 2**63 else f"{bound:g}" for word, bound in bounds.items()}
        return " and ".join(f"{word} {shown[word]}" for word, bound in bounds.items() if math.isfinite(bound))


AtLeast1 = Annotated[int, Range(least=1, most=MOST)]
AtLeast2 = Annotated[int, Range(least=2, most=MOST)]
AtLeast0 = Annotated[int, Range(least=0, most=MOST)]
Width = Annotated[int, Range(least=1, most=MOST_WIDE)]
Depth = Annotated[int, Range(least=1, most=MOST_DEEP)]
Threads = Annotated[int, Range(least=1, most=MOST_THREADS)]
Seed = Annotated[int, Range(least=0, below=2**63)]
NotNegative = Annotated[float, Range(least=0, most=MOST)]
Positive = Annotated[float, Range(above=0, most=MOST, gap=LEAST)]
Temperature = Annotated[float, Range(least=0, most=MOST, gap=LEAST)]
Share = Annotated[float, Range(least=0, most=1)]
InnerShare = Annotated[float, Range(above=0, below=1)]
ShareBelow1 = Annotated[float, Range(least=0, below=1)]
ShareAbove0 = Annotated[float, Range(above=0, most=1)]


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def alternatives(kind: Any) -> list[Any]:
    """The types that an annotation allows beside None: the members of a union, or the annotation itself."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [member for member in members if member is not NoneType]


def validate(settings: Any) -> None:
    """Hold every field of a dataclass, and of those inside it, to its annotation: numbers to their kind and
    :class:`Range`, and to being finite; names to their ``Literal``.

    Raises:
        UnmaskError: in one line, for example ``steps must be a whole number of at least 1, not 0``.
    """
    hints = _hints(type(settings))
    for field in fields(settings):
        value = getattr(settings, field.name)
        check(field.name, value, hints[field.name])
        if is_dataclass(value) and not isinstance(value, type):
            validate(value)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of functions and constructors: holds the arguments of a call to their annotations, as :func:`validate`
    does fields."""
    signature = inspect.signature(function)

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        hints = _hints(function)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            check(name, value, hints.get(name, Any))
        return function(*args, **kwargs)

    return wrapper


def check(name: str, value: Any, kind: Any) -> None:
    """Hold one value to the annotation ``kind``. Raises :class:`tasks.UnmaskError` as :func:`validate`."""
    options = alternatives(kind)
    if value is None and NoneType in get_args(kind):
        return
    literals = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
    if literals:
        if value not in literals:
            raise UnmaskError(f"{name} must be {' or '.join(map(str, literals))}, not {value!r}")
        return
    option = options[0]
    base, *extras = get_args(option) if get_origin(option) is Annotated else (option,)
    if base is bool and not isinstance(value, bool):
        raise UnmaskError(f"{name} must be true or false, not {value!r}")
    if options == [str] and not isinstance(value, str | PathLike):
        raise UnmaskError(f"{name} must be text, not {value!r}")
    if base not in (int, float):
        return
    bounds = next((extra for extra in extras if isinstance(extra, Range)), Range())
    number = isinstance(value, int if base is int else int | float) and not isinstance(value, bool)
    if not (number and (isinstance(value, int) or math.isfinite(value)) and bounds.holds(value)):
        what = "a whole number" if base is int else "a number"
        said = f"at most {MOST:g}" if number and math.inf > value > bounds.most == MOST else str(bounds)
        if number and 0 < value < bounds.gap:
            said = f"at least {bounds.gap:g}{', or 0' if bounds.holds(0) else ''}"
        joint = " of " if said.startswith("at ") else " "
        raise UnmaskError(f"{name} must be {what}{joint if said else ''}{said}, not {value!r}")
