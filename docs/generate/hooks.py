"""What MkDocs asks while it builds the site: the pages that are made from the code, and what must not be missing."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import api  # noqa: E402 - beside this file
import environments  # noqa: E402

log = logging.getLogger("mkdocs.hooks.unmask")  # a warning here ends a strict build
_pages: dict[str, str | bytes] = {}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the pages and name them in the navigation, where ``folder/`` stands for what is made for it."""
    _pages.update(environments.pages(ROOT) | api.pages(ROOT))
    config.nav = [_filled(entry) for entry in config.nav]
    for name in api.undocumented(ROOT):
        log.warning("%s is public and has no docstring", name)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Hand over the pages that were made."""
    for path, content in _pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def _filled(entry: Any) -> Any:
    ((title, folder),) = entry.items()
    if not isinstance(folder, str) or not folder.endswith("/"):
        return entry
    return {title: _tree([path for path in _pages if path.startswith(folder) and path.endswith(".md")], folder)}


def _tree(paths: list[str], folder: str) -> list[Any]:
    """Pages by name, those of a folder within it, its index first."""
    inside = sorted({path.removeprefix(folder).partition("/")[0] for path in paths if path != f"{folder}index.md"})
    tree: list[Any] = [f"{folder}index.md"]
    for name in inside:
        path = f"{folder}{name}"
        below = [each for each in paths if each.startswith(f"{path}/")]
        tree.append({name: _tree(below, f"{path}/")} if below else path)
    return tree
