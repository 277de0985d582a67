"""The fewest forwards in which sets can restore an answer, against every sequence of sets."""

import itertools
import math
from functools import cache

import pytest
import torch

import tasks
from tasks import Instances, UnmaskError
from tests.oracles.enumeration import sequences
from tests.toys import RewardTask, WrongDenoiser
from unmask_env.denoiser import load_denoiser
from unmask_env.exact import TooLargeError
from unmask_env.exact_sets import fewest_forwards
from unmask_env.process import Unmasking

INF = math.inf


@pytest.mark.parametrize("seed", range(3))
def test_fewest_forwards_is_the_best_of_all_sequences_of_sets(seed: int) -> None:
    length, vocab = 5, 2
    denoiser, mask = WrongDenoiser(vocab, length, seed), vocab
    process = Unmasking(RewardTask(vocab, length, seed), denoiser)

    @cache
    def best(board: tuple[int, ...], answer: tuple[int, ...]) -> float:
        if mask not in board:
            return 0.0 if board == answer else INF
        top = denoiser(torch.tensor([board])).log_probs.argmax(-1)[0].tolist()
        holes = [i for i, token in enumerate(board) if token == mask]
        found = INF
        for size in range(1, len(holes) + 1):
            for chosen in itertools.combinations(holes, size):
                filled = tuple(top[i] if i in chosen else token for i, token in enumerate(board))
                found = min(found, 1 + best(filled, answer))
        return found

    answers = sequences(vocab, length)
    given = torch.rand(answers.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
    instances = Instances(torch.where(given, answers, mask), answers)
    expected = [best(tuple(b), tuple(a)) for b, a in zip(instances.tokens.tolist(), answers.tolist(), strict=True)]
    assert {1.0, 2.0, INF} <= set(expected), set(expected)
    assert fewest_forwards(process, instances, batch=7).tolist() == expected
    tokens = instances.tokens.clone()
    tokens[:, 0] = 1 - instances.answers[:, 0]
    assert fewest_forwards(process, Instances(tokens, answers)).eq(INF).all()
    assert len(fewest_forwards(process, instances[:0])) == 0


def test_fewest_forwards_asks_for_few_holes_and_one_answer() -> None:
    sudoku = tasks.get("sudoku6")
    with pytest.raises(TooLargeError, match="12 are allowed"):
        fewest_forwards(Unmasking(sudoku, load_denoiser("sudoku6-tiny", sudoku)), sudoku.heldout(2))
    countdown = tasks.get("countdown")
    with pytest.raises(UnmaskError, match="several right answers"):
        fewest_forwards(Unmasking(countdown, WrongDenoiser(2, 2, 0)), countdown.heldout(2))
