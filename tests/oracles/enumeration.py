"""Exact answers by enumeration, for boards small enough to list: V symbols, L positions, at most a few hundred states.

Nothing here calls the code under test except the order and the denoiser that a caller hands in.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tasks import Instances, Task
from unmask_env.state import Denoised, Observation


class TableTask(Task):
    """Sequences drawn from an enumerated joint distribution; the reward is 1 if the sequence is the drawn one.

    Args:
        joint: (V,) * L probabilities.
        clues: positions that instances show from the start.
    """

    def __init__(self, joint: Tensor, clues: tuple[int, ...] = ()) -> None:
        self.name, self.joint, self.clues = "table", joint / joint.sum(), clues
        self.symbols = tuple("abcdefgh"[: joint.shape[0]])
        self.shape = (1, joint.ndim)

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        rows = torch.multinomial(self.joint.flatten(), n, replacement=True, generator=generator)
        answers = sequences(self.vocab_size, self.length)[rows]
        tokens = torch.full_like(answers, self.mask_id)
        for position in self.clues:
            tokens[:, position] = answers[:, position]
        return Instances(tokens, answers)

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        return (tokens == instances.answers).all(1).float()


def sequences(vocab_size: int, length: int) -> Tensor:
    """(V**L, L) all complete sequences, the last position running fastest."""
    return torch.tensor(list(itertools.product(range(vocab_size), repeat=length)))


def random_joint(vocab_size: int, length: int, seed: int, zeros: int = 0) -> Tensor:
    """(V,) * L float64 probabilities far from independent; ``zeros`` of them are exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    joint = (2 * torch.randn(vocab_size**length, generator=generator, dtype=torch.float64)).exp()
    joint[torch.randperm(len(joint), generator=generator)[:zeros]] = 0
    return (joint / joint.sum()).view((vocab_size,) * length)


def conditional(joint: Tensor, tokens: list[int]) -> Tensor:
    """(L, V) float64 p(x_i = v | the visible tokens), by a plain sum over the joint; V in ``tokens`` is a hole."""
    vocab_size, length = joint.shape[0], joint.ndim
    out = torch.zeros(length, vocab_size, dtype=torch.float64)
    for sequence in itertools.product(range(vocab_size), repeat=length):
        if all(t in (vocab_size, s) for t, s in zip(tokens, sequence, strict=True)):
            for position, symbol in enumerate(sequence):
                out[position, symbol] += joint[sequence]
    return out / out.sum(1, keepdim=True)


def terminal_distribution(order, denoiser, start: list[int], vocab_size: int) -> Tensor:
    """(V,) * L float64: the distribution of the finished sequence from ``start`` when ``order`` chooses the position
    and the denoiser's distribution is sampled there.

    A dynamic programme over (set of filled positions, symbols in them): mass flows from each partial board to its
    successors with probability order(position) * denoiser(symbol), one level of holes at a time.
    """
    length = len(start)
    level = {tuple(start): 1.0}
    for _ in range(start.count(vocab_size)):
        boards = torch.tensor(list(level))
        denoised: Denoised = denoiser(boards)
        masked = boards == vocab_size
        where = order(Observation(boards, masked, masked, denoised)).log_probs.double().exp()
        what = denoised.log_probs.double().exp()
        following: dict[tuple[int, ...], float] = {}
        for row, (board, mass) in enumerate(level.items()):
            for position, symbol in itertools.product(range(length), range(vocab_size)):
                flow = mass * float(where[row, position]) * float(what[row, position, symbol])
                if flow > 0:
                    after = (*board[:position], symbol, *board[position + 1 :])
                    following[after] = following.get(after, 0.0) + flow
        level = following
    out = torch.zeros((vocab_size,) * length, dtype=torch.float64)
    for board, mass in level.items():
        out[board] = mass
    return out
