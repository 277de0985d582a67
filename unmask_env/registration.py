"""Environment ids: what is registered, and how a new task becomes an environment in one call."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tasks
from tasks import Task, UnknownNameError, UnmaskError

if TYPE_CHECKING:  # registration stays light: Gymnasium and torch models load when an environment is made
    import torch

    from pretrain.backbone import Backbone
    from unmask_env.denoiser import Denoiser
    from unmask_env.process import Unmasking


@dataclass(frozen=True)
class Registered:
    """What an id stands for: a task (by name or object) and its default denoiser."""

    task: str | Task
    denoiser: Any


_REGISTERED: dict[str, Registered] = {}


def register(id: str, task: str | Task, denoiser: str | Path | Denoiser | None = None) -> None:
    """Make ``gym.make(id)`` and ``gym.make_vec(id)`` play ``task`` with ``denoiser``.

    Args:
        id: Gymnasium's grammar, ``Namespace/Name-v0``.
        task: a :class:`tasks.Task`, or the name of one, with its options (:func:`tasks.get`).
        denoiser: packaged name, folder, hub id, backbone or denoiser; it may also be given to ``gym.make``.

    Raises:
        UnmaskError: an id outside the grammar, or another package's. UnknownNameError: an unknown task name.
    """
    import gymnasium

    if not re.fullmatch(r"(?:[\w:-]+/)?[\w:.-]+-v\d+", id):
        raise UnmaskError(f"malformed environment id {id!r}; write it as Namespace/Name-v0")
    if isinstance(task, str) and not tasks.known(task):
        raise UnknownNameError("task", task, tasks.names())
    if id in gymnasium.registry:
        if id not in _REGISTERED:
            raise UnmaskError(f"{id} is already registered by another package; choose another id")
        del gymnasium.registry[id]
    _REGISTERED[id] = Registered(task, denoiser)
    gymnasium.register(
        id,
        entry_point="unmask_env.gym_env:UnmaskEnv",
        vector_entry_point="unmask_env.vector_env:UnmaskVectorEnv",
        kwargs={"env_id": id},
    )


def ids() -> list[str]:
    """All ids registered with :func:`register`."""
    return sorted(_REGISTERED)


def lookup(id: str) -> Registered:
    """What ``id`` stands for. Raises :class:`tasks.UnknownNameError`."""
    if id not in _REGISTERED:
        raise UnknownNameError("environment", id, _REGISTERED)
    return _REGISTERED[id]


def resolve(
    task: str | Task | None, denoiser: Any = None, *, env_id: str | None = None, **options: Any
) -> tuple[Task, Any]:
    """A task and what its denoiser is named, both from an environment's id where they are not given.

    Args:
        task: a task, its name with options, or an environment's id. options: more of the task's.

    Raises:
        UnmaskError: a task or denoiser is missing, or an option does not fit; UnknownNameError.
    """
    own = isinstance(task, str) and tasks.known(task)
    if isinstance(task, str) and (task in _REGISTERED or ("/" in task.partition(":")[0] and not own)):
        task, env_id = None, task
    registered = None if env_id is None else lookup(env_id)
    task = registered.task if task is None and registered is not None else task
    denoiser = registered.denoiser if denoiser is None and registered is not None else denoiser
    task = tasks.get(task, **options) if isinstance(task, str) else task
    if not isinstance(task, tasks.Task | None):
        raise UnmaskError(f"a task is a name or a tasks.Task, not {type(task).__name__}")
    if task is None or denoiser is None:
        what, missing = ("this environment", "task") if task is None else (f"task {task.name}", "denoiser")
        raise UnmaskError(f"{what} needs a {missing}; give one ({missing}=..., --{missing}) or an environment's id")
    return task, denoiser


def make_process(
    task: str | Task | None = None,
    denoiser: str | Path | Backbone | Denoiser | None = None,
    *,
    env_id: str | None = None,
    temperature: float | None = None,
    device: torch.device | str = "cpu",
    forward_batch: int | None = None,
    **rules: Any,
) -> Unmasking:
    """The decision process of a task and a denoiser: ``make_process("sudoku6", denoiser="sudoku6-tiny")``.

    Args:
        task: a task, its name with options, or an environment's id.
        denoiser: packaged name, folder, hub id, backbone or denoiser; an environment has a default one.
        forward_batch: the most rows per forward of the denoiser; None: all.
        temperature: of the filling; None: the task's ``fill_temperature``.
        env_id: an environment's id, for what is not given. rules: fields of :class:`unmask_env.state.Rules`.

    Raises:
        UnmaskError: a task or denoiser is missing, or a setting is not allowed; UnknownNameError, CheckpointError,
            IncompatibleDenoiserError: each in one line.
    """
    from unmask_env.denoiser import load_denoiser
    from unmask_env.process import Unmasking
    from unmask_env.state import Rules

    checked = Rules.of(rules)
    task, denoiser = resolve(task, denoiser, env_id=env_id)
    return Unmasking(task, load_denoiser(denoiser, task, device), checked, temperature, forward_batch)
