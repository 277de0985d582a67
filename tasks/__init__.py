"""Tasks of unmask: data and truth. See :class:`tasks.Task` for what a task must offer."""

from functools import partial

from tasks.countdown import Countdown
from tasks.errors import IncompatibleDenoiserError, PuzzleFileError, UnknownNameError, UnmaskError
from tasks.free_text import FreeText
from tasks.lines import Lines
from tasks.math_word import MathWord
from tasks.registry import get, known, names, read_options, register
from tasks.sudoku import Sudoku
from tasks.tabular import Tabular
from tasks.task import Infilling, Instances, Task
from tasks.text import Text
from tasks.zebra import Zebra

__all__ = [
    "Countdown",
    "FreeText",
    "IncompatibleDenoiserError",
    "Infilling",
    "Instances",
    "Lines",
    "MathWord",
    "PuzzleFileError",
    "Sudoku",
    "Tabular",
    "Task",
    "Text",
    "UnknownNameError",
    "UnmaskError",
    "Zebra",
    "get",
    "known",
    "names",
    "read_options",
    "register",
]

register("sudoku4", partial(Sudoku, 2, 2))
register("sudoku6", partial(Sudoku, 2, 3))
register("sudoku9", partial(Sudoku, 3, 3))
register("text", Text)
register("lines", Lines)
register("zebra", Zebra)
register("countdown", Countdown)
register("math", MathWord)
register("tabular", Tabular)
