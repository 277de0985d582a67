"""Boards for people: text, images, and replays side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from tasks import Task, UnmaskError
from tasks.files import write_atomically
from unmask_env.state import State

MODES = ["ansi", "rgb_array"]
CELL = 40
INK, GRID, FRAME, PAPER = (20, 24, 32), (190, 196, 206), (60, 66, 78), (255, 255, 255)
CLUE, FILLED, LAST, WRONG = (232, 235, 240), (224, 240, 226), (255, 224, 138), (246, 178, 178)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def image(
    task: Task,
    tokens: torch.Tensor,
    clues: torch.Tensor,
    answers: torch.Tensor | None = None,
    last: Sequence[int] = (),
    caption: str = "",
) -> np.ndarray:
    """One board as (H, W, 3) uint8.

    Args:
        tokens: (L,) the board. clues: (L,) bool, given from the start. answers: (L,), to mark wrong cells in red.
        last: the positions filled last, marked yellow. caption: a line under the board.
    """
    rows, columns = task.shape
    cell = CELL if max(rows, columns) <= 12 else 24
    height, width = task.box or (rows, columns)
    picture = Image.new("RGB", (columns * cell + 5, rows * cell + 5 + (22 if caption else 0)), PAPER)
    draw = ImageDraw.Draw(picture)
    for position, token in enumerate(tokens.tolist()):
        r, c = divmod(position, columns)
        x, y = 2 + c * cell, 2 + r * cell
        colour = PAPER
        if bool(clues[position]):
            colour = CLUE
        elif token != task.mask_id:
            wrong = answers is not None and token != int(answers[position])
            colour = WRONG if wrong else LAST if position in last else FILLED
        draw.rectangle((x, y, x + cell, y + cell), fill=colour, outline=GRID)
        if token != task.mask_id:
            draw.text((x + cell / 2, y + cell / 2), task.symbol(token), INK, _font(cell // 2), anchor="mm")
    for r in range(0, rows + 1, height):
        draw.line((2, 2 + r * cell, 2 + columns * cell, 2 + r * cell), FRAME, 3)
    for c in range(0, columns + 1, width):
        draw.line((2 + c * cell, 2, 2 + c * cell, 2 + rows * cell), FRAME, 3)
    if caption:
        draw.text((columns * cell / 2, rows * cell + 15), caption, INK, _font(13), anchor="mm")
    return np.asarray(picture)


def checked_mode(mode: str | None) -> str | None:
    """``mode``. Raises :class:`tasks.UnmaskError` if it is neither None nor one of :data:`MODES`."""
    if mode is not None and mode not in MODES:
        raise UnmaskError(f"render_mode must be one of {MODES}, not {mode!r}")
    return mode


def board(task: Task, state: State, row: int, mode: str) -> str | np.ndarray:
    """Row ``row`` of ``state`` as text (``ansi``) or image (``rgb_array``)."""
    if mode == "ansi":
        return task.draw(state.tokens[row])
    clues = state.instances.tokens[row] != task.mask_id
    return image(task, state.tokens[row].cpu(), clues.cpu())


def replay(
    task: Task,
    clues: torch.Tensor,
    answers: torch.Tensor,
    trajectories: dict[str, Sequence[torch.Tensor]],
    path: Path,
    fps: int = 4,
) -> None:
    """A GIF of one instance filled in several orders side by side; wrong cells turn red.

    Args:
        clues: (L,) bool. trajectories: per order its boards (L,), first to last.
    """
    steps = max(len(boards) for boards in trajectories.values())
    frames = []
    for k in range(steps):
        panels = []
        for name, boards in trajectories.items():
            now, before = boards[min(k, len(boards) - 1)], boards[max(0, min(k, len(boards) - 1) - 1)]
            last = (now != before).nonzero().flatten().tolist() if k < len(boards) else []
            wrong = int(((now != answers) & (now != task.mask_id)).sum())
            panels.append(image(task, now, clues, answers, last, f"{name}: {wrong} wrong"))
            panels.append(np.full((panels[-1].shape[0], 12, 3), 255, np.uint8))
        frames.append(Image.fromarray(np.concatenate(panels[:-1], 1)))
    frames += [frames[-1]] * (2 * fps)
    options = {"save_all": True, "append_images": frames[1:], "duration": 1000 // fps, "loop": 0}
    write_atomically(path, lambda temporary: frames[0].save(temporary, "GIF", **options))
