"""Zebra puzzles (Einstein's riddle): clues about who lives where, and the table of houses to fill in.

A sequence holds the clues, three tokens each (relation, thing, thing), then the table, a row per attribute and a column
per house. The clues are given; an instance hides the whole table. Every puzzle has exactly one solution, and none of
its clues can be left out. Puzzles are shown in random guises: values and attributes renamed, the row of houses turned
round, clues and what they treat alike in another order; held-out puzzles always in the same one.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tasks.errors import UnmaskError
from tasks.generate_zebra import DATA, MOST, RELATIONS
from tasks.task import SPLITS, Instances, Task

WORDS = {"at": "is in", "same": "is with", "different": "is not with", "left": "is left of", "next": "is next to"}
AT, LEFT = RELATIONS.index("at"), RELATIONS.index("left")


class Zebra(Task):
    """Fill in the table of houses.

    Args:
        houses: 3, 4 or 5, with as many attributes.

    Raises:
        UnmaskError: another number of houses.
    """

    def __init__(self, houses: int = 4) -> None:
        self._path = DATA / f"zebra{houses}.npz"
        if not self._path.exists():
            packaged = ", ".join(str(n) for n in MOST if (DATA / f"zebra{n}.npz").exists())
            raise UnmaskError(f"no packaged Zebra puzzles of {houses} houses; packaged are those of {packaged}")
        self.houses = self.attributes = houses
        self.clues = MOST[houses]
        self.name = f"zebra{houses}"
        things = [f"{chr(ord('A') + a)}{v + 1}" for a in range(houses) for v in range(houses)]
        self.symbols = (*things, *(f"house {h + 1}" for h in range(houses)), *RELATIONS, "-")
        self.prompt_length = 3 * self.clues
        self.shape = (1, self.prompt_length + houses * houses)

    # ------------------------------------------------------------------ tokens
    @property
    def _first_house(self) -> int:
        return self.houses * self.attributes

    @property
    def _first_relation(self) -> int:
        return self._first_house + self.houses

    @property
    def _nothing(self) -> int:
        return self.vocab_size - 1

    @cached_property
    def coordinates(self) -> Tensor:
        """(L, 2): of a clue's tokens (its number, which of the three); of the table's, behind those, (row, column)."""
        clues = torch.cartesian_prod(torch.arange(self.clues), torch.arange(3))
        table = torch.cartesian_prod(torch.arange(self.attributes), torch.arange(self.houses))
        return torch.cat([clues, table + torch.tensor([self.clues, 3])])

    # ------------------------------------------------------------------ data
    @cached_property
    def _files(self) -> dict[str, Tensor]:
        with np.load(self._path, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key]).long() for key in arrays.files}

    def _shown(self, clues: Tensor, generator: torch.Generator) -> Instances:
        """(N, M, 5) clues in a random guise."""
        (n, many, _), size, device = clues.shape, self.houses, clues.device

        def shuffled(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=device).argsort(-1)

        clues = clues.gather(1, shuffled(n, many).unsqueeze(-1).expand(-1, -1, 5))
        named, row_of, turned = shuffled(n, size, size), shuffled(n, size), shuffled(n, 2)[:, :1] == 0
        relation, a, v, b, w = clues.unbind(-1)  # each (N, M); -1 where there is no clue

        def thing(attribute: Tensor, value: Tensor) -> Tensor:
            """Its token: attribute a is shown in row row_of[a], its value v by the name named[a, v]."""
            attribute, value = attribute.clamp(min=0), value.clamp(min=0)
            name = named.gather(1, attribute.unsqueeze(-1).expand(-1, -1, size)).gather(2, value.unsqueeze(-1))
            return row_of.gather(1, attribute) * size + name.squeeze(-1)

        house = torch.where(turned, size - 1 - w, w)
        first, second = thing(a, v), torch.where(relation == AT, self._first_house + house, thing(b, w))
        # Turned round, left becomes right; and what a relation treats alike may stand either way.
        either = shuffled(n, many, 2)[..., 0] == 0
        swapped = torch.where(relation == LEFT, turned, either & (relation != AT))
        first, second = torch.where(swapped, second, first), torch.where(swapped, first, second)
        tokens = torch.stack([self._first_relation + relation, first, second], -1)
        tokens = torch.where((relation < 0).unsqueeze(-1), self._nothing, tokens).flatten(1)
        # The value in column h of attribute a's row is the one of house h, or of the last but h where turned.
        columns = torch.arange(size, device=device)
        columns = torch.where(turned, size - 1 - columns, columns)  # (N, H)
        values = named.gather(2, columns.unsqueeze(1).expand(-1, size, -1)) + (row_of * size).unsqueeze(-1)
        table = torch.zeros_like(values).scatter(1, row_of.unsqueeze(-1).expand(-1, -1, size), values)
        return self.behind_prompt(torch.cat([tokens, table.flatten(1)], 1))

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        clues = self._files["train"]
        rows = torch.randint(len(clues), (n,), generator=generator, device=generator.device).cpu()
        return self._shown(clues[rows].to(generator.device), generator)

    def heldout(self, n: int | None = None, split: str = "test") -> Instances:
        if split not in SPLITS:
            raise UnmaskError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        clues = self._files[split]
        if n is not None and not 1 <= n <= len(clues):
            raise UnmaskError(f"{self.name} has {len(clues)} {split} puzzles; cannot take {n}")
        shown = self._shown(clues, torch.Generator().manual_seed(2**31 + SPLITS.index(split)))
        return shown[: len(clues) if n is None else n]

    # ------------------------------------------------------------------ truth
    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        """1 where the whole table is right."""
        return (tokens == instances.answers).all(1).float()

    def metrics(self, tokens: Tensor, instances: Instances) -> dict[str, Tensor]:
        """``solved``, and ``cell_accuracy`` over the table."""
        table = instances.tokens == self.mask_id
        right = ((tokens == instances.answers) & table).sum(1) / table.sum(1).clamp(min=1)
        return {"solved": self.reward(tokens, instances), "cell_accuracy": right}

    # ------------------------------------------------------------------ for people
    def draw(self, tokens: Tensor) -> str:
        """The clues as sentences, then the table."""
        lines = []
        for relation, first, second in tokens[: self.prompt_length].view(-1, 3).tolist():
            if relation != self._nothing:
                word = WORDS[RELATIONS[relation - self._first_relation]]
                lines.append(f"{self.symbol(first)} {word} {self.symbol(second)}.")
        rows = tokens[self.prompt_length :].view(self.attributes, self.houses).tolist()
        table = ["  ".join(self.symbol(token).rjust(2) for token in row) for row in rows]
        return "\n".join([*lines, "", *table])
