"""What a task says without being told."""

import pytest
import torch
from torch import Tensor

from tasks import Instances, Task


class Shaped(Task):
    name, symbols = "shaped", ("a", "b")

    def __init__(self, shape: tuple[int, int], box: tuple[int, int] | None = None) -> None:
        self.shape, self.box = shape, box

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        raise NotImplementedError

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("shape", "box", "expected"),
    [
        ((1, 3), None, [[0], [1], [2]]),
        ((2, 3), None, [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]),
        ((3, 1), None, [[0, 0], [1, 0], [2, 0]]),
        ((2, 4), (1, 2), [[0, 0, 0], [0, 1, 0], [0, 2, 1], [0, 3, 1], [1, 0, 2], [1, 1, 2], [1, 2, 3], [1, 3, 3]]),
    ],
)
def test_positions_stand_on_the_line_or_board_that_is_drawn(shape, box, expected) -> None:
    assert Shaped(shape, box).coordinates.tolist() == expected
