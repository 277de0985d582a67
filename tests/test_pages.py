"""What the README and the documentation show must run, and what they link to must exist."""

import re
import shlex
import sys
import warnings
from pathlib import Path

import pytest

from agents.cli import main, parse, settings_class, split
from agents.options import options_of

ROOT = Path(__file__).parent.parent
EXTRAS = {"agents.lm_eval": "lm_eval", "agents.diffusers": "diffusers"}  # what snippets import, and the library of it
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CARDS = [card for room in ("agents", "pretrain") for card in sorted((ROOT / room / "models").glob("*/README.md"))]
RESULTS = ROOT / "docs" / "results"
GENERATED = ("docs/api/", "docs/environments/")  # by docs/generate, when the site is built; its links are checked there
TUTORIALS = [
    ROOT / "README.md",
    ROOT / "docs" / "index.md",
    *sorted((ROOT / "docs" / "tutorials").glob("*.md")),
]  # run from top to bottom
WHOLE = [page for page in PAGES if page.parent != RESULTS]  # whose commands are of today; results have those of then
SHORT = {  # a word or two that a command's name begins with: its options in tests
    "pretrain": {"steps": 2, "batch": 8, "threads": 1},
    "train": {"steps": 2, "iterations": 1, "puzzles": 20, "rows": 20, "validate_every": 0, "threads": 1}
    | {"imitation": 2, "group": 2},
    "evaluate": {"limit": 4},
    "show": {"delay": 0},
    "list": {},
}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


SNIPPETS = [
    pytest.param(page, block, id=f"{name(page)} {number}")
    for page in PAGES
    if page not in TUTORIALS
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


def commands(bash: str) -> list[list[str]]:
    """The words of every ``unmask`` command, without what stands behind a pipe or a second command."""
    lines = bash.replace("\\\n", " ").splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [each[1:] for each in words if each and each[0].rpartition("/")[2] == "unmask" and each[1:] != ["--version"]]


def shortened(words: list[str]) -> list[str]:
    """The command with the small numbers of ``SHORT`` in place of its own, where it has such an option."""
    command = split(words)[0]
    known = {} if command == "list" else {option.name for option in options_of(settings_class(command))}
    for name, value in SHORT[words[0]].items():
        if name not in known:
            continue
        flag = f"--{name.replace('_', '-')}"
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
        words = [*words, flag, str(value)]
    return words


def small(python: str) -> str:
    """A snippet with small numbers in place of its own: what is in the call of a settings class, and instances."""
    numbers = {"steps": 2, "iterations": 1, "puzzles": 20}
    python = re.sub(r"\b(steps|iterations|puzzles)=\d+", lambda found: f"{found[1]}={numbers[found[1]]}", python)
    return re.sub(r"heldout\(\d+\)", "heldout(4)", re.sub(r"\blimit=\d+", "limit=4", python))


@pytest.mark.trains
@pytest.mark.parametrize("page", TUTORIALS, ids=name)
def test_tutorials_run_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python and commands in the order of the page, in one folder; a block that begins with a file's name is saved."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before, ran = set(sys.modules), 0
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", page.read_text(), flags=re.DOTALL):
        if file := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / file[1]).write_text(block)
        elif language == "python":
            exec(compile(small(block), str(page), "exec"), {"__name__": "page"})
        else:
            for words in commands(block):
                main(shortened(words))
        ran += 1
    assert ran
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[module]


@pytest.mark.parametrize("page", WHOLE, ids=name)
def test_commands_of_the_pages_are_understood(page: Path) -> None:
    """Each names a command that there is, with options and values that it takes."""
    for bash in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for words in commands(bash):
            command, rest = split(words)
            if command != "list":
                parse(command, rest)


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
        if target.is_relative_to(ROOT) and name(target).startswith(GENERATED):
            continue
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
