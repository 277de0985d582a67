"""The options of a command: its help, what an unknown one may have meant, and settings read back from a file.

All of it is read from the settings' dataclass: names, types, defaults, and the text beside each field. tyro reads the
line itself (:mod:`agents.cli`).
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import tyro

from pretrain.checkpoint import CheckpointError, read_json
from tasks import UnmaskError
from tasks.errors import suggestion
from tasks.settings import alternatives, check

COMMON = (
    "task", "env", "denoiser", "out", "to", "base", "orders", "order", "actions", "index", "limit", "json", "exact",
    "html", "gif", "reference", "iterations", "steps", "puzzles", "beta", "init", "passes", "lr", "batch", "dim",
    "layers", "samples", "seed", "device", "resume",
)  # fmt: skip
"""What most people ask for, the most important first; help begins with the first ten that a command has."""
HEADINGS = {
    "what is played": (
        "puzzles", "limit", "difficulty", "split", "blanks", "index", "samples", "truncated", "reference", "exact",
        "orders", "order", "threshold",
    ),
    "rules of play": (
        "actions", "on_illegal", "nfe_budget", "block_length", "remask_budget", "speed", "speed_bonus", "canvas_steps",
        "stop_entropy", "stop_stable", "temperature", "fill_temperature",
    ),
    "optimisation": (
        "steps", "batch", "lr", "warmup", "schedule", "weight_decay", "grad_clip", "ema", "epochs", "minibatches",
        "clip", "anneal", "normalise", "gae_lambda", "critic_weight", "order_lr",
    ),
    "validation": ("validate_every", "validation_puzzles"),
    "the run and the machine": (
        "seed", "resume", "save_every", "log_every", "wandb", "device", "threads", "bf16", "compile", "half",
        "forward_batch", "rows", "batch",
    ),
}  # fmt: skip
"""Under which heading help lists the others; those of a part, such as ``policy``, have their own, and so has what is
peculiar to a command."""
PARTS = {"rules": "rules of play", "policy": "the policy's network"}
WORDS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
EXPECTED = {"INT": "a whole number", "FLOAT": "a number"}
CONFIG = "settings of a run (its run.json), or a JSON object of them; options on the line win"


class Option(NamedTuple):
    """One field of the settings. ``form`` is what follows the flag (empty: nothing); ``part`` the field of the nested
    dataclass that it stands in; ``positional``: it is typed without a flag."""

    name: str
    form: str
    default: Any
    text: str
    part: str = ""
    positional: bool = False

    @property
    def flag(self) -> str:
        """As it is typed: ``--batch``; a positional one is its name in capitals."""
        return self.name.upper() if self.positional else "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is dataclasses.MISSING

    @property
    def flags(self) -> tuple[str, ...]:
        """All that may be typed: one that is on or off also has ``--no-``."""
        return (self.flag,) if self.form else (self.flag, f"--no-{self.flag[2:]}")


@cache
def _hints(settings: type) -> dict[str, Any]:
    return get_type_hints(settings, include_extras=True)


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def options_of(settings: type) -> list[Option]:
    """The options of a dataclass and of those inside it, in the order of its fields."""
    texts, options = texts_of(settings), []
    for field in dataclasses.fields(settings):
        kind = alternatives(_hints(settings)[field.name])[0]
        if dataclasses.is_dataclass(kind):
            inner = _default(field)
            options += [
                option._replace(part=field.name, default=getattr(inner, option.name)) for option in options_of(kind)
            ]
        else:
            positional = get_args(kind)[1:] == get_args(tyro.conf.Positional[str])[1:] != ()
            text = texts.get(field.name, "")
            options.append(Option(field.name, form_of(kind), _default(field), text, positional=positional))
    return options


def form_of(kind: Any) -> str:
    """What is typed behind the flag: ``INT``, ``{easy,hard}``, ``TEXT [TEXT ...]``; nothing behind a switch."""
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_origin(kind) is tuple:
        word = form_of(get_args(kind)[0])
        return f"{word} [{word} ...]"
    return "" if kind is bool else WORDS.get(kind, "TEXT")


# ---------------------------------------------------------------------- texts
@cache
def texts_of(settings: type) -> dict[str, str]:
    """What the source says of each field: the string below it, or its entry among the class's ``Attributes``. Empty
    where there is no source."""
    texts: dict[str, str] = {}
    for kind in reversed(settings.__mro__):
        if not dataclasses.is_dataclass(kind):
            continue
        try:
            [parsed] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        except (OSError, SyntaxError):
            continue
        attributes = re.search(r"^Attributes:\n(.*?)(?=^\S|\Z)", inspect.getdoc(kind) or "", re.DOTALL | re.MULTILINE)
        if attributes is not None:
            for names, text in re.findall(r"^    (\w[\w, ]*): (.*(?:\n     .*)*)", attributes[1], re.MULTILINE):
                texts |= dict.fromkeys(names.split(", "), text)
        for field, text in zip(parsed.body, parsed.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[field.target.id] = str(text.value.value)
    return texts


def plain(text: str, names: Sequence[str] = ()) -> str:
    """``text`` in one line without marks of reStructuredText or Markdown; those of ``names`` as they are typed."""

    def word(match: re.Match[str]) -> str:
        return "--" + match[1].replace("_", "-") if match[1] in names else match[1]

    text = re.sub(r":\w+:`~?([^`]+)`", r"\1", text)
    text = re.sub(r"``(.+?)``", word, text, flags=re.DOTALL)
    return " ".join(re.sub(r"\*\*(.+?)\*\*", r"\1", text, flags=re.DOTALL).split())


def shown_default(option: Option) -> str:
    """A default as it would be typed; empty where there is none to show."""
    if option.required:
        return "(required)"
    if option.default is None or option.default is False or option.default == ():
        return ""
    if option.default is True:
        return "(default: on)"
    values = option.default if isinstance(option.default, tuple) else (option.default,)
    return f"(default: {' '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in values)})"


def grouped(options: Sequence[Option]) -> Iterator[tuple[str, list[Option]]]:
    """Each heading with its options, every option once: the ten most common, what is peculiar to the command, and the
    others by what they are about."""
    ranked = {name: rank for rank, name in enumerate(COMMON)}
    known = sorted((o for o in options if o.required or o.name in ranked), key=lambda o: ranked.get(o.name, -1))
    common = sorted(sorted(known, key=lambda o: not o.required)[:10], key=lambda o: not o.required)
    yield "common options", common
    rest = [option for option in options if option not in common]
    by_heading: dict[str, list[Option]] = {}
    for option in rest:
        of_name = (title for title, names in HEADINGS.items() if option.name in names)
        heading = PARTS.get(option.part) or next(of_name, "of this command")
        by_heading.setdefault(heading, []).append(option)
    for heading in ("of this command", *HEADINGS, *PARTS.values()):
        if heading in by_heading:
            yield heading, by_heading.pop(heading)


def help_of(command: str, settings: type) -> str:
    """The help of ``unmask COMMAND``, at most 100 columns wide."""
    options = options_of(settings)
    names, width = [option.name for option in options], min(100, shutil.get_terminal_size().columns)
    required = "".join(f" {o.flag}" if o.positional else f" {o.flag} {o.form}" for o in options if o.required)
    about = re.split(r"\n\n?(?:Attributes|Args|Raises|Returns):\n", inspect.getdoc(settings) or "")[0]
    lines = [f"usage: unmask {command}{required} [OPTIONS]", ""]
    for paragraph in about.split("\n\n"):
        lines += [*textwrap.wrap(plain(paragraph, names), width), ""]
    for heading, listed in grouped(options):
        lines.append(f"{heading}:")
        for option in listed:
            shown = option.flags if option.default is True else option.flags[:1]
            text = plain(option.text, names)
            text = text.replace("None: ", "default: ") if option.default is None else text
            typed = "" if option.positional else option.form
            text = " ".join(filter(None, (text, shown_default(option))))
            lines += _entry(" ".join(filter(None, (", ".join(shown), typed))), text, width)
        if heading == "common options":
            lines += _entry("--config FILE", CONFIG, width) + _entry("-h, --help", "this text", width)
        lines.append("")
    return "\n".join(lines).rstrip()


def _entry(left: str, text: str, width: int, column: int = 26) -> list[str]:
    """An option's lines: its text in a column of its own, below the flag where that is long."""
    wrapped = textwrap.wrap(text, max(20, width - column)) or [""]
    if len(left) + 4 > column:
        long = textwrap.wrap(left.replace(",", ", "), width - 2, initial_indent="  ", subsequent_indent="    ")
        above = [f"  {left}"] if len(left) + 2 <= width else long
        return [*above, *(" " * column + line for line in wrapped if line)]
    first, *others = wrapped
    return [f"  {left:<{column - 2}}{first}".rstrip(), *(" " * column + line for line in others)]


# ---------------------------------------------------------------------- what was typed
def check_flags(words: Sequence[str], settings: type, start: Any = None) -> None:
    """Raises :class:`tasks.UnmaskError` for a flag that the settings do not have, with the likeliest that was meant,
    and for those that are missing on the line and in ``start``, the settings of a file."""
    options = options_of(settings)
    known = {flag for option in options for flag in option.flags}
    typed = {re.sub("_", "-", word.partition("=")[0]): word.partition("=")[0] for word in words if word[:2] == "--"}
    for flag, word in typed.items():
        if flag not in known:
            meant = suggestion(flag[2:], [other[2:] for other in known], "--")
            raise UnmaskError(f"unknown option {word}{meant or '; --help lists all'}")
    needed = [o for o in options if o.required and not o.positional and o.flag not in typed]
    needed = [o for o in needed if getattr(start, o.name, tyro.MISSING) is tyro.MISSING]
    missing = [option.flag for option in needed]
    if missing:
        raise UnmaskError(f"{' and '.join(missing)} must be given; --help says more")


def explained(complaint: str, settings: type) -> str:
    """tyro's complaint about a value, in plain words where they can be had."""
    forms = {option.flag: option for option in options_of(settings)}
    value = re.search(r"Error parsing (--[\w-]+):.*?\['(.*?)'\]", complaint)
    if value is not None and value[1] in forms:
        form = forms[value[1]].form
        return f"{value[1]} takes {EXPECTED.get(form, form)}, not {value[2]!r}"
    choice = re.search(r"invalid choice '(.*?)' for argument '(--[\w-]+)'", complaint)
    if choice is not None and choice[2] in forms:
        allowed = forms[choice[2]].form.strip("{}").split(",")
        return f"{choice[2]} takes {', '.join(allowed)}, not {choice[1]!r}{suggestion(choice[1], allowed)}"
    if (lacking := re.search(r"Missing value for argument '(\w+)'", complaint)) is not None:
        return f"{lacking[1].upper()} must be given; --help says more"
    stray = re.search(r"Unrecognized options: (.*?)(?: For full|$)", complaint)
    return complaint if stray is None else f"{stray[1]!r} belongs to no option; --help lists all"


# ---------------------------------------------------------------------- settings from a file
def take_config(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file that ``--config`` names, and the other words. Raises :class:`tasks.UnmaskError` where no name follows,
    or two are given."""
    files, rest, left = [], [], iter(words)
    for word in left:
        if word != "--config" and not word.startswith("--config="):
            rest.append(word)
            continue
        name = word.partition("=")[2] if "=" in word else next(left, "")
        if not name or name.startswith("--") or files:
            raise UnmaskError("--config takes one file, the run.json of a run")
        files.append(Path(name))
    return (files[0] if files else None), rest


def read_config(file: Path, settings: type, commands: Mapping[str, str]) -> Any:
    """Settings of the given class from a JSON object, such as the ``run.json`` that a run wrote.

    Fields that the file lacks keep their defaults; those without a default are tyro's ``MISSING``, for the line to say.

    Args:
        commands: which command has settings of which class, for messages.

    Raises:
        UnmaskError: the file cannot be read, is no JSON object, was written by another command, has a setting that
            this one has not, or one of another type.
    """
    try:
        values = read_json(file)
    except CheckpointError as error:
        raise UnmaskError(f"--config: {error}") from None
    if not isinstance(values, dict):
        raise UnmaskError(f"--config {file} holds no JSON object of settings")
    kind = values.pop("kind", settings.__name__)
    if kind != settings.__name__:
        other = commands.get(str(kind), "another command")
        raise UnmaskError(f"--config {file} holds the settings of {other}")
    return _settings_from(values, settings, f"--config {file}")


def _settings_from(values: dict[str, Any], settings: type, what: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(settings)}
    for name in values:
        if name not in fields:
            raise UnmaskError(f"{what} has an unknown setting {name!r}{suggestion(name, fields)}")
    filled = {}
    for name, field in fields.items():
        if name in values:
            filled[name] = _value_from(values[name], _hints(settings)[name], f"{what}: {name}")
        elif _default(field) is dataclasses.MISSING:
            filled[name] = tyro.MISSING
    return settings(**filled)


def _value_from(value: Any, kind: Any, what: str) -> Any:
    """A value of JSON as the annotation ``kind`` has it."""
    options = alternatives(kind)
    if value is None:
        if len(options) == len(get_args(kind)) or not get_args(kind) or get_origin(kind) is Annotated:
            raise UnmaskError(f"{what} must be given, not null")
        return None
    base = get_args(options[0])[0] if get_origin(options[0]) is Annotated else options[0]
    if dataclasses.is_dataclass(base) and isinstance(value, dict):
        return _settings_from(value, base, what)
    if get_origin(base) is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if base is Path and isinstance(value, str):
        return Path(value)
    if get_origin(base) is Literal:
        check(what, value, base)
        return value
    number = type(value) in (int, float) and abs(value) <= sys.float_info.max
    if base is float and number:
        return float(value)
    if isinstance(base, type) and base is not float and type(value) is base:
        return value
    raise UnmaskError(f"{what} cannot be {json.dumps(value)}")
