"""Denoisers that were loaded by name: pickled by that name, and shared by what is unpickled in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from tasks import Task

_SHARED: WeakValueDictionary[tuple[Any, ...], Named]


class Named:
    """Base of denoisers that may have been loaded by name. Such a one is pickled by its name, without its weights, and
    unpickling finds or loads it, once in each process; any other is pickled with its weights."""

    source: str | None = None
    """the name that it was loaded by"""
    _loaded_as: tuple[str, Task, str] | None = None

    def name_as(self, source: str | Path, task: Task, device: str) -> None:
        """It was loaded from ``source`` (packaged name, folder or hub id, with options) for ``task``."""
        self.source = str(source)
        name = str(Path(source).resolve()) if Path(source).exists() else self.source
        self._loaded_as = (name, task, device)
        _SHARED.setdefault(_key(name, task, device), self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol) if self._loaded_as is None else (shared_denoiser, self._loaded_as)


_SHARED = WeakValueDictionary()


def _key(name: str, task: Task, device: str) -> tuple[Any, ...]:
    return name, device, task.name, task.length, task.fingerprint


def name_of(denoiser: Any) -> str:
    """The name that it was loaded by, or else its class."""
    return getattr(denoiser, "source", None) or type(denoiser).__name__


def shared_denoiser(name: str, task: Task, device: str) -> Any:
    """The denoiser of that name, task and device that this process has already, or else what
    :func:`unmask_env.denoiser.load_denoiser` gives, with its errors."""
    from unmask_env.denoiser import load_denoiser

    found = _SHARED.get(_key(name, task, device))
    return load_denoiser(name, task, device) if found is None else found
