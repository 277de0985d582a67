"""Boards for people: the drawn text, the image, the replay."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import tasks
from tests.toys import FavouriteDenoiser
from unmask_env import render
from unmask_env.process import Unmasking
from unmask_env.state import State

TASK = tasks.get("sudoku4")
START = TASK.heldout(1)
DENOISER = FavouriteDenoiser(START.answers, torch.full((1, 16), -0.5), vocab_size=4)
CLUES = START.tokens[0] != TASK.mask_id
HOLES = (~CLUES).nonzero().flatten().tolist()


def begin(task: tasks.Task, instances: tasks.Instances) -> State:
    return Unmasking(task, DENOISER).reset(instances)


def boards(wrong_at: int | None = None) -> list[torch.Tensor]:
    """The first puzzle filled hole by hole with its answers, one of them wrong if asked."""
    out = [START.tokens[0].clone()]
    for position in HOLES:
        board = out[-1].clone()
        board[position] = (START.answers[0, position] + (position == wrong_at)) % 4
        out.append(board)
    return out


def centre(picture: np.ndarray, position: int) -> tuple[int, ...]:
    """The colour just inside a cell's corner, where no symbol is drawn."""
    r, c = divmod(position, 4)
    return tuple(picture[2 + r * render.CELL + 4, 2 + c * render.CELL + 4].tolist())


def test_ansi_is_the_drawn_text() -> None:
    state = begin(TASK, TASK.heldout(2))
    assert render.board(TASK, state, 1, "ansi") == TASK.draw(state.tokens[1])
    tokens = torch.tensor([0, 1, 2, 3, 4, 4, 4, 4, 3, 2, 1, 0, 4, 4, 4, 4])
    drawn = render.board(TASK, begin(TASK, tasks.Instances(tokens[None], START.answers)), 0, "ansi")
    assert drawn == "1 2 | 3 4\n. . | . .\n\n4 3 | 2 1\n. . | . ."


def test_rgb_array_is_a_picture_in_the_right_colours() -> None:
    state = begin(TASK, START)
    picture = render.board(TASK, state, 0, "rgb_array")
    assert isinstance(picture, np.ndarray)
    assert picture.dtype == np.uint8
    assert picture.shape == (4 * render.CELL + 5, 4 * render.CELL + 5, 3)
    for position in range(16):
        assert centre(picture, position) == (render.CLUE if CLUES[position] else render.PAPER)


def test_image_marks_filled_last_and_wrong_cells() -> None:
    final = boards(wrong_at=HOLES[1])[-1]
    picture = render.image(TASK, final, CLUES, START.answers[0], last=[HOLES[2]])
    assert centre(picture, HOLES[0]) == render.FILLED
    assert centre(picture, HOLES[1]) == render.WRONG
    assert centre(picture, HOLES[2]) == render.LAST
    assert render.image(TASK, final, CLUES, caption="margin").shape[0] > picture.shape[0]


def test_the_image_shows_the_symbols() -> None:
    start, full = boards()[0], boards()[-1]
    blank = render.image(TASK, start, CLUES)
    filled = render.image(TASK, full, CLUES)
    r, c = divmod(HOLES[0], 4)
    cell = (slice(6 + r * render.CELL, r * render.CELL + 38), slice(6 + c * render.CELL, c * render.CELL + 38))
    assert (blank[cell] == render.PAPER).all()
    assert (filled[cell].min(axis=(0, 1)) < 100).all()  # ink


@pytest.mark.parametrize("name", ["sudoku6", "sudoku9"])
def test_other_sizes(name: str) -> None:
    task = tasks.get(name)
    state = begin(task, task.heldout(1))
    side = task.shape[0] * render.CELL + 5
    assert render.board(task, state, 0, "rgb_array").shape == (side, side, 3)
    assert len(render.board(task, state, 0, "ansi").splitlines()) == task.shape[0] + task.shape[0] // task.box[0] - 1


def test_replay_has_a_frame_per_board_and_holds_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "replay.gif"
    right, short = boards(), boards(wrong_at=HOLES[0])[:3]
    render.replay(TASK, CLUES, START.answers[0], {"margin": right, "random": short}, path, fps=5)
    durations = []
    with Image.open(path) as gif:
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)])
        for k in range(gif.n_frames):
            gif.seek(k)
            durations.append(gif.info["duration"])
    assert len(frames) == len(right) == len(HOLES) + 1
    side = 4 * render.CELL + 5
    assert frames.shape[1:] == (side + 22, 2 * side + 12, 3)
    assert all((a != b).any() for a, b in itertools.pairwise(frames))
    assert durations[:-1] == [200] * len(HOLES)
    assert durations[-1] == 200 + 2 * 5 * 200  # two seconds more to look at the result
    left, right_panel = frames[-1][:, :side].astype(int), frames[-1][:, side + 12 :].astype(int)

    def near(panel: np.ndarray, colour: tuple[int, ...]) -> bool:  # GIF palettes shift colours a little
        return bool((np.abs(np.array(centre(panel, HOLES[0])) - colour) <= 8).all())

    assert near(left, render.FILLED)
    assert near(right_panel, render.WRONG)
    assert list(path.parent.iterdir()) == [path]  # no temporary file stays
