"""A user's own puzzles: what is read, and that everything else is refused with the file's name and the line."""

import time
from pathlib import Path

import pytest
import torch

import tasks
from tasks import PuzzleFileError
from tasks.sudoku_csv import read_csv
from tasks.sudoku_solver import solve

ANSWER = "1234341221434321"
PUZZLE = "1.3.3..2.14.4..1"
ZEROS = PUZZLE.replace(".", "0")
OTHER = "2143432112343412"  # ANSWER with 1 <-> 2 and 3 <-> 4 exchanged
AMBIGUOUS = "..343412..434321"  # 1 and 2 can swap in the four blanks


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "mine.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def digits(text: str) -> list[int]:
    return [0 if c == "." else int(c) for c in text]


def test_a_file_with_solutions(tmp_path):
    path = written(tmp_path, f"Puzzle,Solution\n{PUZZLE},{ANSWER}\n{'.' * 15}2,{OTHER[:-1]}2\n")
    file = read_csv(path, 2, 2)
    assert file.puzzles.tolist() == [digits(PUZZLE), [0] * 15 + [2]]
    assert file.solutions.tolist() == [digits(ANSWER), digits(OTHER[:-1] + "2")]


@pytest.mark.parametrize(
    "text",
    [
        f"Puzzle\n{PUZZLE}\n{ZEROS}\n",
        f"puzzle\r\n{PUZZLE}\r\n{ZEROS}",
        f"\ufeffPuzzle\n{PUZZLE}\n{ZEROS}\n",
        f"\ufeffPUZZLE , solution\n{PUZZLE},\n\n  {ZEROS} , {ANSWER} \n\n",
        f"Puzzle,Solution\n{PUZZLE}\n,\n{ZEROS},{ANSWER}\n",
        f'"Puzzle","Solution"\n"{PUZZLE}","{ANSWER}"\n"{ZEROS}",""\n',
    ],
    ids=["no solution", "crlf", "bom", "spaces and blank lines", "short lines", "quoted"],
)
def test_ways_to_write_the_same_two_puzzles(tmp_path, text):
    assert solve(digits(PUZZLE), 2, 2, limit=2) == [digits(ANSWER)]
    file = read_csv(written(tmp_path, text), 2, 2)
    assert file.puzzles.tolist() == [digits(PUZZLE)] * 2
    assert file.solutions.tolist() == [digits(ANSWER)] * 2


def test_a_puzzle_with_several_solutions_keeps_one_and_counts_any_as_solved(tmp_path):
    instances = tasks.get("sudoku4").from_csv(written(tmp_path, f"Puzzle\n{AMBIGUOUS}\n"))
    both = solve(digits(AMBIGUOUS), 2, 2, limit=9)
    assert len(both) == 2
    assert (instances.answers[0] + 1).tolist() in both
    for filling in both:
        assert tasks.get("sudoku4").metrics(torch.tensor([filling]) - 1, instances)["solved"].tolist() == [1.0]


def test_from_csv_encodes_blanks_as_the_mask(tmp_path):
    task = tasks.get("sudoku4")
    instances = task.from_csv(written(tmp_path, f"Puzzle,Solution\n{PUZZLE},{ANSWER}\n"))
    assert instances.tokens.tolist() == [[4 if c == "." else int(c) - 1 for c in PUZZLE]]
    assert instances.answers.tolist() == [[int(c) - 1 for c in ANSWER]]
    assert instances.tokens.dtype == instances.answers.dtype == torch.int64


@pytest.mark.parametrize("name", ["sudoku4", "sudoku6", "sudoku9"])
def test_packaged_puzzles_written_as_csv_come_back(tmp_path, name):
    task = tasks.get(name)
    held = task.heldout(20)

    def text(row: torch.Tensor) -> str:
        return "".join(task.symbol(int(token)) for token in row)

    lines = [f"{text(p)},{text(a)}" for p, a in zip(held.tokens, held.answers, strict=True)]
    with_answers = task.from_csv(written(tmp_path, "\n".join(["Puzzle,Solution", *lines])))
    assert torch.equal(with_answers.tokens, held.tokens)
    assert torch.equal(with_answers.answers, held.answers)
    solved = task.from_csv(written(tmp_path, "\n".join(["Puzzle", *(line.split(",")[0] for line in lines)])))
    assert torch.equal(solved.answers, held.answers)


GOOD = f"{PUZZLE},{ANSWER}"


@pytest.mark.parametrize(
    ("body", "line", "why"),
    [
        ("Board,Solution\n" + GOOD, 1, "the header must name a column 'puzzle' and may name one 'solution'"),
        ("Puzzle;Solution\n" + GOOD, 1, "not 'Puzzle;Solution'"),
        ("puzzle,quizzes\n" + GOOD, 1, "the header must name"),
        (GOOD[:-20] + "\n", 1, "the header must name"),
        (f"Puzzle,Solution\n{GOOD}\n{PUZZLE[:-1]},{ANSWER}", 3, "the puzzle has 15 characters; a 4x4 board has 16"),
        (f"Puzzle,Solution\n{GOOD}\n\n\n{PUZZLE}.,{ANSWER}", 5, "the puzzle has 17 characters"),
        (f"Puzzle,Solution\n{GOOD}\n{PUZZLE},{ANSWER}1", 3, "the solution has 17 characters"),
        (f"Puzzle,Solution\n{GOOD}\n,{ANSWER}", 3, "the puzzle has 0 characters"),
        (f"Puzzle\n{PUZZLE}\n5{PUZZLE[1:]}", 3, "the puzzle has '5'; allowed are 1-4, and 0 or '.' for a blank"),
        (f"Puzzle\n{PUZZLE[:-1]}x", 2, "the puzzle has 'x'"),
        (f"Puzzle\n{PUZZLE[:-1]}²", 2, "the puzzle has '²'"),
        (f"Puzzle,Solution\n{PUZZLE},{ANSWER[:-1]}9", 2, "the solution has '9'"),
        ("Puzzle\n2...........2..2", 2, "illegal clue: digit 2 twice in row 4"),
        ("Puzzle\n.1...........1..", 2, "illegal clue: digit 1 twice in column 2"),
        (f"Puzzle\n{PUZZLE}\n..........3....3", 3, "illegal clue: digit 3 twice in box 4"),
        (f"Puzzle,Solution\n{PUZZLE},{OTHER}", 2, "the solution contradicts a clue"),
        (f"Puzzle,Solution\n{PUZZLE},{'1' * 16}", 2, "the solution is not a complete legal board"),
        (f"Puzzle,Solution\n{PUZZLE},.{ANSWER[1:]}", 2, "the solution is not a complete legal board"),
        (f"Puzzle,Solution\n{GOOD}\n{ANSWER},{ANSWER}", 3, "the puzzle has no blank"),
        (f"Puzzle\n{ANSWER}", 2, "the puzzle has no blank"),
        (f"Puzzle\n{GOOD}", 2, "2 columns; the first line has 1"),
        (f"Puzzle,Solution\n{GOOD},easy", 2, "3 columns; the first line has 2"),
        ("Puzzle\n12.....3........", 2, "the puzzle has no solution"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, body, line, why):
    path = written(tmp_path, body)
    with pytest.raises(PuzzleFileError) as caught:
        read_csv(path, 2, 2)
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}: ")
    assert why in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "{path}: it holds no puzzle"),
        (b"Puzzle\n", "{path}: it holds no puzzle"),
        (b"Puzzle,Solution\n\n , \n", "{path}: it holds no puzzle"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\xff\xd8", "cannot read {path} as UTF-8 text"),
        ("Puzzle\n".encode("utf-16"), "cannot read {path} as UTF-8 text"),
        (b"Puzzle\n" + b"1" * 2_000_000, "{path}, line 2 has more than 1,048,576 characters"),
    ],
    ids=["empty", "header only", "blank lines only", "binary", "utf-16", "long"],
)
def test_a_file_without_usable_lines(tmp_path, content, why):
    path = written(tmp_path, content)
    with pytest.raises(PuzzleFileError) as caught:
        read_csv(path, 2, 2)
    assert str(caught.value).startswith(why.format(path=path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path):
    for path, message in (
        (tmp_path / "none.csv", r"cannot read .* as UTF-8 text"),
        (tmp_path, "is no regular file"),
        (Path("/dev/zero"), "is no regular file"),
        (Path("/proc/kmsg"), r"it holds no puzzle|cannot read .* as UTF-8 text"),  # read, it waits for ever
    ):
        with pytest.raises(PuzzleFileError, match=message):
            read_csv(path, 2, 2)


@pytest.mark.parametrize(
    "header", ["quizzes,solutions", "id,puzzle,solution,clues", "source,question,answer,rating", "Solution,Puzzle", ""]
)
def test_customary_forms_of_puzzle_files(tmp_path, header):
    places = {"puzzle": PUZZLE, "quizzes": PUZZLE, "question": PUZZLE}
    places |= {"solution": ANSWER, "solutions": ANSWER, "answer": ANSWER}
    row = ",".join(places.get(name.lower(), "7") for name in header.split(",")) if header else GOOD
    file = read_csv(written(tmp_path, f"{header}\n{row}\n{row}\n"), 2, 2)
    assert file.puzzles.tolist() == [digits(PUZZLE)] * 2
    assert file.solutions.tolist() == [digits(ANSWER)] * 2


def test_a_limit_reads_no_further(tmp_path):
    """Not even a line that could not be read."""
    path = written(tmp_path, f"Puzzle,Solution\n{GOOD}\n{GOOD}\nwrong\n".encode() + b"wrong\n" * 10**5 + b"\xff")
    assert len(read_csv(path, 2, 2, limit=2).puzzles) == 2
    assert len(tasks.get("sudoku4").select(1, path)) == 1


def test_lines_end_where_files_say(tmp_path):
    for end in ("\n", "\r\n", "\r"):
        assert len(read_csv(written(tmp_path, f"Puzzle{end}{PUZZLE}{end}{PUZZLE}"), 2, 2).puzzles) == 2


def test_a_puzzle_that_takes_too_long_is_named(tmp_path):
    """16 clues, which no 9x9 board of one solution has: it is solved, or refused, in seconds."""
    wide = "000000010400000000020000000000050407008000300001090000300400200050100000000806000"
    hard = "8" + "0" * 80
    started = time.perf_counter()
    assert len(read_csv(written(tmp_path, f"{wide}\n{hard}\n"), 3, 3).puzzles) == 2
    impossible = "000005080000601043000000000010500000000106000300000005530000061000000004000000000"
    with pytest.raises(
        PuzzleFileError, match=r"line 1: (its solution takes too long to find|the puzzle has no solution)"
    ):
        read_csv(written(tmp_path, f"{impossible}\n"), 3, 3)
    assert time.perf_counter() - started < 20
