"""Environment ids: what is registered, and how a new task becomes an environment in one call."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium

import tasks
from tasks import Task, UnknownNameError, UnmaskError

if TYPE_CHECKING:  # registration stays light: torch models load when an environment is made
    import torch

    from unmask_env.denoiser import Denoiser


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
        task: a :class:`tasks.Task`, or the name of a registered one, with its options.
        denoiser: packaged name, folder, hub id, backbone or denoiser; it may also be given to ``gym.make``.

    Raises:
        UnmaskError: an id outside the grammar, or another package's. UnknownNameError: an unknown task name.
    """
    if not re.fullmatch(r"(?:[\w:-]+/)?[\w:.-]+-v\d+", id):
        raise UnmaskError(f"malformed environment id {id!r}; write it as Namespace/Name-v0")
    if isinstance(task, str) and task.partition(":")[0] not in tasks.names():
        raise UnknownNameError("task", task, tasks.names())
    if id in gymnasium.registry:
        if id not in _REGISTERED:
            raise UnmaskError(f"{id} is already registered by another package; choose another id")
        del gymnasium.registry[id]
    _REGISTERED[id] = Registered(task, denoiser)
    gymnasium.register(
        id,
        entry_point="unmask_env.gym_env:UnmaskEnv",
        vector_entry_point="unmask_env.vector:UnmaskVectorEnv",
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


def resolve_task(task: str | Task) -> Task:
    return tasks.get(task) if isinstance(task, str) else task


def resolve(
    id: str, denoiser: str | Path | Denoiser | None = None, device: torch.device | str = "cpu"
) -> tuple[Task, Denoiser]:
    """The task of ``id`` and its denoiser, or the one named instead.

    Raises:
        UnknownNameError, CheckpointError, IncompatibleDenoiserError: each in one line.
    """
    from unmask_env.denoiser import load_denoiser

    found = lookup(id)
    task = resolve_task(found.task)
    source = denoiser if denoiser is not None else found.denoiser
    if source is None:
        raise UnmaskError(f"{id} was registered without a denoiser; name one")
    return task, load_denoiser(source, task, device)


def given_or_resolved(
    task: Task | None,
    denoiser: Denoiser | None,
    id: str,
    name: str | Path | None,
    device: torch.device | str,
) -> tuple[Task, Denoiser]:
    """``task`` and ``denoiser`` where both are given, else what :func:`resolve` finds for ``id`` and ``name``.

    Raises:
        UnmaskError: one is given without the other; and what :func:`resolve` raises.
    """
    if task is not None and denoiser is not None:
        return task, denoiser
    if task is not None or denoiser is not None:
        raise UnmaskError("give both task and denoiser, or neither: config.env and config.denoiser are then looked up")
    return resolve(id, name, device)
