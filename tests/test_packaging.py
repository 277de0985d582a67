"""The wheel and the source distribution: built, installed outside of the checkout, and tried there. No network."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from unmask_env import __version__

ROOT = Path(__file__).parent.parent
PACKAGES = ("agents", "pretrain", "tasks", "unmask_env")
IGNORED = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
BUILD = "import sys; from setuptools import build_meta as build; print(getattr(build, sys.argv[1])(sys.argv[2]))"
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=CLEAN, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """What pip and python -m build call: ``build_wheel`` or ``build_sdist``."""
    out.mkdir()
    return out / run(sys.executable, "-W", "ignore", "-c", BUILD, kind, out, cwd=source).splitlines()[-1]


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def sdist(place: Path) -> Path:
    """Of a copy of the checkout, as building leaves folders behind."""
    source = shutil.copytree(ROOT, place / "checkout", ignore=shutil.ignore_patterns(".git", *IGNORED))
    return build("build_sdist", source, place / "sdist")


@pytest.fixture(scope="module")
def wheel(place: Path, sdist: Path) -> Path:
    """Built from the source distribution alone."""
    with tarfile.open(sdist) as archive:
        archive.extractall(place / "unpacked", filter="data")
    return build("build_wheel", place / "unpacked" / f"unmask-{__version__}", place / "wheel")


@pytest.fixture(scope="module")
def environment(place: Path, wheel: Path) -> Path:
    """A virtual environment with the wheel, which finds the other libraries where they are installed already."""
    folder = place / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=place)
    python = folder / "bin" / "python"
    pip = ("-m", "pip", "--disable-pip-version-check", "--python", python, "install")
    run(sys.executable, *pip, "--quiet", "--no-deps", "--no-index", wheel, cwd=place)
    (purelib,) = folder.glob("lib/python*/site-packages")
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (purelib / "libraries.pth").write_text("\n".join(libraries) + "\n")  # no .pth there counts, so no checkout does
    return folder


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    files = {str(f.relative_to(ROOT)) for p in PACKAGES for f in (ROOT / p).rglob("*") if f.is_file()}
    files = {file for file in files if "__pycache__" not in file}
    held = {name for name in contents(wheel) if ".dist-info/" not in name}
    assert held == files
    assert {"agents/show.html", "tasks/data/sudoku4.npz", *(f"{p}/py.typed" for p in PACKAGES)} <= held


@pytest.mark.slow
def test_the_source_distribution_builds_the_wheel_of_the_checkout(place: Path, wheel: Path) -> None:
    assert contents(build("build_wheel", place / "checkout", place / "direct")) == contents(wheel)


@pytest.mark.slow
def test_the_source_distribution_holds_the_tests_and_the_pages(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [f for folder in ("tests", "docs", "benchmarks") for f in (ROOT / folder).rglob("*") if f.is_file()]
    wanted = {str(file.relative_to(ROOT)) for file in wanted if "__pycache__" not in file.parts}
    assert wanted <= held
    assert {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt"} <= held
    assert not [name for name in held if name.endswith(".pyc")]


@pytest.mark.slow
def test_the_core_asks_for_no_rl_library_and_extras_are_declared(wheel: Path) -> None:
    metadata = next(text.decode() for name, text in contents(wheel).items() if name.endswith("dist-info/METADATA"))
    required = re.findall(r"^Requires-Dist: ([\w\-]+)(.*)$", metadata, re.MULTILINE)
    core = {name for name, more in required if "extra ==" not in more}
    named = {"torch", "numpy", "gymnasium", "safetensors", "huggingface_hub", "tyro", "rich", "pillow"}
    assert core == named
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*re.findall(r"^Provides-Extra: (\S+)$", metadata, re.MULTILINE)} == {*project["optional-dependencies"]}


def test_every_extra_that_messages_and_pages_name_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sources = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "pyproject.toml", ROOT / "Makefile"]
    sources += [file for package in PACKAGES for file in (ROOT / package).glob("*.py")]
    named = {}
    for file in sources:
        for extras in re.findall(r"(?:unmask|'\.|\s\.)\[([\w,]+)\]", file.read_text()):
            named |= dict.fromkeys(extras.split(","), file.name)
    assert {"sb3", "torchrl", "train", "plot", "text", "ray", "wandb"} <= named.keys()
    assert named.keys() <= project["optional-dependencies"].keys(), named


@pytest.mark.slow
def test_the_installed_wheel_works_in_an_empty_folder(place: Path, environment: Path) -> None:
    empty = place / "empty"
    empty.mkdir()
    unmask = environment / "bin" / "unmask"
    where = run(environment / "bin" / "python", "-c", "import agents; print(agents.__file__)", cwd=empty)
    assert Path(where.strip()).is_relative_to(environment)
    assert run(unmask, "--version", cwd=empty) == f"unmask {__version__}\n"
    listed = run(unmask, "list", cwd=empty)
    models = [f for package in ("agents", "pretrain") for f in (ROOT / package / "models").iterdir()]
    assert all(model.name in listed.replace("\n", " ") for model in models)
    one = ("--task", "sudoku6", "--denoiser", "sudoku6-tiny", "--orders", "margin", "sudoku6-tiny-rewards")
    run(unmask, "evaluate", *one, "--limit", "1", cwd=empty)
    run(unmask, "show", *one, "--html", "page.html", cwd=empty)
    page = (empty / "page.html").read_text()
    assert page.startswith((ROOT / "agents" / "show.html").read_text().partition("DATA")[0])
    assert [file.name for file in empty.iterdir()] == ["page.html"]


# ---------------------------------------------------------------------- releases
def test_the_changelog_has_a_dated_section_for_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    version, date = headings[1]
    assert version == __version__
    assert re.fullmatch(r" - \d{4}-\d{2}-\d{2}", date)
    cited = dict(re.findall(r"^(version|date-released): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert cited == {"version": __version__, "date-released": date.removeprefix(" - ")}
