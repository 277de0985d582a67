"""What a run tells: a bar that fits the terminal, a line per interval elsewhere, and how long it will take."""

import io
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pretrain import run as module
from pretrain.checkpoint import load_state, save_state
from pretrain.run import Bar, Run, duration
from pretrain.train import OBJECTIVES, pretrain
from tasks import UnmaskError


@dataclass(frozen=True)
class Settings:
    out: str
    resume: str = "never"
    save_every: int = 1000


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "about 1 second"), (42, "about 42 seconds"), (119, "about 119 seconds"), (80, "about 80 seconds"),
        (355, "about 6 minutes"), (5400, "about 90 minutes"), (7300, "about 2 hours"), (86400 * 1.5, "about 36 hours"),
        (86400 * 3, "about 3 days"),
    ],
)  # fmt: skip
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize("title", ["upo sudoku6", "pretrain " + "a-task-of-a-long-name" * 4])
def test_the_bar_fits_80_columns_and_cuts_nothing(title: str) -> None:
    written = io.StringIO()
    console = Console(file=written, width=80, force_terminal=True, color_system=None)
    bar = Bar()
    note = "iteration 12 loss 0.693 validation 45.0 (reference 50.0) lr 1.0e-03 and more behind it, in a second line"
    bar.add_task(title, total=123456, completed=100000, note=note)
    console.print(bar.get_renderable())
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    shown = re.sub(r"\s+", "", written.getvalue())
    assert note.replace(" ", "") in shown
    assert "100000/123456" in shown
    assert "…" not in shown
    if len(title) <= 30:
        assert len(lines) == 3
        assert title in lines[0]


def test_the_bar_of_an_evaluation_fits_too_whatever_its_orders_are_called() -> None:
    written = io.StringIO()
    bar = Bar(console=Console(file=written, width=80, force_terminal=True, color_system=None), transient=True)
    name = "runs/[bold]a-folder/" * 6
    bar.add_task(name, total=20000, completed=10000)
    bar.console.print(bar.get_renderable())
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "".join(re.split(r"[\s━]", line)[0] for line in lines) == name
    assert "10000/20000" in written.getvalue()
    assert Bar(console=Console(file=io.StringIO())).disable


def test_how_long_it_will_take(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """The first of each round takes longer; told once, from the first steps, and only where it is long."""
    clock = iter([0.0, 10.0, 12.0, 14.0, 16.0])
    run = Run(Settings(str(tmp_path / "long")), 400, {}, "fit toy", round_length=100)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock, 99.0))
    with run:
        for step in run.loop():
            if step == 3:
                break
    # After two steps 398 are left of 2 s each, and the first ones of three rounds, 8 s more each.
    assert capsys.readouterr().out == f"fit toy: {duration(398 * 2 + 3 * 8)} on this machine\n"
    run = Run(Settings(str(tmp_path / "short")), 20, {}, "fit toy")
    clock = iter([0.0, 1.0, 3.0, 5.0])
    with run:
        for step in run.loop():
            if step == 3:
                break
    assert capsys.readouterr().out == ""


def test_how_long_it_will_take_is_told_again_where_a_later_round_takes_longer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    steps = [60, 2, 2, 2, 75, 2, 2, 2, 400, 2, 2, 2, 500, 2, 2, 2]  # seconds; rounds of four
    clock = itertools.accumulate([0, *steps])
    run = Run(Settings(str(tmp_path / "run")), 16, {}, "fit toy", round_length=4)
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    with run:
        for _ in run.loop():
            pass
    # After the second step, and the ninth; the fifth makes it little longer.
    first, again = duration(14 * 2 + 3 * 58), duration(7 * 2 + 398)
    assert capsys.readouterr().out == f"fit toy: {first} on this machine\nfit toy: now {again} on this machine\n"


@pytest.mark.trains
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_pretraining_logs_a_line_per_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """And one at the end."""
    settings = {"steps": 5, "log_every": 2, "batch": 4, "dim": 8, "layers": 1, "heads": 2, "threads": 1, "ema": 0.0}
    pretrain(OBJECTIVES[kind]("sudoku4", str(tmp_path / "run"), **settings))
    first, *lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"pretrain sudoku4: [\d,]+ parameters, 5 steps", first)
    assert [line.rpartition(" loss ")[0] for line in lines] == [f"pretrain sudoku4 {k}/5" for k in (2, 4, 5)]


# ---------------------------------------------------------------------- places, and states that are damaged
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "--out must name a folder, not ''"),
        ("a\0b", "--out must name a folder"),
        ("x" * 300, "File name too long"),
        ("made", r"holds a model that no run here made \(adapter_config.json\)"),
        ("best", r"holds a model that no run here made \(best/config.json\)"),
    ],
)
def test_places_that_are_no_folder_of_a_run(
    out: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("made/adapter_config.json", "best/best/config.json"):
        Path(file).parent.mkdir(parents=True)
        Path(file).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UnmaskError, match=message) as told:
        Run(Settings(out), 1, {}, "fit toy")
    assert len(str(told.value)) <= 300
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("source", ["{}/best", "hf:{},dtype=float32", "{}:passes=2"])
def test_a_run_does_not_write_where_its_models_lie(source: str, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Named(Settings):
        denoiser: str = ""

    (tmp_path / "best").mkdir()
    with pytest.raises(UnmaskError, match="--denoiser and --out are the same folder"):
        Run(Named(str(tmp_path), denoiser=source.format(tmp_path)), 1, {}, "fit toy")


def test_a_shorter_run_is_told_that_it_is_shorter(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Long(Settings):
        steps: int = 3

    with Run(Long(str(tmp_path)), 3, {}, "fit toy") as run:
        assert [*run.loop()] == [0, 1, 2]
    with pytest.raises(UnmaskError, match="with other settings: steps was 3, is 2"):
        Run(Long(str(tmp_path), "must", steps=2), 2, {}, "fit toy")


def steps_of(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state["state"][0].update(exp_avg=torch.zeros(3)), "exp_avg of the optimizer has another form"),
        (lambda state: state["state"][0].update(exp_avg_sq=torch.tensor([1, 2])), "holds no floating numbers"),
        (lambda state: state["state"][0].update(step=1), "step of the optimizer has another form"),
        (lambda state: state["param_groups"][0].update(lr="x"), "lr of the optimizer is 'x'"),
        (lambda state: state["param_groups"][0].update(eps=10**400), "eps of the optimizer is 1000"),
        (lambda state: state["param_groups"][0].update(betas=[0.9, []]), "is not iterable|betas of the optimizer"),
        (lambda state: state["state"][0]["exp_avg"].fill_(torch.nan), "the optimizer has weights that are not finite"),
    ],
)
def test_a_damaged_optimizer_is_told_before_it_steps(damage, message: str, tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = steps_of(torch.optim.AdamW([parameter]), parameter)
    with Run(Settings(str(tmp_path)), 1, {"optimizer": optimizer}, "fit toy") as run:
        assert [*run.loop()] == [0]
    state = load_state(tmp_path / "state.safetensors")
    damage(state["parts"]["optimizer"])
    save_state(tmp_path / "state.safetensors", state)
    with pytest.raises(UnmaskError, match=message):
        Run(Settings(str(tmp_path), "must"), 1, {"optimizer": torch.optim.AdamW([parameter])}, "fit toy")


def test_long_work_within_a_step_is_counted_twice_a_minute(tmp_path: Path, capsys, monkeypatch) -> None:
    now = iter([0.0, 10.0, 31.0, 31.0, 40.0, 62.0, 62.0])
    with Run(Settings(str(tmp_path)), 3, {}, "fit toy") as run:
        capsys.readouterr()
        monkeypatch.setattr("pretrain.run.time.monotonic", lambda: next(now))
        count = run.counter("playing, {:,} of up to {:,} states", 4000)
        for _ in range(4):
            count(500)
        monkeypatch.undo()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"fit toy 1/3 playing, {done} of up to 4,000 states" for done in ("1,000", "2,000")]
