"""The command ``unmask`` starts here, and the import names that other packages and users' folders may take, too.

``agents``, ``tasks`` and ``pretrain`` are ordinary words. Where something else of such a name comes first on the path,
or was installed over it, one line says so instead of a traceback from inside of it. Standard library only.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

__version__ = "0.1.0"
ROOT = Path(__file__).parent.parent


def _place(name: str) -> Path | None:
    """The file or folder that ``import name`` takes; None where there is none."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # imported already, by something that is no file
        return Path(name)
    if spec is None:
        return None
    if spec.has_location and spec.origin is not None:
        origin = Path(spec.origin)
        return origin.parent if origin.stem == "__init__" else origin
    return Path(next(iter(spec.submodule_search_locations or [name])))


def _is_ours(name: str, place: Path) -> bool:
    """Whether ``place`` is this project's: it lies beside this package, and its first line, if any, says so."""
    if os.path.realpath(place) != os.path.realpath(ROOT / name):
        return False
    try:
        with open(place / "__init__.py", encoding="utf-8", errors="replace") as file:
            return "unmask" in file.readline()
    except OSError:  # no sources here, as in an archive
        return True


def require_ours() -> None:
    """Raises :class:`ImportError`, in one line, where ``agents``, ``tasks`` or ``pretrain`` is not this project's."""
    for name in ("tasks", "pretrain", "agents"):
        place = _place(name)
        if place is None:
            raise ImportError(
                f"the package {name!r} of unmask is missing beside {Path(__file__).parent}; install again"
            )
        if not _is_ours(name, place):
            installed = {"site-packages", "dist-packages"} & set(place.parts)
            advice = "install unmask in an environment of its own" if installed else "rename it, or run elsewhere"
            where = str(place) if len(str(place)) <= 160 else f"...{str(place)[-160:]}"
            raise ImportError(f"{where!r} hides the package {name!r} of unmask; {advice}")


def is_command() -> bool:
    """Whether this is the installed command, before it has looked at what it was asked: its help comes at once, so it
    imports the libraries when they are needed."""
    script = os.path.realpath(getattr(sys.modules.get("__main__"), "__file__", None) or ".")
    beside = os.path.realpath(os.path.dirname(script)) == os.path.realpath(os.path.dirname(sys.executable))
    return beside and Path(script).stem == "unmask" and "agents.cli" not in sys.modules


def main() -> None:
    """Entry point of ``unmask``: :func:`agents.cli.main`, if the packages are this project's."""
    try:
        require_ours()
        if "tasks" not in sys.modules:  # the package has registered nothing yet; its next import does
            sys.modules.pop("unmask_env", None)
        command_line = importlib.import_module("agents.cli")
    except ImportError as error:
        print(f"unmask: {error}", file=sys.stderr)
        sys.exit(2)
    command_line.main()
