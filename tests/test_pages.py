"""What the README and the documentation show must run, and what they link to must exist."""

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTRAS = {"agents.lm_eval": "lm_eval", "agents.diffusers": "diffusers"}  # what snippets import, and the library of it
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CARDS = [card for room in ("agents", "pretrain") for card in sorted((ROOT / room / "models").glob("*/README.md"))]
RESULTS = ROOT / "docs" / "results"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


SNIPPETS = [
    pytest.param(page, block, id=f"{name(page)} {number}")
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


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page: lower case, spaces as hyphens, no punctuation."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{name(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{name(page)}: {link}"


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=name)
def test_pages_that_are_named_exist(page: Path) -> None:
    for named in re.findall(r"\bdocs/[\w/\-]+\.md", page.read_text()):
        assert (ROOT / named).exists(), f"{name(page)}: {named}"


def test_every_page_of_results_is_listed_and_every_file_that_it_names_exists() -> None:
    overview = (RESULTS / "README.md").read_text()
    for page in RESULTS.glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in overview, page.name
    for page in RESULTS.glob("*.md"):
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for stem, ending in re.findall(r"benchmarks/results/([\w{},\-]+)\.(json|png)", prose):
            before, _, rest = stem.partition("{")
            inside, _, after = rest.partition("}")
            for part in inside.split(","):
                assert (ROOT / "benchmarks" / "results" / f"{before}{part}{after}.{ending}").exists(), (
                    f"{page.name}: {stem}"
                )


def test_the_table_of_results_is_that_of_the_committed_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import readme

    page = (ROOT / "README.md").read_text()
    assert readme.BEGIN in page
    assert readme.updated(page) == page, "python benchmarks/readme.py writes it anew"
