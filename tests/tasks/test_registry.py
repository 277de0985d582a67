"""Arguments of tasks that do not fit: a table generated from what the constructors' annotations allow."""

from __future__ import annotations

import inspect
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest

import tasks
from agents import cli
from tasks import UnmaskError
from tasks.registry import read_options
from tasks.settings import AtLeast1, Range, Share, alternatives, checked

TASKS = [tasks.Countdown, tasks.Lines, tasks.MathWord, tasks.Sudoku, tasks.Tabular, tasks.Text]
NEEDED = {tasks.Lines: {"source": ["a"] * 3, "tokenizer": None}, tasks.Sudoku: {"box_height": 2, "box_width": 3}}


def outside(kind: Any) -> list[Any]:
    """Values that an annotation does not allow: just outside its range, of another type, or of no name."""
    (option, *_) = alternatives(kind)
    if get_origin(option) is Literal:
        return ["neither"]
    base, *extras = get_args(option) if get_origin(option) is Annotated else (option,)
    if base is bool:
        return [1, "true"]
    if base not in (int, float):
        return []
    values = ["1", True, math.nan, math.inf, *([1.5] if base is int else [])]
    for bounds in extras:
        step = 1 if base is int else 1e-9
        values += [bounds.least - step, bounds.most + step, bounds.above, bounds.below]
    return [value for value in values if value != -math.inf]


CASES = [
    pytest.param(task, name, value, id=f"{task.__name__}-{name}-{value!r}")
    for task in TASKS
    for name, kind in get_type_hints(task.__init__, include_extras=True).items()
    if name != "return"
    for value in outside(kind)
]


def test_the_table_is_large() -> None:
    assert len(CASES) > 80
    assert {case.values[0] for case in CASES} == set(TASKS)


@pytest.mark.parametrize(("task", "name", "value"), CASES)
def test_arguments_that_do_not_fit(task: type, name: str, value: Any) -> None:
    with pytest.raises(UnmaskError, match=f"^{name} must be .*, not ") as caught:
        task(**NEEDED.get(task, {}) | {name: value})
    assert "\n" not in str(caught.value)


def test_checked_functions_keep_their_signature_and_check_what_is_given_by_place_or_by_name() -> None:
    @checked
    def area(height: AtLeast1, width: AtLeast1 = 2, *, share: Share | None = None) -> float:
        return height * width * (share or 1)

    assert list(inspect.signature(area).parameters) == ["height", "width", "share"]
    assert (area(3), area(3, 4), area(height=3, share=0.5)) == (6, 12, 3)
    for call in (lambda: area(0), lambda: area(1, width=0), lambda: area(1, 1, share=2.0)):
        with pytest.raises(UnmaskError, match=r"must be a .*number"):
            call()
    with pytest.raises(TypeError):
        area()


def test_options_are_read_as_their_annotations_say() -> None:
    def factory(
        source: str = "", size: Annotated[int, Range(1, 9)] = 1, share: Share | None = None, count: Literal[3, 4] = 3
    ) -> None: ...

    read = read_options("it", "a,size=12,share=0.5,count=4", factory)
    assert read == {"source": "a", "size": 12, "share": 0.5, "count": 4}, "ranges are for the factory to check"
    assert type(read["count"]) is int
    with pytest.raises(UnmaskError, match="it: count must be 3 or 4, not '5'"):
        read_options("it", "count=5", factory)
    with pytest.raises(UnmaskError, match="it: share must be a number, not 'x'"):
        read_options("it", "share=x", factory)


OWN = '''
import torch, tasks

class Parity(tasks.Infilling):
    """Bits of which the last is the parity of the others."""

    name, symbols = "parity", ("0", "1")

    def __init__(self, source: str = "", length: int = 6):
        super().__init__((1, length), 0.5)
        self.source = source

    def clean(self, n, generator):
        bits = torch.randint(2, (n, self.length - 1), generator=generator)
        return torch.cat([bits, bits.sum(1, keepdim=True) % 2], 1)

    def heldout_answers(self, n, split):
        return self.clean(n or 20, self.split_generator(split))

NUMBER = 3

def no_task():
    return 3
'''


MORE = """
from __future__ import annotations
import sys

def leaves(): sys.exit(3)
def fails(): return {}["no such"]
def odd(size: Nothing = 3): return size
def listed(sizes: list[int] = ()): return sizes
def bare(size=4, more=None): return size, more
"""


def test_tasks_of_ones_own_by_file_and_by_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_parity.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])  # the folder is added behind what is there
    for name, length, source in (
        (f"{tmp_path}/own_parity.py:Parity", 6, ""),
        ("own_parity.py:Parity,length=8", 8, ""),
        ('own_parity:Parity:"a,b.txt",length=4', 4, "a,b.txt"),
    ):
        task = tasks.get(name)
        assert (task.length, task.source, task.name) == (length, source, name)
        assert tasks.known(name)
    assert tasks.get("own_parity.py:Parity", length=5).length == 5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_wrong.py:Parity,size=3", "takes source, length; not size"),
        ("own_wrong.py:Parity,length=x", "length must be a whole number"),
        ("own_wrong.py:Party", "no class or function Party; its tasks are Parity"),
        ("own_wrong.py:NUMBER", "no class or function NUMBER"),
        ("own_wrong.py:no_task", "made a int; it must make a tasks.Task"),
        ("own_broken.py:Parity", "cannot load own_broken.py: ZeroDivisionError: division by zero"),
        ("own_missing.py:Parity", "there is no file own_missing.py"),
        ("no_such_package.module:Parity", "unknown task 'no_such_package.module'"),
        ("own_broken:Parity", "cannot load own_broken: ZeroDivisionError"),
        ("own_wrong.py:Parity,length=1e3", "length must be a whole number"),
        ("own_wrong.py:int", "no class or function int"),
        ("own_more.py:leaves", "own_more.py:leaves failed: SystemExit: 3"),
        ("own_more.py:fails", "own_more.py:fails failed: KeyError: 'no such'"),
        ("own_more.py:odd,size=3", "cannot be read: name 'Nothing' is not defined"),
        ("own_more.py:listed,sizes=3", "sizes can be given in Python alone"),
        ("own_more.py:bare,size=x", "size must be a whole number, not 'x'"),
        ("own_more.py:bare,size=4,more=2", "made a tuple"),
        ("own_more.py:dict", "no class or function dict"),
        ("own_exits.py:Parity", "cannot load own_exits.py: SystemExit: bye"),
        ("own_exits:Parity", "cannot load own_exits: SystemExit: bye"),
        ("own_latin.py:Parity", "cannot load own_latin.py: SyntaxError"),
        ("own_null.py:Parity", "cannot load own_null.py: "),
        ("own_folder.py:Parity", "there is no file own_folder.py"),
        ("__main__:Parity", "made" if hasattr(sys.modules["__main__"], "Parity") else "__main__"),
        ("os:getcwd", "made a str"),
        ("os.path:nothing", "has no class or function nothing"),
    ],
)
def test_tasks_of_ones_own_that_cannot_be_made(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_wrong.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("1 / 0")
    (tmp_path / "own_more.py").write_text(MORE)
    (tmp_path / "own_exits.py").write_text("import sys; sys.exit('bye')")
    (tmp_path / "own_latin.py").write_bytes(b"# \xe9\nname = '\xe9'")
    (tmp_path / "own_null.py").write_bytes(b"a = 1\0")
    (tmp_path / "own_folder.py").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    with pytest.raises(UnmaskError) as caught:
        tasks.get(name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


LATE = """
import torch
from tasks import Instances
from tasks.sudoku import Sudoku


class Raises(Sudoku):
    def __init__(self):
        super().__init__(2, 2)

    def reward(self, tokens, instances):
        raise KeyError("a\\nb")


class Odd(Raises):
    def heldout(self, *args, **more):
        return Instances(torch.zeros(2, 16), torch.zeros(2, 16))


class Nameless(Raises):
    def __init__(self):
        super().__init__()
        self.symbols = 4
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Raises", "late.py, line 12: KeyError: 'a"),
        ("Odd", "what task late.py:Odd draws must hold int64 tokens from 0 to 4"),
        ("Nameless", "needs symbols, a tuple of strings, one at least"),
    ],
)
def test_what_a_task_of_ones_own_gets_wrong_later_is_one_line(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "late.py").write_text(LATE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tasks.registry._OWN", set())
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["evaluate", "--task", f"late.py:{name}", "--denoiser", "sudoku4", "--orders", "margin", "--limit", "2"]
        )
    told = capsys.readouterr().err
    assert stop.value.code == 2
    assert said in told
    assert told.count("\n") == 1
