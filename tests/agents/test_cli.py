"""The command line: help everywhere, one line for every mistake, and runs that survive kill -9."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import tasks
import unmask_env
from agents import options
from agents.cli import COMMANDS, main, parse, settings_class
from agents.policy import PACKAGED_POLICIES, PolicyConfig, load_policy, new_policy
from pretrain import likelihood
from pretrain.backbone import Backbone
from pretrain.checkpoint import PACKAGED_DENOISERS, load_state, packaged, save_model
from pretrain.train import MDMConfig, pretrain
from tasks import UnmaskError
from tasks.settings import validate
from unmask_env import exact, ids
from unmask_env.denoiser import load_denoiser
from unmask_env.process import Unmasking
from unmask_env.reference import REFERENCES, Policy, reference
from unmask_env.state import Rollout, Rules

ROOT = Path(__file__).parents[2]
SUDOKU6 = tasks.get("sudoku6")
TINY = ("--task", "sudoku6", "--denoiser", "sudoku6-tiny")
SINGLE, SETS = "sudoku6-tiny-rewards", "sudoku6-tiny-sets-rewards"
LEVELS = [
    (), ("list",), ("pretrain",), ("pretrain", "mdm"), ("train",), ("train", "upo"), ("train", "imitation"),
    ("train", "ppo-sb3"), ("train", "ppo-torchrl"), ("train", "grpo-torchrl"),
    ("evaluate",), ("frontier",), ("likelihood",), ("export",), ("show",), ("demo",),
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def unmask(capsys: pytest.CaptureFixture[str]):
    """Runs the command line in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "agents.cli", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4x4 denoiser of a few steps: often unsure, often wrong."""
    out = tmp_path_factory.mktemp("weak") / "denoiser"
    pretrain(MDMConfig("sudoku4", str(out), steps=30, batch=32, dim=16, layers=1, heads=2, ema=0.0, threads=1))
    return out


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An order policy of 6x6 boards in a folder."""
    task = tasks.get("sudoku6")
    folder = tmp_path_factory.mktemp("order") / "policy"
    save_model(new_policy(PolicyConfig(), task, load_denoiser("sudoku6-tiny", task), seed=0), folder)
    return folder


def write_puzzles(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def boards(n: int, solutions: bool) -> list[str]:
    """The first ``n`` held-out 6x6 puzzles as lines of a user's file."""
    instances = tasks.get("sudoku6").heldout(n)
    lines = ["Puzzle,Solution" if solutions else "Puzzle"]
    for puzzle, answer in zip(instances.tokens.tolist(), instances.answers.tolist(), strict=True):
        text = "".join("." if t == 6 else str(t + 1) for t in puzzle)
        lines.append(text + "," + "".join(str(t + 1) for t in answer) if solutions else text)
    return lines


# ---------------------------------------------------------------------- what it prints
@pytest.mark.parametrize("level", LEVELS, ids=" ".join)
def test_help_on_every_level(unmask, level: tuple[str, ...]) -> None:
    done = unmask(*level, "--help")
    assert done.code == 0
    assert done.err == ""
    assert done.out.startswith("usage: unmask")
    assert " ".join(level) in re.sub(r"\s+", " ", done.out)


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help"), ("train",), ("paint",), ()], ids=" ".join)
def test_the_tables_of_commands_come_without_torch(arguments: tuple[str, ...]) -> None:
    """So they are there at once."""
    script = (
        "import sys\nfrom agents.cli import main\n"
        f"try:\n    main({list(arguments)})\n"
        "except SystemExit as stop:\n    print(stop.code, [name for name in ('torch', 'tyro') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    *table, last = done.stdout.splitlines()
    assert last == f"{0 if '--help' in arguments else 2} []"
    assert (table == []) == (arguments[-1:] != ("--help",))
    names = {line.split()[0] for line in table[2:] if line.startswith("  ")}
    if not table:
        assert "known: " in done.stderr
    elif arguments and arguments[0] != "--help":
        assert table[0].startswith(f"usage: unmask {arguments[0]} COMMAND")
        assert names == {"policy-iteration", "imitation", "upo", "ppo-sb3", "ppo-torchrl", "grpo-torchrl"}
        assert table[-1] == "unmask train OPTIONS is unmask train policy-iteration OPTIONS, whose --help lists them."
    else:
        assert {level[0] for level in LEVELS if level} == names


def test_list(unmask) -> None:
    done = unmask("list")
    assert (done.code, done.err) == (0, "")
    words = set(re.split(r"[\s,]+", done.out))
    assert {*tasks.names(), *ids(), *packaged(PACKAGED_DENOISERS), *REFERENCES} <= words
    for title in ("tasks", "environments", "packaged denoisers", "reference policies", "packaged order policies"):
        assert f"{title}: " in done.out


@pytest.mark.slow
def test_as_a_program() -> None:
    """The entry point outside this process: list, and a mistake."""
    right, wrong = start("list"), start("evaluate", "--task", "sudoku5", "--denoiser", "sudoku6-tiny")
    out, err = right.communicate(timeout=120)
    assert (right.returncode, err) == (0, "")
    assert "Unmask/Sudoku6x6-v0" in out
    out, err = wrong.communicate(timeout=120)
    assert (wrong.returncode, out) == (2, "")
    own = "your own: file.py:Class or package.module:Class"
    known = f"did you mean sudoku4 or sudoku6? known: {', '.join(tasks.names())}; {own}"
    assert err == f"unmask evaluate: unknown task 'sudoku5'; {known}\n"


def test_version_is_the_packages(unmask) -> None:
    """One number: the package's, the distribution's and the citation's."""
    assert unmask("--version") == Outcome(0, f"unmask {unmask_env.__version__}\n", "")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "unmask_env.names.__version__"}
    assert f"\nversion: {unmask_env.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.settings])
def test_help_lists_every_option_once_the_common_ones_first(unmask, monkeypatch, name: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = unmask(*name.split(), "--help").out
    listed = re.findall(r"^  (--[a-z0-9-]+|[A-Z]+)", out, re.MULTILINE)
    settings = settings_class(name)
    assert sorted(listed) == sorted(["--config", *(option.flag for option in options.options_of(settings))])
    common = out.partition("common options:\n")[2].partition("\n\n")[0]
    assert 5 <= len(re.findall("^  [A-Z-]", common, re.MULTILINE)) <= 12
    assert not re.search(r"``|:\w+:`|\*\*|default: None|\{None|\x1b", out)
    assert max(map(len, out.splitlines())) <= 80


def test_the_options_are_those_that_are_read() -> None:
    """tyro, which reads the line, has the same flags, and takes every default as help shows it."""
    for name, command in COMMANDS.items():
        if not command.settings:
            continue
        settings = settings_class(name)
        words = []
        for option in options.options_of(settings):
            shown = re.fullmatch(r"\(default: (.*)\)", options.shown_default(option))
            if option.positional:
                words.append("x")
            elif option.required:
                words += [option.flag, option.form.strip("{}").split(",")[0] if option.form[0] == "{" else "x"]
            elif option.form and shown:
                words += [option.flag, *shown[1].split(" ")]
            elif not option.form:
                words.append(option.flag if option.default else f"--no-{option.flag[2:]}")
        required = {o.name: getattr(parse(name, words), o.name) for o in options.options_of(settings) if o.required}
        assert parse(name, words) == settings(**required), name


def test_marks_of_other_languages_become_words() -> None:
    text = "with ``beta``\nor ``best_of``: :class:`tasks.Task`, :mod:`~a.b`; **never** 2 * 3"
    assert options.plain(text, ["beta"]) == "with --beta or best_of: tasks.Task, a.b; never 2 * 3"


# ---------------------------------------------------------------------- settings from a file
def test_config_reads_back_what_a_run_wrote(unmask, weak: Path, tmp_path: Path) -> None:
    """The same settings but for what the line says."""
    written = json.loads((weak / "run.json").read_text())
    settings = parse("pretrain mdm", ["--config", str(weak / "run.json")])
    assert settings == MDMConfig(**{name: value for name, value in written.items() if name != "kind"})
    words = ["--steps", "7", f"--config={weak / 'run.json'}", "--out", "elsewhere"]
    assert parse("pretrain mdm", words) == replace(settings, steps=7, out="elsewhere")
    mistake = unmask("train", "upo", "--config", weak / "run.json")
    check_mistake(mistake, "unmask train upo: --config", "holds the settings of unmask pretrain mdm")
    again = unmask("pretrain", "mdm", "--config", weak / "run.json")
    check_mistake(again, "already holds a run")


def test_config_of_nested_settings(tmp_path: Path) -> None:
    words = ["--out", "x", "--actions", "set", "--no-copy", "--layers", "2", "--beta", "1e-3", "--nfe-budget", "9"]
    settings = parse("train upo", words)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(asdict(settings), default=str))
    assert parse("train upo", ["--config", str(file)]) == settings
    assert parse("train upo", ["--config", str(file), "--layers", "3"]).policy == replace(settings.policy, layers=3)
    file.write_text(json.dumps({"task": "sudoku6", "orders": ["margin", "random"], "json": "rows.json", "limit": 3}))
    asked = parse("evaluate", ["--config", str(file), "--orders", "entropy"])
    assert (asked.task, asked.orders, asked.json, asked.limit) == ("sudoku6", ("entropy",), Path("rows.json"), 3)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[1]", "holds no JSON object of settings"),
        ("{", "is not JSON"),
        ('{"orderz": ["margin"]}', "unknown setting 'orderz'; did you mean orders?"),
        ('{"limit": "many"}', 'limit cannot be "many"'),
        ('{"limit": true}', "limit cannot be true"),
        ('{"seed": null}', "seed must be given, not null"),
        ('{"difficulty": "odd", "task": "sudoku6", "denoiser": "sudoku6"}', "difficulty"),
        ('{"limit": 3}', "--task must be given"),
    ],
)
def test_a_config_that_cannot_be_read(unmask, tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(text)
    check_mistake(unmask("evaluate", "--config", file), "unmask evaluate: ", why)


def test_a_config_needs_a_file(unmask, tmp_path: Path) -> None:
    check_mistake(unmask("evaluate", "--config"), "--config takes one file")
    check_mistake(unmask("evaluate", "--config", "--task", "sudoku6"), "--config takes one file")
    check_mistake(unmask("evaluate", "--config", tmp_path / "no.json"), "--config: cannot read", "no.json")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"[" * 100_000, "is not JSON"),
        (b'{"lr": ' * 5000, "is not JSON"),
        (b'{"lr": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"lr": ' + b"9" * 400 + b"}", "lr cannot be 999"),
        (b'{"lr": NaN}', "lr cannot be NaN"),
        (b'{"lr": true}', "lr cannot be true"),
        (b'{"iterations": 1.5}', "iterations cannot be 1.5"),
        (b'{"iterations": 1e400, "out": "x"}', "iterations cannot be Infinity"),
        (b'{"kind": []}', "holds the settings of another command"),
        (b'{"kind": {"UPOConfig": 1}}', "holds the settings of another command"),
        (b'{"rules": 5}', "rules cannot be 5"),
        (b'{"rules": {"rules": {}}}', "unknown setting 'rules'"),
        (b'{"policy": [[]]}', "policy cannot be [[]]"),
        (b'{"rules": {"actions": ["set"]}}', "actions must be single or set"),
        (b'{"out": {"a": 1}}', 'out cannot be {"a": 1}'),
        (b'{"' + b"x" * 10_000 + b'": 1}', "unknown setting 'xxx"),
        (b"\xff\xfe{\x00}\x00", "as UTF-8 text (UnicodeDecodeError)"),
        (b"", "is not JSON"),
        (b"null", "holds no JSON object"),
    ],
)
def test_a_damaged_config_is_one_line(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UnmaskError) as caught:
        validate(parse("train upo", ["--config", str(tmp_path / "run.json")]))
    assert why in str(caught.value)
    assert len(str(caught.value)) <= 300


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes that have names")
def test_a_config_that_never_ends_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for endless in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UnmaskError, match="is no regular file"):
            parse("train upo", ["--config", str(endless)])
    (tmp_path / "bom.json").write_bytes(b'\xef\xbb\xbf{"out": "x"}')
    assert parse("train upo", ["--config", str(tmp_path / "bom.json")]).out == "x"


# ---------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("arguments", "err"),
    [
        (["evalute"], "unmask: unknown command 'evalute'; did you mean evaluate? known: "),
        (["train", "uop"], "unmask train: unknown command 'uop'; did you mean upo? known: policy-iteration, "),
        (["evaluate", "--lmit=3"], "unmask evaluate: unknown option --lmit; did you mean --limit?"),
        (["evaluate", *TINY, "--orders", "margn"], "unknown order 'margn'; did you mean margin"),
        (["evaluate", *TINY, "--limit", "many"], "unmask evaluate: --limit takes a whole number, not 'many'"),
        (
            ["evaluate", *TINY, "--difficulty", "hrd"],
            "--difficulty takes all, easy, hard, not 'hrd'; did you mean hard?",
        ),
        (["evaluate", *TINY, "stray"], "unmask evaluate: 'stray' belongs to no option"),
        (["train", "upo"], "unmask train upo: --out must be given"),
        (["list", "all"], "unmask list: it takes no arguments, not 'all'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_may_have_been_meant(unmask, arguments: list[str], err: str) -> None:
    done = unmask(*arguments)
    check_mistake(done)
    assert err in done.err


def check_mistake(done: Outcome, *parts: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that says which command was wrong, and how."""
    assert done.code == 2
    assert re.match(r"unmask( [a-z][a-z0-9-]*){0,2}: ", done.err), done.err
    assert done.err.endswith("\n")
    assert done.err.count("\n") == 1, done.err
    assert done.out == ""
    for part in parts:
        assert part in done.err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["evaluate", "--task", "sudoku5", "--denoiser", "sudoku6-tiny"], ["unknown task 'sudoku5'", "sudoku4"]),
        (["evaluate", *TINY, "--orders", "margin", "best"], ["unknown order 'best'", "left_to_right"]),
        (["evaluate", *TINY, "--orders"], ["orders"]),
        (["evaluate", "--task", "sudoku6", "--denoiser", "sudoku7"], ["unknown denoiser 'sudoku7'", "sudoku6-tiny"]),
        (
            ["evaluate", "--task", "sudoku4", "--denoiser", "sudoku6-tiny"],
            ["task sudoku4 has 4 symbols and 16 positions", "6 symbols and 36 positions"],
        ),
        (["evaluate", *TINY, "--limit", "0"], ["limit must be a whole number of at least 1, not 0"]),
        (["evaluate", *TINY, "--limit", "-3"], ["limit must be a whole number of at least 1, not -3"]),
        (["evaluate", *TINY, "--limit", "10000000"], ["cannot take 10000000"]),
        (["evaluate", *TINY, "--limit", "many"], ["--limit", "many"]),
        (["evaluate", *TINY, "--limit", "1", "--batch", "0"], ["batch must be a whole number of at least 1, not 0"]),
        (["evaluate", *TINY, "--blanks", "36"], ["blanks must be between 1 and 35, not 36"]),
        (["evaluate", *TINY, "--device", "gpu"], ["unknown device 'gpu'"]),
        (["evaluate", *TINY, "--puzzles", "nowhere.csv"], ["nowhere.csv"]),
        (["evaluate", *TINY, "--puzzles", "nowhere.csv", "--blanks", "5"], ["--blanks"]),
        (["evaluate", *TINY, "--colour", "red"], ["--colour"]),
        (["evaluate", "--task", "sudoku6"], ["--denoiser"]),
        (["evaluate"], ["--task"]),
        (["evaluate", "--env", "Unmask/Nope-v0"], ["unknown environment 'Unmask/Nope-v0'"]),
        (["paint"], ["paint"]),
        (["train", "sarsa", "--out", "x"], ["sarsa"]),
        ([], ["list"]),
        (["train"], ["policy-iteration", "upo", "imitation", "ppo-sb3", "ppo-torchrl", "grpo-torchrl"]),
        (["train", "upo"], ["--out"]),
        (["train", "upo", "--out", "x", "--reference", "best"], ["best", "margin"]),
        (["train", "upo", "--out", "x", "--env", "Unmask/Sudoku5x5-v0"], ["unknown environment", "Sudoku6x6"]),
        (["train", "upo", "--out", "x", "--group", "1"], ["group must be a whole number of at least 2, not 1"]),
        (
            ["train", "upo", "--out", "x", "--reference", "margin", "--regulariser", "step_kl", *TINY[2:]],
            ["KL to the deterministic reference margin is infinite"],
        ),
        (["train", "upo", "--out", "x", "--denoiser", "sudoku6-tiny", "--resume", "must"], ["nothing to resume"]),
        (["train", "ppo-sb3", "--out", "x", "--reference", "margin", *TINY[2:]], ["deterministic reference margin"]),
        (
            ["train", "ppo-torchrl", "--out", "x", "--reference", "entropy", *TINY[2:]],
            ["deterministic reference entropy is infinite"],
        ),
        (["train", "ppo-torchrl", "--out", "x", "--minibatches", "7", *TINY[2:]], ["64 boards x 36 steps", "7 minib"]),
        (
            ["train", "grpo-torchrl", "--out", "x", "--group", "1", *TINY[2:]],
            ["group must be a whole number of at least 2, not 1"],
        ),
        (
            ["train", "ppo-sb3", "--out", "x", "--num-envs", "0", *TINY[2:]],
            ["num_envs must be a whole number of at least 1, not 0"],
        ),
        (["evaluate", *TINY, "--limit", "5", "--exact"], ["holes, and 16 are allowed", "fewer blanks"]),
        (
            ["train", "imitation", "--out", "x", "--certain-fraction", "2"],
            ["certain_fraction must be a number between 0 and 1, not 2"],
        ),
        (["pretrain", "mdm", "--task", "sudoku5", "--out", "x"], ["unknown task 'sudoku5'"]),
        (["pretrain", "mdm", "--task", "sudoku4"], ["--out"]),
        (["pretrain", "mdm", "--task", "sudoku4", "--out", "x", "--resume", "must"], ["nothing to resume"]),
        (["show", *TINY, "--order", "best"], ["unknown order 'best'"]),
        (["show", *TINY, "--index", "-1"], ["index must be between 0 and", "not -1"]),
        (["show", *TINY, "--index", "10000000"], ["index must be between 0 and", "not 10000000"]),
        (["likelihood", *TINY, "--samples", "0"], ["samples must be a whole number of at least 1, not 0"]),
        (["likelihood", *TINY, "--limit", "0"], ["limit must be a whole number of at least 1, not 0"]),
        (["likelihood", *TINY, "--json", "."], ["is a folder; name a file"]),
        (["likelihood", "--task", "text", "--denoiser", "sudoku6-tiny"], ["task text has 84 symbols and 64 positions"]),
        (["evaluate", *TINY, "--orders", "margin", "learned"], ["has learned no order", "unmask pretrain lomdm"]),
        (["train", "upo", "--out", "x", "--reference", "learned", *TINY[2:]], ["has learned no order"]),
        (["pretrain", "mdm", "--task", "sudoku4:size=5", "--out", "x"], ["takes blanks, reward; not size"]),
        (["pretrain", "mdm", "--task", "tabular:no.csv", "--out", "x"], ["cannot read no.csv"]),
        (["pretrain", "mdm", "--task", "text:no.txt", "--out", "x"], ["cannot read no.txt as UTF-8 text"]),
        (
            ["pretrain", "lomdm", "--task", "sudoku4", "--order-lr", "-1", "--out", "x"],
            ["order_lr must be a number of at least 0, not -1"],
        ),
        (["demo", "--denoiser", "sudoku7", "--out", "x"], ["unknown denoiser 'sudoku7'"]),
        (["demo", "--denoiser", "sudoku6-tiny", "--out", "x", "--limit", "0"], ["limit must be a whole", "not 0"]),
        (["evaluate", *TINY, "--difficulty", "odd"], ["--difficulty", "odd"]),
        (["evaluate", *TINY, "--orders", "threshold", "--actions", "single"], ["threshold is for actions 'set'"]),
        (["evaluate", *TINY, "--orders", "remdm", "--actions", "set"], ["remdm is for actions 'set+remask'"]),
        (["show", *TINY, "--order", "threshold", "--actions", "single"], ["threshold is for actions 'set'"]),
        (["show", *TINY, "--order", "remdm", "--actions", "set"], ["remdm is for actions 'set+remask'"]),
        (["show", *TINY, "--order", f"{SINGLE}:threshold=0.5"], ["chooses single positions and takes no options"]),
        (
            ["show", *TINY, "--order", f"{SETS}:threshold=1"],
            [f"order '{SETS}:threshold=1': threshold must be", "not 1"],
        ),
        (["evaluate", *TINY, "--orders", f"{SETS}:remask_threshold=0.3"], ["was not trained to mask again; leave"]),
        (["evaluate", *TINY, "--orders", f"{SETS}:defer_above=0.99"], ["defer_above is of boards that are not read"]),
        (
            ["evaluate", *TINY, "--orders", f"{SETS}:0.7"],
            ["defer_above; not source ('0.7' is not of the form option=value)"],
        ),
        (["evaluate", *TINY, "--orders", "margin", "margin"], ["two orders are called margin; leave one out"]),
        (["evaluate", *TINY, "--orders", ""], ["unknown order ''; known: "]),
        (["evaluate", *TINY, "--env", "sudoku4"], ["--task and --env mean the same; give one of them"]),
        (["evaluate", *TINY, "--temperature", "1e-300"], ["temperature must be a number of at least 1e-09, or 0"]),
        (["evaluate", *TINY, "--orders", "softmax_margin:tau=1e-45"], ["tau must be a number of at least 1e-09"]),
        (
            ["evaluate", "--config", "nowhere.json"],
            ["--config: cannot read nowhere.json as UTF-8 text: there is no such file"],
        ),
        (["frontier", "--read", "a.json", "--html", "b.html", "--limit", "3"], ["plays nothing; leave --limit out"]),
        (["evaluate", *TINY, "--orders", f"{SETS}:read=never"], ["read", "always"]),
        (
            ["evaluate", *TINY, "--orders", f"{SETS}:theta=0.5"],
            ["takes threshold, remask_threshold, read, defer_above; not theta"],
        ),
        (["evaluate", *TINY, "--orders", "nobody:threshold=0.5"], ["unknown order 'nobody'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(unmask, tmp_path: Path, monkeypatch, arguments: list[str], parts: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    done = unmask(*arguments)
    check_mistake(done, *parts)
    assert not list(tmp_path.iterdir()), "nothing was written"
    assert done.err.startswith(f"unmask {' '.join(named_by(arguments))}".strip() + ": ")


def named_by(arguments: list[str]) -> tuple[str, ...]:
    """The words of the longest command, or group of commands, that the line begins with."""
    levels = {*LEVELS, *(tuple(name.split()) for name in COMMANDS)}
    return max((level for level in levels if tuple(arguments[: len(level)]) == level), key=len)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("12", "has 2 characters; a 6x6 board has 36"),
        ("7" + "." * 35, "has '7'; allowed are 1-6"),
        ("11" + "." * 34, "digit 1 twice in row 1"),
        ("12345." + "." * 11 + "6" + "." * 18, "the puzzle has no solution"),
        ("." * 36 + "," + "1" * 36, "columns"),
    ],
    ids=["length", "digit", "clues", "unsolvable", "columns"],
)
def test_a_malformed_puzzle_file(unmask, tmp_path: Path, line: str, why: str) -> None:
    """Its line is named before anything runs or is looked up: the denoiser does not even exist."""
    file = write_puzzles(tmp_path / "mine.csv", [*boards(3, solutions=False), line])
    out = tmp_path / "rows.json"
    done = unmask("evaluate", "--task", "sudoku6", "--denoiser", "sudoku7", "--puzzles", file, "--json", out)
    check_mistake(done, f"{file}, line 5: ", why)
    assert not out.exists()


def test_a_policy_is_no_denoiser_and_the_reverse(unmask, order: Path, weak: Path) -> None:
    check_mistake(unmask("evaluate", "--task", "sudoku6", "--denoiser", order), "is no denoiser")
    check_mistake(unmask("evaluate", "--task", "sudoku4", "--denoiser", weak, "--orders", weak), "order policy")
    done = unmask("evaluate", "--task", "sudoku4", "--denoiser", weak, "--orders", order)
    check_mistake(done, "is for 6 symbols and 36 positions; task sudoku4 has 4 and 16")


def test_a_truncated_or_foreign_checkpoint(unmask, order: Path, tmp_path: Path) -> None:
    for name, cut in (("truncated", slice(0, -100)), ("empty", slice(0, 0)), ("foreign", slice(9, None))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes((order / "config.json").read_bytes())
        (folder / "model.safetensors").write_bytes((order / "model.safetensors").read_bytes()[cut])
        check_mistake(unmask("evaluate", *TINY, "--orders", folder), "truncated or not safetensors")
        check_mistake(unmask("show", *TINY, "--order", folder), "truncated or not safetensors")
    (tmp_path / "bare").mkdir()
    check_mistake(unmask("evaluate", *TINY, "--orders", tmp_path / "bare"), "config.json is missing")
    check_mistake(unmask("evaluate", *TINY, "--orders", tmp_path / "nowhere"), "the folder does not exist")


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", *TINY, "--limit", "1", "--orders", "margin", "--json"],
        ["show", *TINY, "--delay", "0", "--gif"],
        [
            "pretrain",
            "mdm",
            "--task",
            "sudoku4",
            "--steps",
            "1",
            "--dim",
            "8",
            "--layers",
            "1",
            "--heads",
            "1",
            "--out",
        ],
    ],
    ids=["json", "gif", "out"],
)
def test_a_place_that_cannot_be_written_to(unmask, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "file").write_text("")
    done = unmask(*arguments, tmp_path / "file" / "below")
    assert done.code == 2
    assert done.err.startswith(f"unmask {' '.join(named_by(arguments))}: ")
    assert done.err.count("\n") == 1
    assert str(tmp_path / "file") in done.err


# ---------------------------------------------------------------------- evaluate
@pytest.mark.parametrize("solutions", [True, False])
def test_evaluate_a_users_file(unmask, order: Path, tmp_path: Path, solutions: bool) -> None:
    file = write_puzzles(tmp_path / "mine.csv", boards(12, solutions))
    out = tmp_path / "new" / "rows.json"
    orders = ["random", "margin", "oracle", str(order)]
    done = unmask("evaluate", *TINY, "--orders", *orders, "--puzzles", file, "--json", out)
    assert (done.code, done.err) == (0, "")
    assert "12 instances" in done.out
    rows = json.loads(out.read_text())
    assert [row["order"] for row in rows] == orders
    for row in rows:
        metrics, counts = ["solve_rate", "cell_accuracy", "valid_rate"], ["nfe", "passes", "policy_passes"]
        assert list(row) == ["order", *metrics, *counts, "trained", "n", "ci95", "seconds"]
        assert row["n"] == 12
        assert 0 <= row["solve_rate"] <= row["cell_accuracy"] <= 1
        assert row["ci95"][0] <= row["solve_rate"] <= row["ci95"][1] + 1e-9
    blanks = [line.split(",")[0].count(".") for line in boards(12, solutions)[1:]]
    assert all(row["nfe"] == pytest.approx(sum(blanks) / 12) for row in rows)
    assert rows[0]["solve_rate"] < rows[1]["solve_rate"]


@pytest.mark.slow
def test_evaluate_is_the_same_for_a_file_and_the_packaged_puzzles(unmask, tmp_path: Path) -> None:
    """And --limit cuts both."""
    file = write_puzzles(tmp_path / "mine.csv", boards(30, solutions=True))
    rows = []
    for name, words in (("a", ["--puzzles", file]), ("b", [])):
        out = tmp_path / f"{name}.json"
        done = unmask("evaluate", *TINY, "--orders", "left_to_right", "--limit", "20", "--json", out, *words)
        assert done.code == 0
        [row] = json.loads(out.read_text())
        rows.append({key: value for key, value in row.items() if key != "seconds"})
    assert rows[0] == rows[1]
    assert rows[0]["n"] == 20


def test_json_on_stdout(unmask, tmp_path: Path) -> None:
    """Alone there, the table beside it on stderr: the same rows as in a file."""
    words = ("--limit", "4", "--blanks", "5", "--orders", "random", "margin", "--seed", "3", "--exact")
    done = unmask("evaluate", *TINY, *words, "--json", "-")
    unmask("evaluate", *TINY, *words, "--json", tmp_path / "rows.json")
    rows, filed = json.loads(done.out), json.loads((tmp_path / "rows.json").read_text())
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in rows] == [
        {k: v for k, v in row.items() if k != "seconds"} for row in filed
    ]
    assert "solve rate" in done.err
    assert "trajectory KL" in done.err
    done = unmask("likelihood", *TINY, "--limit", 4, "--samples", 2, "--json", "-")
    assert [row["form"] for row in json.loads(done.out)] == ["path bound", "order bound"]
    assert "perplexity" in done.err


@pytest.mark.parametrize("columns", ["80", "44"])
def test_tables_cut_no_name(unmask, order: Path, monkeypatch, columns: str) -> None:
    """On a narrow terminal they wrap."""
    monkeypatch.setenv("COLUMNS", columns)
    out = unmask("evaluate", *TINY, "--orders", order, "softmax_confidence", "--limit", "2").out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= int(columns)
    first = "".join(line[: line.index("  ")] if "  " in line else line for line in out.replace("\n ", "\n").split("\n"))
    assert str(order) in first
    assert "softmax_confidence" in first


def test_evaluate_with_a_number_of_blanks(unmask, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    unmask("evaluate", *TINY, "--orders", "random", "--limit", "9", "--blanks", "7", "--json", out)
    assert json.loads(out.read_text())[0]["nfe"] == 7


def test_likelihood(unmask, tmp_path: Path) -> None:
    """The table and the file say what the bounds say; 28,200,960 grids of 6x6 have log 17.155."""
    done = unmask("likelihood", *TINY, "--limit", 40, "--samples", 4, "--batch", 40, "--json", tmp_path / "rows.json")
    assert done.code == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["form"] for row in rows] == ["path bound", "order bound"]
    task = tasks.get("sudoku6")
    model = load_denoiser("sudoku6-tiny", task).model
    found = likelihood.bound(model, task.heldout(40).answers, torch.Generator().manual_seed(0), samples=4)
    assert rows[0]["nats"] == pytest.approx(float(found.path.mean()))
    assert rows[0]["standard_error"] == pytest.approx(float(found.path.std()) / 40**0.5)
    assert rows[0]["nats"] > 17.155
    assert f"{rows[0]['nats']:.3f}" in done.out
    again = unmask("likelihood", *TINY, "--limit", 40, "--samples", 4, "--truncated")
    assert "(no bound)" in again.out


@pytest.mark.trains
@pytest.mark.parametrize("kind", ["udm", "maxcoupling", "audm"])
def test_uniform_denoisers(unmask, tmp_path: Path, kind: str) -> None:
    """Trained, scored; and under orders only where the model knows which symbols are noise."""
    out = tmp_path / "run"
    small = ("--steps", 3, "--batch", 8, "--dim", 16, "--layers", 1, "--heads", 2, "--threads", 1)
    assert unmask("pretrain", kind, "--task", "sudoku4", "--out", out, *small).code == 0
    scored = unmask("likelihood", "--task", "sudoku4", "--denoiser", out, "--limit", 20)
    assert scored.code == 0
    assert "path bound" in scored.out
    played = unmask("evaluate", "--task", "sudoku4", "--denoiser", out, "--orders", "margin", "--limit", 5)
    if kind == "audm":
        assert played.code == 0
    else:
        assert played.code == 2
        assert "was trained with uniform noise" in played.err
    assert "masked models" in unmask("likelihood", "--task", "sudoku4", "--denoiser", out, "--truncated").err


@pytest.mark.slow
def test_evaluate_by_difficulty(unmask, tmp_path: Path) -> None:
    """Puzzles that singles solve, those that need more, and both."""
    rows = {}
    for difficulty in ("easy", "hard", "all"):
        out = tmp_path / "rows.json"
        options = [] if difficulty == "all" else ["--difficulty", difficulty]
        assert unmask("evaluate", *TINY, "--orders", "margin", "--limit", 40, "--json", out, *options).code == 0
        [rows[difficulty]] = json.loads(out.read_text())
        given = SUDOKU6.heldout(40, difficulty=difficulty)
        assert rows[difficulty]["nfe"] == pytest.approx(float((given.tokens == 6).sum(1).float().mean()))
    assert rows["easy"]["solve_rate"] > rows["hard"]["solve_rate"]


def test_every_order_plays_the_kind_of_action_that_it_is_made_for(unmask, tmp_path: Path) -> None:
    out, orders = (
        tmp_path / "rows.json",
        ["margin", "fixed_k:k=4", "remdm:steps=6", "sudoku6-tiny-sets-rewards", "oracle_sets"],
    )
    options = ("--limit", 6, "--orders", *orders, "--json", out)
    assert unmask("evaluate", *TINY, *options).code == 0
    rows = {row["order"]: row["nfe"] for row in json.loads(out.read_text())}
    given = SUDOKU6.heldout(6)
    blanks = (given.tokens == 6).sum(1).float()
    assert rows["margin"] == pytest.approx(float(blanks.mean()))
    assert rows["fixed_k:k=4"] == pytest.approx(float((blanks / 4).ceil().mean()))
    assert max(rows["sudoku6-tiny-sets-rewards"], rows["oracle_sets"]) < rows["fixed_k:k=4"]
    process = Unmasking(SUDOKU6, load_denoiser("sudoku6-tiny", SUDOKU6), Rules("set+remask"))
    played = process.rollout(
        reference("remdm:steps=6"), given[blanks.argsort(stable=True)], torch.Generator().manual_seed(0)
    )
    assert rows["remdm:steps=6"] == pytest.approx(float(played.nfe.float().mean()))
    assert int(played.state.remask_count.sum()) > 0


@pytest.mark.slow
def test_evaluate_follows_the_seed(unmask, tmp_path: Path) -> None:
    rates = []
    for seed in (1, 1, 2):
        out = tmp_path / "rows.json"
        unmask("evaluate", *TINY, "--orders", "random", "--limit", "20", "--seed", seed, "--json", out)
        rates.append(json.loads(out.read_text())[0]["cell_accuracy"])
    assert rates[0] == rates[1] != rates[2]


@pytest.mark.parametrize("reference_name", [None, "random"])
def test_evaluate_with_exact_columns(unmask, tmp_path: Path, reference_name: str | None) -> None:
    out, orders = tmp_path / "rows.json", ["random", "margin", "oracle"]
    options = [] if reference_name is None else ["--reference", reference_name]
    done = unmask(
        "evaluate", "--task", "sudoku4", "--denoiser", "sudoku4", "--orders", *orders, "--blanks", "8", "--limit", "5",
        "--exact", "--json", out, *options,
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert f"divergences from {reference_name or 'softmax_confidence'} in nats" in re.sub(r"\s+", " ", done.out)
    rows = json.loads(out.read_text())
    assert [row["order"] for row in rows] == orders
    assert not any(key.startswith("exact") for key in rows[2]), "the oracle sees the answers"
    task = tasks.get("sudoku4", blanks=8)
    graph = exact.enumerate_boards(Unmasking(task, load_denoiser("sudoku4", task)), task.heldout(5))
    best = float((graph.weight * exact.best_reward(graph)).sum())
    for row in rows[:2]:
        values = exact.evaluate(graph, reference(row["order"]), reference(reference_name or "softmax_confidence"))
        for key in ("reward", "trajectory_kl", "terminal_kl"):
            mean = float((graph.weight * getattr(values, key)).sum())
            assert row[f"exact_{key}"] == pytest.approx(mean, abs=1e-6), key
        assert row["exact_best"] == pytest.approx(best, abs=1e-9)
        assert row["exact_best"] >= row["exact_reward"] - 1e-9
        assert row["exact_trajectory_kl"] >= row["exact_terminal_kl"] - 1e-9
        assert row["n"] == 5
    assert rows[0]["exact_reward"] < 0.99 < rows[0]["exact_best"], "the order matters"


def test_large_boards_are_refused_before_anything_is_evaluated(unmask, monkeypatch, tmp_path: Path) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was evaluated")

    monkeypatch.setattr("agents.evaluate.compare", never)
    out = tmp_path / "rows.json"
    check_mistake(unmask("evaluate", *TINY, "--exact", "--json", out), "28 holes, and 16 are allowed")
    assert not out.exists()


# ---------------------------------------------------------------------- show
def test_show_fills_one_board(unmask, tmp_path: Path) -> None:
    gif = tmp_path / "new" / "replay.gif"
    done = unmask("show", *TINY, "--order", "oracle", "--index", "3", "--delay", "0", "--gif", gif)
    assert (done.code, done.err) == (0, "")
    instance = tasks.get("sudoku6").heldout(4)
    blanks = int((instance.tokens[3] == 6).sum())
    line = r"step (\d+) \(order ([\d.]+)\): row (\d), column (\d) becomes (\d) \(confidence ([\d.]+), (right|WRONG)\)"
    steps = re.findall(line, done.out)
    assert [int(step[0]) for step in steps] == list(range(1, blanks + 1))
    cells = {(int(row) - 1) * 6 + int(column) - 1: int(digit) - 1 for _, _, row, column, digit, *_ in steps}
    assert set(cells) == set((instance.tokens[3] == 6).nonzero().flatten().tolist()), "each blank once"
    right = sum(cells[i] == int(instance.answers[3, i]) for i in cells)
    assert (done.out.count(", right"), done.out.count("WRONG")) == (right, blanks - right)
    assert tasks.get("sudoku6").draw(instance.answers[3]).splitlines()[0].strip() in done.out or right < blanks
    with Image.open(gif) as image:
        assert image.format == "GIF"
        assert image.n_frames > blanks


def test_show_with_a_learned_order(unmask, order: Path) -> None:
    done = unmask("show", *TINY, "--order", order, "--delay", "0")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"step 1 \(order [\d.]+\): row ", done.out)


MOVE = re.compile(r"row (\d), column (\d) (?:becomes (\d) \(confidence ([\d.]+), (?:right|WRONG)\)|is masked again)")
Move = tuple[int, int | None, float]
"""A cell, the digit that it becomes (None: masked again), and the confidence."""


def moves_of(out: str) -> list[list[Move]]:
    """What ``unmask show`` printed, step by step; the steps are numbered from 1."""
    words = re.sub(r"\s+", " ", out)
    steps = re.split(r"step (\d+) \(order [\d.]+\): ", words)[1:]
    assert [int(number) for number in steps[::2]] == list(range(1, len(steps) // 2 + 1))
    return [
        [
            (6 * int(row) + int(column) - 7, int(digit) - 1 if digit else None, float(confidence or 0))
            for row, column, digit, confidence in MOVE.findall(step)
        ]
        for step in steps[1::2]
    ]


def check_shown(out: str, index: int, process: Unmasking, policy: Policy, generator: torch.Generator | None) -> Rollout:
    """The moves are those of a rollout, each board with its confidences, and the last board is drawn."""
    task = process.task
    one = task.heldout(index + 1)[index:]
    played = process.rollout(policy, one, generator, record=True)
    boards = [*(step.observation.tokens[0] for step in played.steps), played.tokens[0]]
    moves = moves_of(out)
    assert len(moves) == int(played.nfe[0])
    for step, before, after in zip(moves, boards, boards[1:], strict=False):
        changed = (before != after).nonzero().flatten().tolist()
        assert [cell for cell, _, _ in step] == changed
        probability = process.denoiser(before.unsqueeze(0)).log_probs[0].exp()
        for cell, symbol, confidence in step:
            assert int(after[cell]) == (task.mask_id if symbol is None else symbol)
            if symbol is not None:
                assert confidence == pytest.approx(float(probability[cell, symbol]), abs=6e-4)
    assert task.draw(boards[-1]).strip() in "\n".join(line.rstrip() for line in out.splitlines())
    return played


@pytest.mark.parametrize("threshold", [None, 0.05, 0.9])
def test_show_plays_sets(unmask, threshold: float | None) -> None:
    order = SETS if threshold is None else f"{SETS}:threshold={threshold}"
    done = unmask("show", *TINY, "--order", order, "--index", 3, "--delay", 0)
    assert (done.code, done.err) == (0, "")
    process = Unmasking(SUDOKU6, load_denoiser("sudoku6-tiny", SUDOKU6), Rules("set"))
    policy = load_policy("sudoku6-tiny-sets-rewards", SUDOKU6, process.denoiser)
    played = check_shown(done.out, 3, process, policy if threshold is None else policy.at(threshold), None)
    blanks = int((SUDOKU6.heldout(4).tokens[3] == 6).sum())
    assert sum(len(step) for step in moves_of(done.out)) == blanks, "each blank once"
    assert int(played.nfe[0]) < blanks / 2, "several at a time"


def test_a_higher_threshold_fills_fewer_at_a_time(unmask) -> None:
    """On the same board, so at the first step."""
    outs = [
        unmask("show", *TINY, "--order", f"{SETS}:threshold={threshold}", "--delay", 0).out
        for threshold in (0.05, 0.5, 0.99)
    ]
    low, middle, high = ({cell for cell, _, _ in moves_of(out)[0]} for out in outs)
    assert high < middle < low


def test_show_masks_again(unmask) -> None:
    done = unmask("show", *TINY, "--order", "remdm:steps=16,eta=0.2", "--index", 1, "--delay", 0, "--seed", 4)
    assert (done.code, done.err) == (0, "")
    process = Unmasking(SUDOKU6, load_denoiser("sudoku6-tiny", SUDOKU6), Rules("set+remask"))
    generator = torch.Generator().manual_seed(4)
    played = check_shown(done.out, 1, process, reference("remdm:steps=16,eta=0.2"), generator)
    again = [cell for step in moves_of(done.out) for cell, symbol, _ in step if symbol is None]
    assert len(again) == int(played.state.remask_count.sum()) > 0
    assert done.out.count("masked") == len(again)


def test_show_draws_symbols(unmask) -> None:
    """Of a policy that takes its mode: the filling alone is drawn, and the seed decides it."""
    one, same, other, greedy = (
        unmask("show", *TINY, "--order", "sudoku6-tiny-rewards", "--delay", 0, *options)
        for options in (
            ("--temperature", 3, "--seed", 1), ("--temperature", 3, "--seed", 1), ("--temperature", 3, "--seed", 2), (),
        )
    )  # fmt: skip
    assert [done.code for done in (one, same, other, greedy)] == [0] * 4
    assert one.out == same.out
    assert len({one.out, other.out, greedy.out}) == 3


# ---------------------------------------------------------------------- runs, killed and resumed
def commands(weak: Path) -> dict[str, list[object]]:
    shared = ["--save-every", "1", "--threads", "1"]
    logged = ["--log-every", "1", *shared]
    board = ["--env", "Unmask/Sudoku4x4-v0", "--denoiser", weak, "--layers", "1"]
    return {
        "upo": [
            "train", "upo", "--imitation", "3", "--iterations", "25", "--puzzles", "3", "--group", "3",
            "--minibatches", "2", *board, *shared,
        ],
        "imitation": ["train", "imitation", "--puzzles", "30", "--steps", "60", "--batch", "8", *board, *logged],
        "mdm": [
            "pretrain", "mdm", "--task", "sudoku4", "--steps", "80", "--batch", "8", "--dim", "16", "--layers", "1",
            "--heads", "2", *logged,
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def killed(weak: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Per command a folder whose run was killed with SIGKILL once it had saved a state."""
    root = tmp_path_factory.mktemp("killed")
    running = {name: start(*command, "--out", root / name) for name, command in commands(weak).items()}
    deadline = time.monotonic() + 120
    try:
        alive = dict(running)
        while alive:
            assert time.monotonic() < deadline, f"no state from {list(alive)}"
            for name, process in list(alive.items()):
                assert process.poll() is None, process.communicate()
                state = root / name / "state.safetensors"
                if state.exists() and load_state(state)["step"] >= 1:
                    process.send_signal(signal.SIGKILL)
                    del alive[name]
            time.sleep(0.005)
    finally:
        for process in running.values():
            process.kill()
            process.communicate()
    assert all(process.returncode == -signal.SIGKILL for process in running.values())
    return {name: root / name for name in running}


@pytest.mark.trains
@pytest.mark.parametrize("name", ["upo", "imitation", "mdm"])
def test_a_killed_run_resumes_to_the_same_weights(unmask, killed, weak: Path, tmp_path: Path, name: str) -> None:
    """As an uninterrupted run, to the byte."""
    command, out = commands(weak)[name], killed[name]
    lengths = ("--iterations", "--steps", "--imitation")
    total = sum(int(command[i + 1]) for i, word in enumerate(command) if word in lengths)
    assert (out / "model.safetensors").exists(), "a killed run leaves its model"
    assert 1 <= load_state(out / "state.safetensors")["step"] < total, "it was killed on the way"
    again = unmask(*command, "--out", out)
    check_mistake(again, "already holds a run; add --resume auto")

    resumed = unmask(*command, "--out", out, "--resume", "auto")
    assert (resumed.code, resumed.err) == (0, "")
    whole = unmask(*command, "--out", tmp_path / "whole")
    assert (whole.code, whole.err) == (0, "")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (out / "config.json").read_bytes() == (tmp_path / "whole" / "config.json").read_bytes()
    assert load_state(out / "state.safetensors")["step"] == total
    leftovers = [p.name for p in out.iterdir() if p.name.startswith(".")]
    assert leftovers == []

    other = unmask(*command, "--out", out, "--resume", "auto", "--seed", "5")
    check_mistake(other, "with other settings: seed was 0, is 5")
    state = out / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-50])
    check_mistake(unmask(*command, "--out", out, "--resume", "auto"), "truncated or not a training state")


@pytest.mark.trains
def test_what_was_trained_can_be_evaluated(unmask, weak: Path, tmp_path: Path) -> None:
    """Imitation, then UPO from it, then the table: by the commands alone."""
    shared = ["--env", "Unmask/Sudoku4x4-v0", "--denoiser", weak, "--layers", "1", "--threads", "1"]
    first, second, rows = tmp_path / "imitation", tmp_path / "upo", tmp_path / "rows.json"
    few = ["--puzzles", "20", "--steps", "5", "--batch", "8"]
    assert unmask("train", "imitation", "--out", first, *few, *shared).code == 0
    few = ["--puzzles", "4", "--group", "2", "--iterations", "2", "--minibatches", "1"]
    assert unmask("train", "upo", "--out", second, "--init", first, *few, *shared).code == 0
    done = unmask(
        "evaluate", "--task", "sudoku4", "--denoiser", weak, "--orders", first, second, "--limit", "5", "--json", rows
    )
    assert (done.code, done.err) == (0, "")
    assert [row["order"] for row in json.loads(rows.read_text())] == [str(first), str(second)]
    before, after = (load_policy(folder).state_dict() for folder in (first, second))
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert isinstance(load_denoiser(str(weak), tasks.get("sudoku4")).model, Backbone)


@pytest.mark.trains
@pytest.mark.parametrize("name", ["ppo-sb3", "ppo-torchrl", "grpo-torchrl"])
def test_learners_of_the_libraries(unmask, weak: Path, tmp_path: Path, name: str) -> None:
    """A run on real 4x4 boards, refused a second time, then resumed to no effect, then evaluated."""
    out, rows = tmp_path / "run", tmp_path / "rows.json"
    sizes = ["--puzzles", "2", "--group", "2"] if name == "grpo-torchrl" else ["--num-envs", "4"]
    command = [
        "train", name, "--env", "Unmask/Sudoku4x4-v0", "--denoiser", weak, "--no-copy", "--dim", "8", "--heads", "2",
        "--layers", "1", "--iterations", "2", "--minibatches", "2", "--threads", "1", "--beta", "0.01", *sizes,
        "--out", out,
    ]  # fmt: skip
    done = unmask(*command)
    assert (done.code, done.err) == (0, "")
    settings = json.loads((out / "run.json").read_text())
    assert (settings["iterations"], settings["beta"], settings["policy"]["dim"]) == (2, 0.01, 8)
    assert list((out / "tb").glob("events*"))
    assert load_state(out / "state.safetensors")["step"] == 2
    before = (out / "model.safetensors").read_bytes()
    check_mistake(unmask(*command), "already holds a run; add --resume auto")
    check_mistake(unmask(*command, "--resume", "auto", "--beta", "0.5"), "with other settings: beta was 0.01, is 0.5")
    assert unmask(*command, "--resume", "auto").code == 0
    assert (out / "model.safetensors").read_bytes() == before
    done = unmask("evaluate", "--task", "sudoku4", "--denoiser", weak, "--orders", out, "--limit", "4", "--json", rows)
    assert (done.code, done.err) == (0, "")
    assert [row["order"] for row in json.loads(rows.read_text())] == [str(out)]


@pytest.mark.trains
@pytest.mark.parametrize("name", ["ppo-sb3", "ppo-torchrl", "grpo-torchrl"])
def test_learners_of_the_libraries_read_hidden_states(unmask, weak: Path, tmp_path: Path, name: str) -> None:
    sizes = ["--puzzles", "2", "--group", "2"] if name == "grpo-torchrl" else ["--num-envs", "4"]
    done = unmask(
        "train", name, "--env", "Unmask/Sudoku4x4-v0", "--denoiser", weak, "--no-copy", "--dim", "8", "--heads", "2",
        "--layers", "1", "--iterations", "2", "--minibatches", "2", "--threads", "1", *sizes, "--read-hidden",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert load_policy(tmp_path / "run").reads_hidden


@pytest.mark.trains
@pytest.mark.parametrize("name", [name.partition(" ")[2] for name in COMMANDS if name.startswith("train ")])
def test_every_learner_logs_a_line_per_interval(unmask, tmp_path: Path, name: str) -> None:
    """Off a terminal, where there is no bar."""
    lengths = {"policy-iteration": ("--iterations", 1, "--steps", 2), "imitation": ("--steps", 2)}
    length = [*lengths.get(name, ("--iterations", 2)), *(["--imitation", 0] if name == "upo" else [])]
    sizes = ["--num-envs", 4] if name.startswith("ppo") else ["--puzzles", 40]
    sizes += ["--log-every", 1] if name in lengths else ["--minibatches", 1]
    if "torchrl" in name:
        sizes += ["--steps", 36]
    done = unmask(
        "train", name, "--env", "sudoku6", *TINY[2:], "--no-copy", "--dim", 8, "--heads", 2, "--layers", 1,
        "--threads", 1, "--validation-puzzles", 4, *length, *sizes, "--out", tmp_path / "run",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    title = re.escape(f"{name.replace('policy-iteration', 'policy iteration')} sudoku6")
    assert re.findall(rf"^{title} (\d)/2 (?!iteration 1: playing|collecting)", done.out, re.MULTILINE) == ["1", "2"]
    assert len(re.findall(rf"^{title} 1/2 (iteration 1: playing|collecting states)$", done.out, re.M)) == (
        name in lengths
    )
    assert "━" not in done.out


def test_task_and_env_mean_the_same_and_an_environment_has_a_denoiser(unmask, tmp_path: Path) -> None:
    def numbers(*args: object) -> list[list[str]]:
        done = unmask("evaluate", *args, "--orders", "margin", "--limit", "5")
        assert done.code == 0, done.err
        return [line.split()[:-1] for line in done.out.splitlines() if "margin" in line]  # without seconds

    whole = numbers("--task", "sudoku4", "--denoiser", "sudoku4")
    assert whole == numbers("--env", "Unmask/Sudoku4x4-v0") == numbers("--task=Unmask/Sudoku4x4-v0")
    learn = ["--denoiser", "sudoku6-tiny", "--puzzles", "4", "--steps", "1", "--iterations", "1", "--layers", "1"]
    done = unmask("train", "--task", "sudoku6:blanks=8", *learn, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["env"] == "sudoku6:blanks=8"


@pytest.mark.parametrize("name", ["[red]x", "[/red]", "a,b=c", "ünï"])
def test_folders_of_any_name(unmask, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are printed as they are, whatever the terminal can show, and never taken for marks of a style."""
    monkeypatch.setenv("COLUMNS", "300")
    folder = tmp_path / name
    shutil.copytree(PACKAGED_DENOISERS / "sudoku4", folder)
    shutil.copytree(PACKAGED_POLICIES / "sudoku6-tiny-rewards", tmp_path / f"{name} order")
    shown = unmask("evaluate", "--task", "sudoku4", "--denoiser", folder, "--orders", "margin", "--limit", "3")
    assert shown.code == 0, shown.err
    assert f"{name}, 3 instances" in shown.out
    order = ["--orders", "margin", tmp_path / f"{name} order", "--limit", "2"]
    shown = unmask("evaluate", "--task", "sudoku6", "--denoiser", "sudoku6-tiny", *order)
    assert shown.code == 0, shown.err
    assert f"{name} order" in shown.out.replace("\n", "")
    shown = unmask("likelihood", "--task", "sudoku4", "--denoiser", folder, "--limit", "2")
    assert shown.code == 0, shown.err


def test_quotes_hold_names_with_commas(tmp_path: Path) -> None:
    path = tmp_path / "a,b=c.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 60)
    assert tasks.get(f'text:"{path}",length=16').length == 16
    assert tasks.get(f'text:source="{path}",length=16').length == 16
    with pytest.raises(UnmaskError, match="quote names with commas"):
        tasks.get("text:a.txt,b.txt")


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    words = [sys.executable, "-m", "agents.cli", "train", "upo", "--help"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # as head does after its lines
        assert process.stderr.read() == ""
    assert process.returncode == 141
