"""The documentation site builds strictly and stands alone; every registered id has a page; docstrings are counted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="needs the extra docs")
pytest.importorskip("material", reason="needs the extra docs")
griffe = pytest.importorskip("griffe", reason="needs the extra docs")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs" / "generate"))

import api  # noqa: E402 - of docs/generate
import environments  # noqa: E402

pytestmark = pytest.mark.slow
SECTIONS = ["Description", "Action Space", "Observation Space", "Rewards", "Starting State", "Episode End"]
SECTIONS += ["Information", "Arguments", "Reference Scores", "Version History"]
LOADED = re.compile(r'<(?:script|img|iframe|source)[^>]* src="([^"]*)"|<link[^>]* href="([^"]*)"')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    quiet = {"NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **quiet}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def text(page: Path) -> str:
    return re.sub(r"<[^>]+>", "", page.read_text())


@pytest.mark.timeout(900)
def test_every_registered_id_has_a_page(site: Path) -> None:
    overview = (site / "environments" / "index.html").read_text()
    own = [sys.executable, "-c", "import unmask_env; print(*unmask_env.ids())"]  # other tests register more here
    ids = subprocess.run(own, capture_output=True, text=True, check=True).stdout.split()
    assert "Unmask/Sudoku6x6-v0" in ids
    for id in ids:
        page = site / "environments" / f"{id.partition('/')[2]}.html"
        assert page.name in overview
        assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        headings = re.findall(r'<h2 id="([^"]+)"', page.read_text())
        assert headings == [section.lower().replace(" ", "-") for section in SECTIONS]


def test_what_a_page_says_is_what_the_environment_is(site: Path) -> None:
    page = text(site / "environments" / "Sudoku6x6-v0.html")
    for said in ("Discrete(36)", "MultiBinary(72)", "block_length", "36 positions, 6 symbols", "max_confidence"):
        assert said in page
    assert "23 of 35 positions are masked." in text(site / "environments" / "Countdown-v0.html")


def test_every_module_has_a_page_and_no_page_loads_from_elsewhere(site: Path) -> None:
    for package in api.PACKAGES:
        for file in (ROOT / package).glob("*.py"):
            made = (site / "api" / package / f"{file.stem}.html").exists()
            assert made or file.stem.startswith(("_", "generate_")), file
    assert "Raises" in text(site / "api" / "tasks" / "task.html")
    for page in site.rglob("*.html"):
        links = [link for pair in LOADED.findall(page.read_text()) for link in pair]
        assert not [link for link in links if link.startswith(("http:", "https:", "//"))], page


def test_no_public_name_lacks_a_docstring() -> None:
    assert api.undocumented(ROOT) == []


def test_names_without_a_docstring_are_found(tmp_path: Path) -> None:
    for package in api.PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text('"""A package."""\n')
    (tmp_path / "tasks" / "mine.py").write_text(
        '"""A module."""\nfrom abc import ABC\n\n'
        "def bare(): ...\ndef _private(): ...\n\n"
        'class Base(ABC):\n    """A base."""\n    def said(self):\n        """Said."""\n    def unsaid(self): ...\n\n'
        'class Mine(Base):\n    """Mine."""\n    def said(self): ...\n    @property\n    def new(self): ...\n'
    )
    assert sorted(api.undocumented(tmp_path)) == ["tasks.mine.Base.unsaid", "tasks.mine.Mine.new", "tasks.mine.bare"]


def test_arguments_of_docstrings_that_share_a_line() -> None:
    class Example:
        """One.

        Args:
            low, high: which ones. size: how many,
                on two lines. A sentence.
            last: of all (:class:`Example`).
        """

    assert environments._explained(Example) == {
        "low": "which ones.",
        "high": "which ones.",
        "size": "how many, on two lines. A sentence.",
        "last": "of all (`Example`).",
    }
