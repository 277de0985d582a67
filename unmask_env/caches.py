"""Keys and values that a language model uses again from one forward to the next, where filling goes block by block.

A model with bidirectional attention is approximated as by Fast-dLLM (Wu et al. 2025, arXiv 2505.22618): keys and values
outside a window stay those of the board as it was when the block in play began. The window is the block and everything
behind it (``prefix``), or the block alone (``dual``). One with attention in blocks is computed exactly: its first
positions do not see what comes behind them, so what they were is used for as long as their tokens are the same.

Either way the answer is a function of the tokens, the block in play and the board as the block began. A cache only
saves work: where it is of another board, it is made again.

Shapes: N rows, L positions, padding on the right; D channels; H heads of keys and values, with D' channels each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from unmask_env.state import join_rows

Cache = Literal["none", "prefix", "dual"]


@dataclass(frozen=True)
class KeyValues:
    """What a forward leaves for the next ones, by row.

    Attributes:
        ids: (N, L) int64, the tokens that it was of; -1 where nothing was computed, as in padding.
        states: (N, L, D) the last hidden states. keys, values: (N, H, L, D') of each layer.
    """

    ids: Tensor
    states: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@dataclass(frozen=True)
class Reuse:
    """How a model's forwards use keys and values again.

    Attributes:
        whole: ids (n, L), real (n, L) bool and a cache of ``transformers`` to fill, to hidden states (n, L, D).
        part: the same of some positions, with arguments of ``transformers`` instead.
        dual: what is behind the block is not computed again, either.
        block: of attention in blocks, their length; None: all positions see all.
        shifted: the logits at a position are of the next one, so that the one before a block is computed with it.
    """

    whole: Callable[[Tensor, Tensor, Any], Tensor]
    part: Callable[..., Tensor]
    dual: bool
    block: int | None
    shifted: bool
    dtype: torch.dtype

    def __call__(
        self, ids: Tensor, begun: Tensor, counts: Tensor, start: Tensor, stop: Tensor, kept: KeyValues | None
    ) -> tuple[Tensor, KeyValues]:
        """Hidden states (N, L, D) of ``ids`` (N, L), and what to keep for the next call.

        Args:
            begun: (N, L) as the block in play, at ``start`` to ``stop`` (N,), began. counts: (N,) positions that are
                not padding, in both. kept: of an earlier call, on whatever boards.

        Of attention in blocks the states behind those that the block in play touches are 0 with ``dual``; else all are
        exact. Without, those before the window, and with ``dual`` behind it, are those of ``begun``.
        """
        position = torch.arange(ids.shape[1], device=ids.device)
        real = position < counts.unsqueeze(1)
        if self.block is not None:
            stop = (stop + self.block - 1) // self.block * self.block
        high = torch.minimum(stop, counts) if self.dual else counts
        if self.block is not None:
            kept = self._extended(ids, counts, real & (position < high.unsqueeze(1)), high, kept)
            return kept.states, kept
        of = begun.masked_fill(~real, -1)
        fresh = torch.ones_like(real[:, 0]) if kept is None else (kept.ids != of).any(1)
        kept = self._made(begun, of, real, fresh, kept)
        rows = ((ids != begun) & real).any(1).nonzero().squeeze(1)
        low = (start - int(self.shifted)).clamp(min=0)
        if not len(rows):
            return kept.states, kept
        states, _, at, asked = self._window(_rows(kept, rows), ids[rows], counts[rows], low[rows], high[rows])
        return _written(kept.states, rows, at, asked, states), kept

    def _extended(self, ids: Tensor, counts: Tensor, known: Tensor, high: Tensor, kept: KeyValues | None) -> KeyValues:
        """Of attention in blocks: computed from the first block that is not what it was, up to ``high`` (N,)."""
        of = ids.masked_fill(~known, -1)
        low = torch.zeros_like(high)
        if kept is not None:
            same = (kept.ids == of).long().cumprod(1).sum(1)  # (N,) leading positions
            low = same // self.block * self.block
        kept = self._made(ids, of, torch.arange(ids.shape[1], device=ids.device) < counts.unsqueeze(1), low == 0, kept)
        rows = ((low > 0) & (low < high)).nonzero().squeeze(1)
        if len(rows):
            states, past, at, asked = self._window(_rows(kept, rows), ids[rows], counts[rows], low[rows], high[rows])
            new = [[part[:, :, -at.shape[1] :] for part in (layer.keys, layer.values)] for layer in past.layers]
            written = [
                tuple(_written(old, rows, at, asked, pair[which]) for old, pair in zip(olds, new, strict=True))
                for which, olds in enumerate((kept.keys, kept.values))
            ]
            kept = KeyValues(of, _written(kept.states, rows, at, asked, states), *written)
        return replace(kept, ids=of, states=kept.states.masked_fill(~known.unsqueeze(-1), 0.0))

    def _made(self, ids: Tensor, of: Tensor, real: Tensor, fresh: Tensor, kept: KeyValues | None) -> KeyValues:
        """``kept`` with the rows ``fresh`` (N,) bool, all where there is none, from a forward of whole sequences."""
        from transformers import DynamicCache

        if kept is not None and not bool(fresh.any()):
            return kept
        every = kept is None or bool(fresh.all())
        rows = torch.arange(len(ids), device=ids.device) if every else fresh.nonzero().squeeze(1)
        past = DynamicCache()
        states = self.whole(ids[rows], real[rows], past)
        pairs = [(layer.keys, layer.values) for layer in past.layers]
        made = KeyValues(of[rows], states, *map(tuple, zip(*pairs, strict=True)))
        return made if every else join_rows([kept, made], lambda parts: parts[0].index_copy(0, rows, parts[1]))

    def _window(
        self, kept: KeyValues, ids: Tensor, counts: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Positions ``low`` to ``high`` (n,) computed again, beside the kept keys and values of all others.

        Returns:
            States (n, W, D); the cache, whose last W entries are the window's; the positions (n, W); and which of these
            are in the window, (n, W) bool.
        """
        from transformers import DynamicCache

        length, device = ids.shape[1], ids.device
        at = low.unsqueeze(1) + torch.arange(int((high - low).max()), device=device)
        asked = at < high.unsqueeze(1)
        at = at.clamp(max=length - 1)
        before_only = not self.dual or self.block is not None
        most = int(low.max()) if before_only else length
        position = torch.arange(most, device=device)
        others = (position < low.unsqueeze(1)) | (position >= high.unsqueeze(1)) & (position < counts.unsqueeze(1))
        allowed = torch.cat([others, asked], 1).unsqueeze(1).expand(-1, at.shape[1], -1)  # (n, W, most + W)
        if self.block is not None:
            seen = torch.cat([position.expand(len(ids), -1), at], 1) // self.block
            allowed = allowed & (at.unsqueeze(-1) // self.block >= seen.unsqueeze(1))
        added = torch.zeros(allowed.shape, dtype=self.dtype, device=device)
        added = added.masked_fill(~allowed, torch.finfo(self.dtype).min).unsqueeze(1)
        past = DynamicCache(
            [(keys[:, :, :most], values[:, :, :most]) for keys, values in zip(kept.keys, kept.values, strict=True)]
        )
        options = {"attention_mask": added, "position_ids": at, "past_key_values": past, "use_cache": True}
        return self.part(ids.gather(1, at), **options), past, at, asked


def _rows(kept: KeyValues, rows: Tensor) -> KeyValues:
    return kept if len(rows) == len(kept.ids) else join_rows([kept], lambda parts: parts[0][rows])


def _written(old: Tensor, rows: Tensor, at: Tensor, asked: Tensor, new: Tensor) -> Tensor:
    """``old`` (N, ..., L, D) with ``new`` (n, ..., W, D) in ``rows`` (n,) at the positions ``at`` where ``asked``."""
    whole = old.clone()
    row = rows.unsqueeze(1).expand_as(at)
    whole.movedim(-2, 1)[row[asked], at[asked]] = new.movedim(-2, 1)[asked]
    return whole
