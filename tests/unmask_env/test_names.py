"""Import names that others take, too: one line, from the command and from ``import unmask_env``."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.toys import sweep
from unmask_env.names import ROOT

COMMAND = "import sys\nfrom unmask_env.names import main\nif __name__ == '__main__':\n    sys.exit(main())\n"


def run(path: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Python with ``path`` before this project and the libraries."""
    places = os.pathsep.join([str(path), str(ROOT), sysconfig.get_path("purelib")])
    environment = os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [path / "bin" / "python", *arguments], env=environment, cwd=path, capture_output=True, text=True, check=False
    )


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the command ``unmask``, as it is installed beside a Python."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
    (tmp_path / "bin" / "unmask").write_text(COMMAND)
    return tmp_path


def write(file: Path, text: str = "import what_nobody_has\n") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


HIDING = ["agents/__init__.py", "tasks/__init__.py", "pretrain/__init__.py", "agents.py", "tasks.py", "pretrain.py"]


@pytest.mark.parametrize("hiding", sweep(HIDING, "tasks/__init__.py".__eq__))
def test_what_hides_a_package_is_named(place: Path, hiding: str) -> None:
    write(place / hiding)
    name = hiding.removesuffix(".py").removesuffix("/__init__")
    hider = place / hiding.removesuffix("/__init__.py")
    message = f"{str(hider)!r} hides the package {name!r} of unmask; rename it, or run elsewhere"
    done = run(place, str(place / "bin" / "unmask"), "list")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"unmask: {message}\n")
    done = run(place, "-c", "import unmask_env")
    assert done.stderr.splitlines()[-1] == f"ImportError: {message}"
    assert "what_nobody_has" not in done.stderr
    if name != "agents":
        done = run(place, "-m", "agents.cli", "list")
        assert (done.returncode, done.stderr) == (2, f"unmask: {message}\n")


def test_an_installed_package_of_that_name_asks_for_an_environment(place: Path) -> None:
    packages = place / "lib" / "site-packages"
    write(packages / "agents" / "__init__.py")
    (place / "sitecustomize.py").write_text(f"import sys\nsys.path.insert(0, {str(packages)!r})\n")
    done = run(place, str(place / "bin" / "unmask"), "list")
    hider = str(packages / "agents")
    message = f"{hider!r} hides the package 'agents' of unmask; install unmask in an environment of its own"
    assert (done.returncode, done.stderr) == (2, f"unmask: {message}\n")


def test_a_package_installed_over_ours_is_told_apart(place: Path) -> None:
    """Its files lie where ours do, so only what is in them tells."""
    for name in ("unmask_env", "tasks", "pretrain"):
        (place / name).symlink_to(ROOT / name)
    write(place / "agents" / "__init__.py", "from .run import Runner\n")
    done = run(place, "-c", "import unmask_env")
    assert "hides the package 'agents' of unmask" in done.stderr.splitlines()[-1]


def test_a_users_module_that_is_imported_already_is_seen(place: Path) -> None:
    write(place / "tasks.py", "")
    done = run(place, "-c", "import tasks, unmask_env")
    assert "hides the package 'tasks' of unmask" in done.stderr.splitlines()[-1]


def test_the_message_is_one_short_line_wherever_it_is(place: Path) -> None:
    deep = place / ("a\nb" + "x" * 200) / ("y" * 200)
    write(deep / "tasks.py")
    script = f"import sys; sys.path.insert(0, {str(deep)!r}); import unmask_env"
    last = run(place, "-c", script).stderr.splitlines()[-1]
    assert last.startswith("ImportError: '...")
    assert "hides the package 'tasks'" in last
    assert len(last) <= 300


@pytest.mark.slow
def test_folders_that_hide_nothing_are_nothing_to_complain_of(place: Path) -> None:
    (place / "tasks").mkdir()  # without __init__.py ours comes first
    write(place / "pretraining.py")
    assert run(place, "-c", "from unmask_env.names import require_ours; require_ours()").returncode == 0


@pytest.mark.slow
def test_the_installed_command_shows_its_table_without_torch_and_registers_before_it_works(place: Path) -> None:
    write(place / "torch" / "__init__.py")
    done = run(place, str(place / "bin" / "unmask"), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: unmask COMMAND")
    (place / "torch" / "__init__.py").unlink()
    (place / "torch").rmdir()
    done = run(place, str(place / "bin" / "unmask"), "list")
    assert done.returncode == 0, done.stderr
    assert "Unmask/FreeText-v0" in done.stdout
    assert "free_text" in done.stdout.splitlines()[0] + done.stdout.splitlines()[1]
