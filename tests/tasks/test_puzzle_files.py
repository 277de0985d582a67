"""A user's own puzzles: what is read, and that everything else is refused with the file's name and the line."""

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
        ("Quiz,Solution\n" + GOOD, 1, "the header must be 'Puzzle,Solution' or 'Puzzle'"),
        (GOOD, 1, "the header must be"),
        ("Puzzle;Solution\n" + GOOD, 1, "the header must be"),
        ("Solution,Puzzle\n" + GOOD, 1, "the header must be"),
        ("\nPuzzle\n" + PUZZLE, 1, "the header must be"),
        ("", 1, "the header must be"),
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
        (f"Puzzle\n{GOOD}", 2, "2 columns; the header has 1"),
        (f"Puzzle,Solution\n{GOOD},easy", 2, "3 columns; the header has 2"),
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
        (b"Puzzle\n", "no puzzle after the header"),
        (b"Puzzle,Solution\n\n , \n", "no puzzle after the header"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\xff\xd8", "cannot be read as a text file"),
        ("Puzzle\n".encode("utf-16"), "cannot be read as a text file"),
    ],
    ids=["header only", "blank lines only", "binary", "utf-16"],
)
def test_a_file_without_usable_lines(tmp_path, content, why):
    path = written(tmp_path, content)
    with pytest.raises(PuzzleFileError) as caught:
        read_csv(path, 2, 2)
    assert str(caught.value).startswith(f"{path}: {why}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(PuzzleFileError, match="cannot be read as a text file"):
            read_csv(path, 2, 2)
