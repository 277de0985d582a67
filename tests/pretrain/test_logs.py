"""Where the numbers of a run go: TensorBoard's file, with the settings in it, and a run of Weights & Biases."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

from pretrain.logs import flat
from pretrain.run import Run
from pretrain.train import MDMConfig, pretrain
from tasks import UnmaskError
from tests.oracles.wandb_file import records

TINY = {"steps": 4, "log_every": 2, "batch": 4, "dim": 8, "layers": 1, "heads": 2, "threads": 1}


@dataclass(frozen=True)
class Part:
    size: int = 3


@dataclass(frozen=True)
class Settings:
    out: str
    wandb: str | None = None
    part: Part = field(default_factory=Part)
    names: tuple[str, ...] = ("a", "b")
    resume: str = "never"
    save_every: int = 1000


def test_nested_settings_become_dotted_names() -> None:
    nested = {"a": {"b": {"c": 1}, "d": None}, "e": [1, 2], "f": True, "g": 0.5, "h": "x"}
    assert flat(nested) == {"a.b.c": 1, "a.d": "null", "e": "[1, 2]", "f": True, "g": 0.5, "h": "x"}


def test_tensorboard_has_the_settings_and_every_scalar(tmp_path: Path) -> None:
    with Run(Settings(str(tmp_path)), 2, {}, "fit toy") as run:
        for step in run.loop():
            run.log({"loss": 1.0 - step, "validation/policy": 0.25}, f"loss {1 - step}")
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("loss")] == [(0, 1.0), (1, 0.0)]
    assert [point.value for point in events.Scalars("validation/policy")] == [0.25, 0.25]
    content = events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    shown = {
        name: value.number_value if value.HasField("number_value") else value.string_value
        for name, value in parse_session_start_info_plugin_data(content).hparams.items()
    }
    assert shown == flat(json.loads((tmp_path / "run.json").read_text()))
    assert (shown["part.size"], shown["names"], shown["kind"]) == (3, '["a", "b"]', "Settings")


@pytest.mark.trains
def test_pretraining_tells_its_throughput(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = []
    monkeypatch.setattr(Run, "rate", lambda self, each: logged.append((self.step, each)) or 12.5)
    pretrain(MDMConfig("sudoku4", str(tmp_path), **TINY))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert logged == [(1, 4), (3, 4)]
    assert [point.value for point in events.Scalars("throughput/sequences_per_second")] == [12.5, 12.5]


def test_throughput_counts_the_steps_since_the_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 of each step: 4 steps in 2 s, then 2 in 5 s, not counting the second that writing the line took."""
    clock, rates = iter([0.0, 2.0, 3.0, 8.0, 9.0]), []
    monkeypatch.setattr("pretrain.run.time.perf_counter", lambda: next(clock))
    with Run(Settings(str(tmp_path)), 6, {}, "fit toy") as run:
        for step in run.loop():
            if step in (3, 5):
                rates.append(run.rate(10))
                run.log({}, "a line")
    assert rates == [10 * 4 / 2.0, 10 * 2 / 5.0]


def test_without_tensorboard_a_line_says_so_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Run(Settings(str(tmp_path)), 1, {}, "fit toy") as run:
        for _ in run.loop():
            run.log({"loss": 1.0}, "loss 1.0")
    told, line = capsys.readouterr().out.splitlines()
    assert told.startswith("fit toy: no TensorBoard logs: ")
    assert told.endswith("run: pip install 'unmask[train]'")
    assert line == "fit toy 1/1 loss 1.0"
    assert not (tmp_path / "tb").exists()


# ---------------------------------------------------------------------- Weights & Biases
def test_a_project_without_wandb_is_one_line_and_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UnmaskError, match=r"logs at Weights & Biases: .*; run: pip install 'unmask\[wandb\]'"):
        Run(Settings(str(tmp_path), "toys"), 1, {}, "fit toy")
    with pytest.raises(UnmaskError, match="Weights & Biases"):
        Run(Settings(str(tmp_path / "new" / "run"), "toys"), 1, {}, "fit toy")
    assert not [*tmp_path.iterdir()], "neither folders nor files"
    with Run(Settings(str(tmp_path)), 1, {}, "fit toy") as run:
        assert [*run.loop()] == [0]


TRAINING = """
import sys
from pretrain.train import MDMConfig, pretrain
out, steps, resume = sys.argv[1:]
sizes = dict(log_every=2, batch=4, dim=8, layers=1, heads=2, threads=1)
pretrain(MDMConfig("sudoku4", out, steps=int(steps), resume=resume, wandb="toys", **sizes))
"""


@pytest.mark.trains
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="the extra wandb is not installed")
def test_weights_and_biases_gets_the_same_scalars_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    """With the library itself, offline: what it would send lies in a file per process."""
    out = tmp_path / "run"
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for steps, resume in (("4", "never"), ("6", "must")):
        command = [sys.executable, "-c", TRAINING, str(out), steps, resume]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    identity = json.loads((out / "wandb.json").read_text())["id"]
    files = sorted(out.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    events = EventAccumulator(str(out / "tb"))
    events.Reload()
    logged = {}
    for file, steps in zip(files, (4, 6), strict=True):
        told = records(file)
        assert (told["run"]["run_id"], told["run"]["project"]) == (identity, "toys")
        assert told["run"]["display_name"] == str(out)
        assert told["config"]["steps"] == steps
        logged |= {row["step"]: row for row in told["history"]}
    assert [*logged] == [1, 3, 5]
    for name in events.Tags()["scalars"]:
        assert [(p.step, p.value) for p in events.Scalars(name)] == [
            (step, pytest.approx(row[name], rel=1e-6)) for step, row in logged.items()
        ]
