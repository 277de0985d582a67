"""A policy that also masks filled positions again: two order policies, one that fills and one that takes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from agents.decoding import Thresholds
from agents.policy import REFILL_PENALTY, TAGS, LearnedPolicy, OrderPolicy, remask_count, set_distribution
from pretrain.card import HubModel
from tasks import UnmaskError
from unmask_env.distributions import Distribution
from unmask_env.state import Observation

REMASK_AGAIN_PENALTY = 5.0  # how far the log-odds of masking a position again fall each time that it was


class RemaskPolicy(LearnedPolicy, HubModel, tags=[*TAGS]):
    """``fill`` says what to fill as if nothing could be masked again, so that learning the one never unlearns the
    other; ``remask``, a network of the same kind that reads twice as often, says what to mask again. Each time that a
    position was masked again counts against filling it and against masking it once more.

    Args:
        vocab_size, coordinates: of both. fill, remask: the other arguments of each :class:`OrderPolicy`.
        trained: as there.
    """

    actions = "set+remask"

    def __init__(
        self,
        vocab_size: int,
        coordinates: Sequence[Sequence[int]],
        fill: dict[str, Any],
        remask: dict[str, Any],
        trained: str = "",
    ) -> None:
        super().__init__()
        self.trained = trained
        self.fill = OrderPolicy(vocab_size, coordinates, **fill)
        self.remask = OrderPolicy(vocab_size, coordinates, **remask)
        self.vocab_size, self.length = vocab_size, len(coordinates)
        self.refill_penalty = nn.Parameter(torch.tensor(REFILL_PENALTY))

    @classmethod
    def start(cls, fill: OrderPolicy) -> RemaskPolicy:
        """Both parts begin as ``fill``, a policy over sets."""
        config = dict(fill._hub_mixin_config)
        vocab_size, coordinates = config.pop("vocab_size"), config.pop("coordinates")
        doubled = config | {"num_passes": 2 * fill.config.num_passes}
        policy = cls(vocab_size, coordinates, config, doubled, trained=fill.trained)
        for part in (policy.fill, policy.remask):
            part.load_state_dict(fill.state_dict())
        return policy

    @property
    def reads_hidden(self) -> bool:
        return self.fill.reads_hidden

    @property
    def reader(self) -> nn.Module:
        return self.fill.reader

    def log_odds(self, seen: Observation) -> Tensor:
        """(N, A) log-odds that each entry is in the set; meaningless outside the action mask."""
        fill = self.fill.log_odds(replace(seen, remaskable=None, remask_count=None))
        if seen.remaskable is None:
            return fill
        remask = self.remask.log_odds(seen)[:, self.length :]
        count = remask_count(seen)
        return torch.cat([fill - self.refill_penalty * count, remask - REMASK_AGAIN_PENALTY * count], 1)

    def decide(self, seen: Observation, thresholds: Thresholds) -> Distribution:
        if thresholds.read != "always":
            raise UnmaskError(f"a policy that masks positions again reads always, not {thresholds.read!r}")
        decided = set_distribution(seen, self.log_odds(seen), thresholds, self.fill.head.stops)
        networks = (self.fill,) if seen.remaskable is None else (self.fill, self.remask)
        decided.passes = torch.full_like(seen.tokens[:, 0], sum(network.config.num_passes for network in networks))
        return decided
