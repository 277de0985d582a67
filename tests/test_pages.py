"""What the README and the documentation show must run."""

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTRAS = {"agents.lm_eval": "lm_eval", "agents.diffusers": "diffusers"}  # what snippets import, and the library of it
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


SNIPPETS = [
    pytest.param(page, block, id=f"{page.stem} {number}")
    for page in PAGES
    for number, block in enumerate(blocks(page), 1)
]


@pytest.mark.parametrize(("page", "block"), SNIPPETS)
def test_python_of_the_pages_runs(page: Path, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, library in EXTRAS.items():
        if f"from {module} import" in block:
            pytest.importorskip(library, reason="needs an extra")
            warnings.simplefilter("ignore")  # of the library
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(page), "exec"), {"__name__": "page"})


def test_the_example_of_a_new_environment_is_complete_and_short() -> None:
    (example,) = [block for block in blocks(ROOT / "README.md") if "unmask_env.register(" in block]
    assert len([line for line in example.splitlines() if line.strip()]) <= 40
