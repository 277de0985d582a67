"""Unmasking as a Markov decision process around a frozen denoiser. Importing it registers the ``Unmask/`` ids."""

from __future__ import annotations

from typing import Any

from unmask_env.names import __version__, is_command, require_ours

if not is_command():
    require_ours()

    import tasks
    from unmask_env.free_text import free_text
    from unmask_env.reference import reference
    from unmask_env.registration import ids, make_process, register
    from unmask_env.state import Rules

    register("Unmask/Sudoku4x4-v0", task="sudoku4", denoiser="sudoku4")
    register("Unmask/Sudoku6x6-v0", task="sudoku6", denoiser="sudoku6")
    register("Unmask/Sudoku9x9-v0", task="sudoku9", denoiser="sudoku9")
    register("Unmask/Zebra-v0", task="zebra:houses=3", denoiser="zebra3")
    register("Unmask/Countdown-v0", task="countdown", denoiser="countdown3")
    register("Unmask/TextInfill-v0", task="text:hide=0.25,span=4", denoiser="text")

    tasks.register("free_text", free_text)
    register("Unmask/FreeText-v0", task="free_text", denoiser="text")

__all__ = ["Rules", "Unmasking", "__version__", "ids", "make_process", "reference", "register"]


def __getattr__(name: str) -> Any:
    if name != "Unmasking":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from unmask_env.process import Unmasking  # with the denoisers, whose libraries are slow to load

    return Unmasking
