"""Zebra puzzles (Einstein's riddle): clues about who lives where, and the table of houses to fill in.

A sequence holds the clues, three tokens each (relation, thing, thing), then the table, a row per attribute and a column
per house. The clues are given; an instance hides the whole table. Every puzzle has exactly one solution, and none of
its clues can be left out. Puzzles are shown under random symmetries: values and attributes renamed, the row of houses
turned round, clues and what they treat alike in another order; held-out puzzles always under the same one.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tasks.errors import UnmaskError
from tasks.task import DATA, Instances, Task, random_rows

WORDS = {"at": "is in", "same": "is with", "different": "is not with", "left": "is left of", "next": "is next to"}
RELATIONS = tuple(WORDS)
MAX_CLUES = {3: 7, 4: 12, 5: 18}  # per puzzle of so many houses and as many attributes; nearly all have fewer
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
            packaged = ", ".join(str(n) for n in MAX_CLUES if (DATA / f"zebra{n}.npz").exists())
            raise UnmaskError(f"no packaged Zebra puzzles of {houses} houses; packaged are those of {packaged}")
        self.houses = self.attributes = houses
        self.clues = MAX_CLUES[houses]
        self.name = f"zebra{houses}"
        things = [f"{chr(ord('A') + a)}{v + 1}" for a in range(houses) for v in range(houses)]
        self.symbols = (*things, *(f"house {h + 1}" for h in range(houses)), *RELATIONS, "-")
        self.prompt_length = 3 * self.clues
        self.shape = (1, self.prompt_length + houses * houses)

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

    @cached_property
    def _files(self) -> dict[str, Tensor]:
        with np.load(self._path, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(array).long() for key, array in arrays.items()}

    def _plain(self, clues: Tensor) -> Instances:
        """(N, M, 5) clues as instances: value v of every attribute is in house v."""
        relation, a, v, b, w = clues.unbind(-1)  # each (N, M); -1 where there is no clue
        first = a * self.houses + v
        second = torch.where(relation == AT, self._first_house + w, b * self.houses + w)
        tokens = torch.stack([self._first_relation + relation, first, second], -1)
        tokens = torch.where((relation < 0).unsqueeze(-1), self._nothing, tokens).flatten(1)
        table = torch.arange(self._first_house, device=clues.device).expand(len(clues), -1)
        return self.behind_prompt(torch.cat([tokens, table], 1))

    def augment(self, instances: Instances, generator: torch.Generator) -> Instances:
        """The same puzzles, however far filled in, under a symmetry: values and attributes renamed, the row of houses
        turned round or not, clues and what they treat alike in another order."""
        n, size, device = len(instances), self.houses, instances.tokens.device

        def shuffled(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=device).argsort(-1)

        clue, either = shuffled(n, self.clues), shuffled(n, self.clues, 2)[..., 0] == 0
        named, row_of, turned = shuffled(n, size, size), shuffled(n, size), shuffled(n, 2)[:, :1] == 0
        houses = torch.arange(size, device=device)
        columns = torch.where(turned, size - 1 - houses, houses)  # (N, H); its own inverse
        # Attribute a's value v becomes value named[a, v] of attribute row_of[a]; what is no thing or house stays.
        things = (row_of.unsqueeze(-1) * size + named).flatten(1)
        others = torch.arange(self._first_relation, self.mask_id + 1, device=device).expand(n, -1)
        renamed = torch.cat([things, self._first_house + columns, others], 1)

        def shown(tokens: Tensor) -> Tensor:
            tokens = renamed.gather(1, tokens)
            clues = tokens[:, : self.prompt_length].view(n, self.clues, 3)
            clues = clues.gather(1, clue.unsqueeze(-1).expand(-1, -1, 3))
            # Turned round, left becomes right; and what a relation treats alike may stand either way.
            relation = clues[..., 0] - self._first_relation
            alike = (relation != AT) & (relation < len(RELATIONS))
            swapped = torch.where(relation == LEFT, turned, either & alike)
            clues = torch.where(swapped.unsqueeze(-1), clues[..., [0, 2, 1]], clues)
            table = tokens[:, self.prompt_length :].view(n, size, size)
            table = table.gather(2, columns.unsqueeze(1).expand(-1, size, -1))
            table = torch.empty_like(table).scatter(1, row_of.unsqueeze(-1).expand(-1, -1, size), table)
            return torch.cat([clues.flatten(1), table.flatten(1)], 1)

        return Instances(shown(instances.tokens), shown(instances.answers))

    def sample(self, n: int, generator: torch.Generator) -> Instances:
        clues = self._files["train"][random_rows(len(self._files["train"]), n, generator)]
        return self.augment(self._plain(clues.to(generator.device)), generator)

    def heldout(self, n: int | None = None, split: str = "test") -> Instances:
        generator = self.split_generator(split)
        return self.first(n, self.augment(self._plain(self._files[split]), generator), f"{split} puzzles")

    def reward(self, tokens: Tensor, instances: Instances) -> Tensor:
        """1 where the whole table is right."""
        return (tokens == instances.answers).all(1).float()

    def metrics(self, tokens: Tensor, instances: Instances) -> dict[str, Tensor]:
        """``solved``, and ``cell_accuracy`` over the table."""
        return {"solved": self.reward(tokens, instances), "cell_accuracy": self.accuracy(tokens, instances)}

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
