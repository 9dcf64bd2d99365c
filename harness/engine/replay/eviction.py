"""Recorded decode steps in which a layer that is full loses a token for each that comes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads


class LowestOut(Replay):
    """One new token a step attends to all that is there; of a full layer, the token that it attends to least then goes.

    Attention is the mean over all heads, and the same token leaves all KV heads (TOVA: Oren et al., arXiv 2401.06104).
    While steps are replayed a layer's tokens lie in any order; afterwards they ascend again.
    """

    def __init__(self) -> None:
        self._positions = torch.empty((0, 0), dtype=torch.int64)

    def prepare(self, caches: Sequence[LayerCache], limits: Sequence[int]) -> None:
        """Has memory for a request whose layers may hold so many tokens each, and hold no more now."""
        device, room = caches[0].keys.device, max(cache.length + cache.room for cache in caches)
        if self._positions.shape[1] < room:
            self._positions = torch.empty((len(caches), room), dtype=torch.int64, device=device)
            self._scores = torch.empty(room, dtype=torch.float32, device=device)
            self._slots = torch.arange(room, dtype=torch.int32, device=device).repeat(2, 1)
            self._chosen, self._limits = self._positions.new_empty((2, len(caches)))
        self._most = list(limits)

    def key(self) -> Hashable:
        """Changes with the memory that slots are managed in."""
        return self._positions.data_ptr()

    def take(self, caches: Sequence[LayerCache], *, rehearsal: bool) -> None:
        """Nothing is to go yet, so a rehearsal takes nothing away."""
        self._chosen.fill_(-1)
        self._positions.fill_(-1)
        self._limits.copy_(torch.tensor(self._most))
        for held, cache in zip(self._positions, caches, strict=True):
            held[: cache.length] = cache.token_positions

    def attend(self, layer: int, heads: Heads, table: DecodeTable) -> Tensor:
        """Lets the token go that the last step chose, attends, and chooses the next."""
        from harness.engine.kernels.eviction import choose_lowest, drop_chosen
        from harness.engine.kernels.token_scores import token_scores

        q, rows = heads.q[0], table.rows
        drop_chosen(self._chosen, self._positions, heads.k[0], rows, layer)
        out = table.attend(layer, heads)
        count = rows[layer, 2:] + 1
        scores = token_scores(
            q, table.attention.norms, table.shape.kv_heads, self._slots, count, rows, layer, self._scores
        )
        choose_lowest(scores, self._limits, heads.positions, self._positions, self._chosen, rows, layer)
        return out

    def give_back(self, caches: Sequence[LayerCache], count: int, position: int) -> None:
        """Caches hold what the steps left there, by position, without the token that was to go next."""
        positions, chosen = self._positions.tolist(), self._chosen.tolist()
        for cache, places, goes, most in zip(caches, positions, chosen, self._most, strict=True):
            held = min(cache.length + count, most)
            # A step was begun that nobody asked for: its token is not counted, and lies behind those that are.
            begun = held < len(places) and places[held] == position + count
            slots = held if begun else min(cache.length + count, most + 1)
            cache.claim(slots - cache.length)
            stay = sorted((place, slot) for slot, place in enumerate(places[:slots]) if begun or slot != goes)
            cache.token_positions[:] = torch.tensor(places[:slots])
            cache.keep(torch.tensor([slot for _, slot in stay], device=cache.keys.device))
