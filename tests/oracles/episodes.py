"""What whole episodes give: exactly, by enumeration, and measured; and what they cost.

Nothing here calls the code under test except the order and the denoiser that a caller hands in.
"""

from __future__ import annotations

import numpy as np
import torch

from tests.oracles.enumeration import TableTask, sequences
from tests.toys import observation as observation_of
from unmask_env.state import Denoised


class Counting:
    """A denoiser that also notes how many boards each forward had."""

    def __init__(self, inner) -> None:
        self.inner, self.hidden_dim, self.device, self.rows = inner, inner.hidden_dim, inner.device, []

    @property
    def calls(self) -> int:
        return len(self.rows)

    def __call__(self, tokens: torch.Tensor) -> Denoised:
        self.rows.append(len(tokens))
        return self.inner(tokens)


def exact_return(task: TableTask, denoiser, policy, reference, temperature: float) -> tuple[float, float]:
    """(E[r], KL(pi || g)) of whole episodes, by a dynamic programme over all partial boards.

    Args:
        policy, reference: of single positions.
    """
    vocab, start = task.vocab_size, {}
    for sequence in sequences(vocab, task.length).tolist():
        board = tuple(symbol if i in task.clues else vocab for i, symbol in enumerate(sequence))
        start[board] = start.get(board, 0.0) + float(task.joint[tuple(sequence)])
    level, divergence = start, 0.0
    for _ in range(task.length - len(task.clues)):
        tokens = torch.tensor(list(level))
        masked = tokens == vocab
        seen = observation_of(tokens, masked, denoiser(tokens))
        log_pi, log_g = (one(seen).log_probs.double() for one in (policy, reference))
        ratio = torch.where(masked, log_pi - log_g, 0.0)
        mass = torch.tensor(list(level.values()), dtype=torch.float64)
        divergence += float((mass[:, None] * log_pi.exp().where(masked, 0.0) * ratio).sum())
        what = seen.denoised.log_probs.double().exp()
        if temperature == 0:
            what = torch.nn.functional.one_hot(what.argmax(-1), vocab).double()
        following: dict[tuple[int, ...], float] = {}
        for row, (board, weight) in enumerate(level.items()):
            for position in masked[row].nonzero().flatten().tolist():
                for symbol in range(vocab):
                    flow = weight * float(log_pi[row, position].exp()) * float(what[row, position, symbol])
                    after = (*board[:position], symbol, *board[position + 1 :])
                    following[after] = following.get(after, 0.0) + flow
        level = following
    shown = {b: tuple(s if i in task.clues else vocab for i, s in enumerate(b)) for b in level}
    return sum(mass * float(task.joint[b]) / start[shown[b]] for b, mass in level.items()), divergence


def agrees(sample: np.ndarray, expected: float, at_least: float = 0.0) -> None:
    """The mean of ``sample`` is ``expected`` within 5 standard errors, which are small beside ``at_least``."""
    error = sample.std() / len(sample) ** 0.5
    assert abs(sample.mean() - expected) < 5 * error, f"{sample.mean()} +- {error}, expected {expected}"
    assert at_least == 0 or error < at_least / 10
