"""A page per registered id: what the class, the task and the spaces say of themselves, a picture, committed scores."""

from __future__ import annotations

import inspect
import io
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from PIL import Image
from roles import ROLE

import unmask_env
from tasks.registry import _TASKS
from unmask_env import Rules
from unmask_env.gym_env import UnmaskEnv
from unmask_env.registration import lookup

SCORES = "benchmarks/results/references"
EXAMPLES = 200  # instances that a page counts the holes of
WIDEST, GAP = 900, 12  # pixels, of pictures
OF_ALL = """\
All environments are one class, [`UnmaskEnv`](../api/unmask_env/gym_env.md), with another task and denoiser each.
"""


def pages(root: Path) -> dict[str, str | bytes]:
    """Text and pictures by path: ``environments/index.md``, and ``environments/NAME.md`` and ``.png`` for each id."""
    made: dict[str, str | bytes] = {}
    parts = ["# Environments", OF_ALL]
    for id in unmask_env.ids():
        env = gymnasium.make(id, render_mode="rgb_array").unwrapped
        name = id.partition("/")[2]
        made[f"environments/{name}.png"] = _picture(env)
        made[f"environments/{name}.md"] = _page(root, id, name, env)
        parts += [f"## [{id}]({name}.md)", f"![{name}]({name}.png)", f"{_first(env.task)}. {_sizes(id, env)}"]
    made["environments/index.md"] = "\n\n".join([*parts, "## Others", OWN]) + "\n"
    return made


OWN = """\
Every id takes another denoiser, reference policy or kind of action:
`gym.make(id, denoiser="runs/mine", actions="set")`.
`gym.make_vec(id, num_envs=64)` plays 64 boards with one denoiser forward per step.
[A task of your own](../tutorials/own-task.md) becomes an environment by one call."""


def _page(root: Path, id: str, name: str, env: UnmaskEnv) -> str:
    """One environment, in the order of Gymnasium's pages."""
    said = _sections(UnmaskEnv)
    task, registered = env.task, lookup(id)
    options = " with its options" if ":" in str(registered.task) else ""
    parts = [
        f"# {id}",
        f"![an episode: the start, half-way, the end]({name}.png)",
        "*The first episode of seed 0 at its start, half-way and at its end, filled by max-confidence. "
        "Grey is given, green was filled.*",
        _table(
            ("Action space", f"`{env.action_space}`"),
            ("Observation space", f"`Dict` of {len(env.observation_space.spaces)} arrays, below"),
            ("Make it", f'`gym.make("{id}")`, `gym.make_vec("{id}", num_envs=64)`'),
            ("Task", f"`{registered.task}`{options}: {task.length} positions, {task.vocab_size} symbols"),
            ("Denoiser", f"`{registered.denoiser}`, frozen, {_parameters(env):,} parameters"),
        ),
        "## Description",
        said["Description"],
        _prose(_before_args(inspect.getdoc(type(task)))),
        _prose(_module(task)),
        "## Action Space",
        _actions(id),
        said["Action Space"],
        "## Observation Space",
        _observations(env.observation_space),
        said["Observation Space"],
        "## Rewards",
        _prose(inspect.getdoc(type(task).reward)),
        said["Rewards"],
        _metrics(env),
        "## Starting State",
        _holes(env),
        said["Starting State"],
        "## Episode End",
        said["Episode End"],
        "## Information",
        said["Information"],
        "## Arguments",
        said["Arguments"],
        _rules(),
        _task_options(id),
        "## Reference Scores",
        _scores(root / SCORES / f"{name}.json"),
        "## Version History",
        said["Version History"],
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# ---------------------------------------------------------------------- text
def _sections(kind: type) -> dict[str, str]:
    """The parts of a class's docstring by heading."""
    parts = re.split(r"^## (.+)$", inspect.getdoc(kind) or "", flags=re.MULTILINE)[1:]
    return {title: _prose(text) for title, text in zip(parts[::2], parts[1::2], strict=True)}


def _prose(text: str | None) -> str:
    return ROLE.sub(r"`\1`", text or "").strip()


def _before_args(text: str | None) -> str:
    return re.split(r"^(?:Args|Raises|Attributes):$", text or "", flags=re.MULTILINE)[0]


def _module(task: Any) -> str:
    return inspect.getdoc(inspect.getmodule(type(task))) or ""


def _first(task: Any) -> str:
    """The first sentence, or what of it stands before a formula."""
    paragraph = _prose(_before_args(inspect.getdoc(type(task)))).partition("\n\n")[0]
    return " ".join(paragraph.partition(". ")[0].split()).rstrip(".,:")


def _table(*rows: tuple[str, ...], head: tuple[str, ...] = ("", "")) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join(lines + [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows])


def _sizes(id: str, env: UnmaskEnv) -> str:
    return f"{env.task.length} positions, {env.task.vocab_size} symbols; denoiser `{lookup(id).denoiser}`."


def _parameters(env: UnmaskEnv) -> int:
    return sum(parameter.numel() for parameter in env.process.denoiser.model.parameters())


# ---------------------------------------------------------------------- spaces
def _actions(id: str) -> str:
    rows = []
    for actions in ("single", "set", "set+remask"):
        space = gymnasium.make(id, actions=actions).unwrapped.action_space
        rows.append((f'`"{actions}"`' + (" (default)" if actions == "single" else ""), f"`{space}`"))
    return _table(*rows, head=("`actions=`", "space"))


def _observations(space: spaces.Dict) -> str:
    rows = []
    for key, part in space.spaces.items():
        bits = isinstance(part, spaces.MultiBinary)
        low, high = (0, 1) if bits else (part.low.min(), part.high.max())
        rows.append((f"`{key}`", f"`{part.shape}`", f"`{part.dtype}`", f"{low:g} to {high:g}"))
    return _table(*rows, head=("key", "shape", "type", "range"))


def _metrics(env: UnmaskEnv) -> str:
    instances = env.task.heldout(1)
    names = ", ".join(f"`{name}`" for name in env.task.metrics(instances.answers, instances))
    return f"`info` has at an episode's end: {names}."


def _holes(env: UnmaskEnv) -> str:
    tokens = env.task.heldout(EXAMPLES).tokens
    counts = (tokens == env.task.mask_id).sum(1)
    if int(counts.min()) == int(counts.max()):
        return f"{int(counts[0])} of {env.task.length} positions are masked."
    spread = f"{int(counts.min())} to {int(counts.max())} (mean {counts.double().mean():.1f})"
    return f"Of {env.task.length} positions, {spread} are masked in the first {EXAMPLES} test instances."


# ---------------------------------------------------------------------- arguments
def _explained(kind: type) -> dict[str, str]:
    """What a class's docstring says of each argument or attribute, however many share a line."""
    text = re.search(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)", inspect.getdoc(kind) or "", flags=re.MULTILINE)
    found = {}
    for entry in re.split(r"\n(?=    \S)", text[1].rstrip() if text else ""):
        for part in re.split(r"(?<=\.) (?=[a-z_]+(?:, [a-z_]+)*: )", " ".join(entry.split())):
            names, _, words = part.partition(": ")
            found |= {name.strip(): _prose(words) for name in names.split(",")}
    return found


def _rules() -> str:
    said = _explained(Rules)
    rows = [(f"`{field.name}`", f"`{field.default!r}`", said.get(field.name, "")) for field in fields(Rules)]
    return "Fields of `Rules`, each a keyword of `gym.make`:\n\n" + _table(*rows, head=("argument", "default", ""))


def _task_options(id: str) -> str:
    """What may stand behind the name of the task, as whatever makes it takes it."""
    name = str(lookup(id).task).partition(":")[0]
    factory = _TASKS[name]
    said = _explained(getattr(factory, "func", factory))
    rows = []
    for option in inspect.signature(factory).parameters.values():
        default = "" if option.default is option.empty else f"`{option.default!r}`"
        rows.append((f"`{option.name}`", default, said.get(option.name, "")))
    intro = f'Options of the task, as in `gym.make("{id}", task="{name}:OPTION=VALUE")`; the denoiser must suit it:'
    return f"{intro}\n\n" + _table(*rows, head=("option", "default", ""))


# ---------------------------------------------------------------------- scores and pictures
def _scores(file: Path) -> str:
    """The committed JSON of ``benchmarks/references.sh`` as a table; a sentence where there is none."""
    if not file.exists():
        return f"None are committed; `benchmarks/references.sh Unmask/{file.stem}` makes them."
    report = json.loads(file.read_text())
    names = [key for key in report["rows"][0] if key not in SPENT]
    rows = []
    for row in report["rows"]:
        low, high = row["ci95"]
        first, *rest = (f"{100 * row[name]:.1f}" for name in names)
        rows.append((f"`{row['order']}`", f"{first} ({100 * low:.1f}-{100 * high:.1f})", *rest, f"{row['nfe']:.1f}"))
    head = ("order", f"{_title(names[0])} % (95 % interval)", *(f"{_title(name)} %" for name in names[1:]), "NFE")
    made = (
        f"{report['rows'][0]['n']:,} test instances, the default denoiser, one position per forward. "
        f"`{report['command']}`, commit {report['commit']}, {report['date']}; JSON: `{SCORES}/{file.name}`. "
        "Learned orders: [results](../results/README.md)."
    )
    return f"{_table(*rows, head=head)}\n\n{made}"


SPENT = ("order", "nfe", "passes", "policy_passes", "trained", "n", "ci95", "seconds")


def _title(name: str) -> str:
    return {"solve_rate": "solved", "valid_rate": "valid"}.get(name, name).replace("_", " ")


def _picture(env: UnmaskEnv) -> bytes:
    """PNG: one episode at its start, half-way and at its end; lines under each other, boards side by side."""
    _, info = env.reset(seed=0)
    frames, ended = [env.render()], False
    while not ended:
        _, _, terminated, truncated, info = env.step(int(info["log_reference"].argmax()))
        frames.append(env.render())
        ended = terminated or truncated
    line = env.task.is_line
    shown = [_folded(frame) if line else frame for frame in (frames[0], frames[len(frames) // 2], frames[-1])]
    height, width, _ = shown[0].shape
    gap = np.full((GAP, width, 3) if line else (height, GAP, 3), 255, np.uint8)
    whole = np.concatenate([shown[0], gap, shown[1], gap, shown[2]], axis=0 if line else 1)
    file = io.BytesIO()
    Image.fromarray(whole).convert("P", palette=Image.Palette.ADAPTIVE, colors=32).save(file, "PNG", optimize=True)
    return file.getvalue()


def _folded(line: np.ndarray) -> np.ndarray:
    """The picture of a line in pieces under each other, none wider than ``WIDEST``."""
    pieces = -(-line.shape[1] // WIDEST)
    width = -(-line.shape[1] // pieces)
    padded = np.pad(line, ((0, 0), (0, pieces * width - line.shape[1]), (0, 0)), constant_values=255)
    return np.concatenate(np.split(padded, pieces, axis=1), axis=0)
