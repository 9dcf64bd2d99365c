"""Recorded decode steps in which a layer that is full loses a token for each that comes."""

from __future__ import annotations

from collections.abc import Hashable, MutableMapping, Sequence

import torch
from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.overlap import Overlap
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


class LowestSumOut(Replay):
    """One new token a step attends to all that is there; each full KV head then loses the token of its lowest sum.

    Sums are of the attention that a token got as long as it was there, mean over a KV head's query heads (H2O: Zhang et
    al., arXiv 2306.14048). While steps are replayed tokens lie in any order; afterwards they ascend again. What a step
    adds counts from the next one on, so a step that nobody asked for adds nothing.
    """

    def __init__(self) -> None:
        self._sums = torch.empty((0, 0, 0))

    def prepare(
        self,
        caches: Sequence[LayerCache],
        limits: Sequence[int],
        recents: Sequence[int],
        sums: MutableMapping[int, Tensor],
    ) -> None:
        """Has memory for a request.

        Args:
            caches: a layer each.
            limits: tokens that each may hold, and no more now.
            recents: last tokens of each that stay.
            sums: by layer, [kv_heads, n] float32; is brought up to date when the steps are over.
        """
        device, room = caches[0].keys.device, max(cache.length + cache.room for cache in caches)
        if self._sums.shape[2] < room:
            self._sums = torch.empty((len(caches), caches[0].keys.shape[1], room), device=device)
            self._scores = torch.empty_like(self._sums)
            self._positions = torch.empty_like(self._sums, dtype=torch.int64)
            self._held, self._limits, self._recents = self._positions.new_empty((3, len(caches)))
        self._most, self._recent, self._theirs = list(limits), list(recents), sums

    def key(self) -> Hashable:
        """Changes with the memory that slots are managed in."""
        return self._sums.data_ptr()

    def load(self, caches: Sequence[LayerCache], table: DecodeTable) -> None:
        """As in the base, and keeps the table's rows at hand."""
        super().load(caches, table)
        self._rows = table.rows

    def take(self, caches: Sequence[LayerCache], *, rehearsal: bool) -> None:
        """Nothing is to go yet, and no sum is touched in a first step, so a rehearsal does no harm."""
        self._scores.zero_()
        numbers = ([cache.length for cache in caches], self._most, self._recent)
        for held, values in zip((self._held, self._limits, self._recents), numbers, strict=True):
            held.copy_(torch.tensor(values))
        for layer, cache in enumerate(caches):
            self._positions[layer, :, : cache.length] = cache.positions.T
            self._sums[layer].zero_()
            self._sums[layer, :, : cache.length] = self._theirs[layer]

    def attend(self, layer: int, heads: Heads, table: DecodeTable) -> Tensor:
        """Counts what the last step saw and lets tokens go, attends, and notes what this step sees."""
        from harness.engine.kernels.token_scores import head_scores

        self._settle(layer, heads.positions, heads.k[0], table.rows)
        out = table.attend(layer, heads)
        q, norms, kv_heads, position = heads.q[0], table.attention.norms, table.shape.kv_heads, heads.positions
        head_scores(q, norms, kv_heads, position, self._positions, table.rows, layer, self._scores)
        return out

    def end_step(self) -> Overlap | None:
        """Every layer holds one token more, of which a full one loses one ahead of the next attention."""
        self._held.copy_(torch.minimum(self._held, self._limits)).add_(1)
        self._rows[:, 2].copy_(torch.minimum(self._rows[:, 2], self._limits - 1))
        return None

    def give_back(self, caches: Sequence[LayerCache], count: int, position: int) -> None:
        """Caches hold what the steps left there, by position, and sums are theirs."""
        coming = torch.tensor([position + count], device=self._held.device)
        last = self._positions[0, 0].gather(0, self._held[:1] - 1)
        # Has no step been begun that nobody asked for, the last one still has to be counted.
        if not torch.equal(last, coming):
            for layer, cache in enumerate(caches):
                self._settle(layer, coming, cache.keys[0], self._rows)
        for layer, (cache, most) in enumerate(zip(caches, self._most, strict=True)):
            cache.claim(min(cache.length + count, most) - cache.length)
            positions = self._positions[layer, :, : cache.length]
            order = positions.argsort(1)
            cache.place(positions.T)
            cache.keep(order.T)
            self._theirs[layer] = self._sums[layer, :, : cache.length].gather(1, order)

    def _settle(self, layer: int, position: Tensor, like: Tensor, rows: Tensor) -> None:
        from harness.engine.kernels.eviction import settle

        settle(
            self._sums, self._scores, self._positions, self._held, self._limits, self._recents, position, like, rows,
            layer,
        )  # fmt: skip
