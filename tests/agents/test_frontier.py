"""The frontier: what is swept, which points count, what is written; and the demonstration that shows it."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import tasks
from agents import frontier
from agents.cli import main
from agents.demo import DemoConfig, run
from agents.evaluate import Result, wilson
from agents.frontier import Point
from agents.policy import PolicyConfig, new_policy
from pretrain.checkpoint import save_model
from tasks import UnknownNameError, UnmaskError
from tests.toys import rollout
from unmask_env.denoiser import load_denoiser
from unmask_env.process import Unmasking
from unmask_env.reference import Threshold, reference, sweeps
from unmask_env.state import Rollout, Rules


def point(nfe: float, solved: float, learned: bool = False) -> Point:
    values = torch.zeros(100)
    values[: round(100 * solved)] = 1
    return Point("m", {"k": nfe}, learned, Result("m", {"solved": values}, *[torch.full((100,), nfe)] * 3, 0.0))


def test_the_best_points_are_those_that_no_other_beats() -> None:
    points = [point(4, 0.5), point(3, 0.4), point(5, 0.5), point(6, 0.7), point(4, 0.6), point(2, 0.9, learned=True)]
    assert [(p.result.nfe, float(p.result.solved.mean())) for p in frontier.best_of(points, False)] == [
        (3, pytest.approx(0.4)),
        (4, pytest.approx(0.6)),
        (6, pytest.approx(0.7)),
    ]
    assert [p.result.nfe for p in frontier.best_of(points, True)] == [2]


def test_at_equal_forwards_by_hand() -> None:
    def result(solved: list[int], forwards: list[int]) -> Result:
        return Result("m", {"solved": torch.tensor(solved).float()}, *[torch.tensor(forwards).float()] * 3, 0.0)

    fewer, more = result([1, 0, 0, 0], [2, 2, 2, 2]), result([1, 1, 1, 0], [3, 4, 5, 4])
    own = result([1, 1, 0, 1], [3, 3, 3, 3])
    # Half way in forwards, half way in solved puzzles, 0.25 puzzles a forward; surpluses 0.5, 0, -0.5, 0.
    own_less = torch.tensor([1 - 0.125, 1, 0 + 0.125, 1]) - torch.tensor([1, 0.5, 0.5, 0])
    half = 1.959964 * float(own_less.std()) / 2
    expected = (0.25, 0.25 - half, 0.25 + half)
    assert frontier.at_equal_forwards([more, fewer], own) == pytest.approx(expected)
    assert frontier.at_equal_forwards([fewer, fewer, more], own) == pytest.approx(expected), "as good as one"
    assert frontier.at_equal_forwards([own, own], own) is None
    assert frontier.at_equal_forwards([fewer, own], more) is None


def test_the_interval_at_equal_forwards_counts_the_forwards_too() -> None:
    """Its half-width against the spread of the estimate over fresh draws of instances."""
    generator = torch.Generator().manual_seed(0)

    def draw(solved: float, forwards: float, hard: torch.Tensor) -> Result:
        noise = torch.rand(hard.shape, generator=generator)
        return Result("m", {"solved": (noise + 0.3 * hard < solved).float()}, *[forwards + 2 * hard + noise] * 3, 0.0)

    found = []
    for _ in range(400):
        hard = torch.rand(300, generator=generator)
        found.append(frontier.at_equal_forwards([draw(0.5, 2.0, hard), draw(0.9, 4.0, hard)], draw(0.8, 2.8, hard)))
    means = torch.tensor([mean for mean, _, _ in found])
    halves = torch.tensor([(high - low) / 2 for _, low, high in found])
    assert float(halves.mean()) == pytest.approx(1.96 * float(means.std()), rel=0.1)


@pytest.mark.slow
def test_a_sweep_plays_what_it_says(tmp_path) -> None:
    task = tasks.get("sudoku4")
    denoiser, instances = load_denoiser("sudoku4", task), task.heldout(40)
    save_model(new_policy(PolicyConfig(), task, denoiser, 0, "soft_threshold", sets=True), tmp_path / "policy")
    rules = Rules("set")
    process = Unmasking(task, denoiser, rules)
    points = frontier.sweep(process, frontier.methods(["threshold", str(tmp_path / "policy")], process), instances)
    learned = len(frontier.THRESHOLDS) + 2 * len(frontier.READ_THRESHOLDS)
    assert len(points) == len(sweeps("set")["threshold"][1]) + learned
    for p in points:
        if not p.learned:
            order = Threshold(p.setting["theta"])
            played = rollout(task, denoiser, order, instances, rules=rules)
            assert p.result.nfe == pytest.approx(float(played.nfe.float().mean()))
            assert float(p.result.solved.mean()) == pytest.approx(float(played.reward.mean()))
    nfe = [p.result.nfe for p in points if p.learned and "read" not in p.setting]
    assert nfe == sorted(nfe)
    assert nfe[0] < nfe[-1]
    frontier.write(points, "title", tmp_path / "f.png")
    rows = json.loads((tmp_path / "f.json").read_text())
    assert [row["setting"] for row in rows] == [p.setting for p in points]
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    assert "threshold" in str(frontier.table(points, "title").columns[5]._cells)


def test_what_is_swept_by_name() -> None:
    task = tasks.get("sudoku4")
    sets, remask, single = (
        Unmasking(task, load_denoiser("sudoku4", task), Rules(actions)) for actions in ("set", "set+remask", "single")
    )
    assert frontier.methods(["heuristics"], sets).keys() == sweeps("set").keys()
    assert frontier.methods(["heuristics"], remask).keys() == sweeps("set+remask").keys() > sweeps("set").keys()
    with pytest.raises(UnknownNameError, match="unknown order 'nobody'; known: entropy_bounded, "):
        frontier.methods(["nobody"], sets)
    with pytest.raises(UnmaskError, match="sweeps thresholds itself; leave them out"):
        frontier.methods(["sudoku6-tiny-sets-rewards:threshold=0.7"], sets)
    with pytest.raises(UnmaskError, match="the frontier is of sets"):
        frontier.methods(["heuristics"], single)


def test_settings_are_shown_as_they_are_typed() -> None:
    """Every setting of every curve is the rule that its name means."""
    for curve, (rule, settings) in sweeps("set+remask").items():
        for setting in settings:
            assert reference(Point(curve, setting, False, point(1, 0.5).result).order) == rule(**setting)
    for curve, setting, typed in [
        ("runs/a", {"threshold": 0.35}, "runs/a:threshold=0.35"),
        ("runs/a, reads first", {"threshold": 0.7, "read": "first"}, "runs/a:threshold=0.7,read=first"),
    ]:
        assert Point(curve, setting, True, point(1, 0.5).result).order == typed


# ---------------------------------------------------------------------- the page
ROOT = Path(__file__).parent.parent.parent


def told(page: Path) -> dict:
    """The data that a page holds."""
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text)


def test_a_page_by_hand(tmp_path) -> None:
    first = Result(
        "x</script>", {"solved": torch.tensor([1.0, 0, 0, 0])}, *torch.tensor([[2.0], [3], [4]]).expand(3, 4), 8.0
    )
    points = [
        Point("x</script>", {"threshold": 0.5}, True, first),
        Point("threshold margin", {"theta": 0.6, "score": "margin"}, False, first),
    ]
    frontier.write_page([p.row() for p in points], "a title", tmp_path / "page.html")
    point = {"mean": 0.25, "interval": list(wilson(1, 4)), "n": 4, "spent": {"forwards": 2, "passes": 7, "seconds": 2}}
    assert told(tmp_path / "page.html") == {
        "title": "a title",
        "metric": "solve rate",
        "curves": [
            {"name": "x</script>", "learned": True, "points": [{"order": "x</script>:threshold=0.5"} | point]},
            {
                "name": "threshold margin",
                "learned": False,
                "points": [{"order": "threshold:theta=0.6,score=margin"} | point],
            },
        ],
    }
    text = (tmp_path / "page.html").read_text()
    assert "http" not in text.replace("http://www.w3.org/2000/svg", ""), "it asks no server"
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize(
    "file", sorted((ROOT / "benchmarks" / "results").glob("frontier-*.json")), ids=lambda f: f.stem
)
def test_a_page_of_what_was_committed(file: Path, tmp_path) -> None:
    main(["frontier", "--read", str(file), "--html", str(tmp_path / "page.html")])
    rows, data = json.loads(file.read_text())["points"], told(tmp_path / "page.html")
    assert data["title"] == file.stem
    assert [curve["name"] for curve in data["curves"]] == list(dict.fromkeys(row["method"] for row in rows))
    points = [point for curve in data["curves"] for point in curve["points"]]
    assert [point["spent"]["forwards"] for point in points] == [row["nfe"] for row in rows]
    assert [point["interval"] for point in points] == [row["ci95"] for row in rows]


def test_a_page_of_a_frontier_that_is_played(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    sets = [
        "--task",
        "sudoku4",
        "--denoiser",
        "sudoku4",
        "--limit",
        "5",
        "--orders",
        "fixed_k margin",
        "--out",
        "f.png",
    ]
    main(["frontier", *sets, "--html", "f.html"])
    main(["frontier", "--read", "f.json", "--html", "again.html"])
    played, again = told(tmp_path / "f.html"), told(tmp_path / "again.html")
    assert played["curves"] == again["curves"]
    assert (played["title"], again["title"]) == ("sudoku4, denoiser sudoku4, 5 instances", "f")
    (tmp_path / "rows.json").write_text('[{"order": "margin"}]')
    for *words, message in (
        ("--read", "f.json", "--read draws a page; say where with --html FILE"),
        ("--read", "rows.json", "--html", "x.html", "rows.json holds no points of a frontier"),
        ("--read", "f.html", "--html", "x.html", "f.html is not JSON"),
        ("--html", "x.html", "give --task, or --read with a frontier that was played before"),
        ("--read", "f.json", "--html", ".", "--html . is a folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["frontier", *words])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_from_the_command_line(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--task", "sudoku4", "--denoiser", "sudoku4", "--limit", "20"]
    main(["evaluate", *common, "--actions", "set", "--orders", "threshold:theta=0.8", "fixed_k:k=3,score=entropy"])
    shown = capsys.readouterr().out
    assert "threshold:theta=0.8" in shown
    assert "fixed_k:k=3" in shown
    main(["frontier", *common, "--out", "f.png", "--orders", "fixed_k margin"])
    assert (tmp_path / "f.png").exists()
    assert len(json.loads((tmp_path / "f.json").read_text())) == len(sweeps("set")["fixed_k margin"][1])
    main(["frontier", *common, "--out", "t.png", "--orders", "fixed_k margin", "--temperature", "3"])
    greedy, sampled = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ft")
    assert sampled[0]["solve_rate"] < greedy[0]["solve_rate"]
    (tmp_path / "folder.png").mkdir()
    for command, *options, message in (
        ("frontier", "--out", "folder.png", "--out folder.png is a folder; name a file"),
        ("frontier", "--out", "f.jpg", "--out is a picture; f.jpg must end in .png"),
        ("frontier", "--orders", "margin", "unknown order 'margin'; known: entropy_bounded"),
        ("frontier", "--actions", "single", "the frontier is of sets"),
        ("frontier", "--json", "g.json", "unknown option --json"),
        ("evaluate", "--orders", "threshold:theta=2", "theta must be above 0 and below 1, not 2.0"),
        ("evaluate", "--orders", "threshold:colour=red", "takes theta, score, at_least; not colour"),
        (
            "evaluate",
            "--exact",
            "--actions",
            "set",
            "--exact is for greedy filling (--temperature 0), one position at a time",
        ),
        ("evaluate", "--actions", "set", "--orders", "nobody", "unknown order 'nobody'"),
        ("evaluate", "--actions", "set", "--remask-budget", "3", "remask_budget is for actions 'set+remask'"),
        ("evaluate", "--nfe-budget", "0", "nfe_budget must be a whole number of at least 1, not 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([command, *common, *options])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["evaluate", "frontier"])
def test_what_was_played_before_a_stop_is_kept(command: str, number: signal.Signals, tmp_path, capsys, monkeypatch):
    """Its rows are those of a run that was not stopped."""
    monkeypatch.chdir(tmp_path)
    orders = [f"threshold:theta={theta}" for theta in (0.6, 0.7, 0.8)] if command == "evaluate" else ["threshold"]
    files = {"evaluate": "--json", "frontier": "--out"}
    play, played = Unmasking.rollout, []

    def stopped(*args: Any, **options: Any) -> Rollout:
        if len(played) == 2:
            signal.raise_signal(number)
        played.append(1)
        return play(*args, **options)

    line = [command, "--task", "sudoku4", "--denoiser", "sudoku4", "--limit", "20", "--actions", "set"]
    main([*line, "--orders", *orders, files[command], "whole.json" if command == "evaluate" else "whole.png"])
    monkeypatch.setattr(Unmasking, "rollout", stopped)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*line, "--orders", *orders, files[command], "cut.json" if command == "evaluate" else "cut.png"])
    assert stop.value.code == 130
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == f"unmask {command}: stopped"
    whole, cut = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "cut"))
    assert len(cut) == 2
    for before, after in zip(cut, whole, strict=False):
        assert before | {"seconds": 0} == after | {"seconds": 0}


@pytest.mark.trains
@pytest.mark.parametrize("actions", ["set", "single"])
def test_the_demonstration_leaves_what_it_says(actions: str, tmp_path) -> None:
    small = {"puzzles": 60, "steps": 10, "iterations": 1, "limit": 12, "threads": 1}
    results = run(DemoConfig(out=str(tmp_path), actions=actions, **small))
    assert results[-1].order.startswith("learned")
    assert results[-1].trained == "rewards"
    assert len(json.loads((tmp_path / "table.json").read_text())) == len(results)
    pictures = {"curve.png", "replay.gif", "model.safetensors"} | ({"frontier.png"} if actions == "set" else set())
    assert pictures <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "change",
    [
        {"ci95": "ab"},
        {"ci95": [0.1]},
        {"nfe": "3"},
        {"n": 0},
        {"learned": 1},
        {"setting": []},
        {"solve_rate": None},
        {"passes": {}},
        {"method": None},
        {"seconds": "x"},
        {"nfe": float("nan")},
    ],
)
def test_rows_that_a_page_cannot_show_are_told(change: dict, tmp_path: Path) -> None:
    row = {"method": "threshold", "setting": {"theta": 0.6}, "learned": False, "order": "threshold", "solve_rate": 0.5}
    row |= {"nfe": 3.5, "passes": 3.5, "policy_passes": 0.0, "n": 2, "ci95": [0.1, 0.9], "seconds": 1.5}
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row]))
    assert frontier.read_rows(file) == [row]
    file.write_text(json.dumps([row, row | change]))
    with pytest.raises(UnmaskError, match="holds no points of a frontier"):
        frontier.read_rows(file)


def test_a_frontier_is_read_from_regular_files_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnmaskError, match="is no regular file"):
        frontier.read_rows(tmp_path / "pipe")
    (tmp_path / "deep").write_text("[" * 100_000)
    with pytest.raises(UnmaskError, match="is not JSON"):
        frontier.read_rows(tmp_path / "deep")
