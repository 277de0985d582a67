"""Pages that hold their data themselves: no server, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.files import write_atomically


def fill_page(template: Path, data: dict[str, Any], path: Path) -> None:
    """Write ``template`` with ``data`` as JSON in place of its word ``DATA``; nothing in it can end the script."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    page = template.read_text(encoding="utf-8").replace("DATA", text, 1)
    write_atomically(path, lambda temporary: temporary.write_text(page, "utf-8", "backslashreplace"))
