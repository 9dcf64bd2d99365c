"""Recorded decode steps in which a layer that is full loses a token for each that comes."""

from __future__ import annotations

from collections.abc import Hashable, MutableMapping, Sequence
from functools import partial

import torch
from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads

_NEVER = torch.iinfo(torch.int64).max
"""A limit that no layer reaches."""


class LowestOut(Replay):
    """One new token a step attends to all that is there; of a full layer, the tokens of the lowest score then go.

    A score is the attention that a token got in the last step, mean over all heads, and the same token leaves all KV
    heads (TOVA: Oren et al., arXiv 2401.06104). Or it is the sum of this over the steps that the token was there for,
    mean over a KV head's query heads, and each KV head loses a token of its own (H2O: Zhang et al., arXiv 2306.14048).
    While steps are replayed tokens lie in any order; afterwards they ascend again. What a step saw counts when the next
    one begins, so a step that nobody asked for takes nothing away.
    """

    def __init__(self, seats: int = 1) -> None:
        """
        Args:
            seats: requests at once.
        """
        self._seats, self._form = seats, (0, 0, 0, False)
        self._logits, self._norms, self._sums = torch.empty((0, 0, 0, 0)), torch.empty(0), torch.empty(0)

    @property
    def nbytes(self) -> int:
        """Bytes of what tokens are rated by, kept from request to request."""
        return self._logits.nbytes + self._norms.nbytes + self._sums.nbytes

    def prepare(
        self,
        caches: Sequence[LayerCache],
        heads: int,
        limits: Sequence[int],
        recents: Sequence[int] | None = None,
        sums: MutableMapping[int, Tensor] | None = None,
    ) -> None:
        """Is told of a request.

        Args:
            caches: a layer each.
            heads: query heads.
            limits: tokens that each may hold, and no more now.
            recents: last tokens of each that stay; None for no token.
            sums: by layer, [kv_heads, n] float32, each KV head's own; is brought up to date when the steps are over.
                None for the last step's scores, and one choice for all heads.
        """
        # A slot more: the last token that is asked for makes room for one that does not come.
        self._needed = max(cache.length + cache.room for cache in caches) + 1
        self._form = len(caches), heads, 1 if sums is None else caches[0].keys.shape[1], sums is not None
        self._most, self._recent, self._theirs = list(limits), list(recents or [0] * len(caches)), sums
        self._device = caches[0].keys.device

    def key(self) -> Hashable:
        """Changes with the memory that slots are managed in."""
        self._make_room()
        return self._logits.data_ptr()

    def _make_room(self) -> None:
        """Has memory for a request; only where the steps are this object's own to do."""
        if self._logits.shape[3] >= self._needed:
            return
        layers, heads, lists, summing = self._form
        empty = partial(torch.empty, device=self._device)
        self._logits, self._norms = (empty((self._seats, layers, heads, *room)) for room in ([self._needed], []))
        self._positions = torch.zeros_like(empty((self._seats, layers, lists, self._needed)), dtype=torch.int64)
        self._sums = empty(self._positions.shape if summing else 0)
        self._limits, self._recents = torch.empty((2, self._seats, layers), dtype=torch.int64, device=self._device)
        self._counters = torch.zeros((self._seats, layers), dtype=torch.int32, device=self._device)

    def seats(self, count: int) -> Replay:
        """With as many slots as this one's request needs."""
        other = LowestOut(count)
        other._form, other._needed, other._device = self._form, self._needed, self._device
        other._make_room()
        return other

    def serves(self, other: Replay) -> bool:
        """What rates tokens alike, in no more slots."""
        return isinstance(other, LowestOut) and other._form == self._form and other._needed <= self._logits.shape[3]

    def sit(self, seat: int, other: Replay | None, caches: Sequence[LayerCache], table: DecodeTable) -> None:
        """As in the base; nobody's layers are never full."""
        super().sit(seat, other, caches, table)
        self._place(seat, other if isinstance(other, LowestOut) else None, caches)

    def seated(self, table: DecodeTable) -> Sequence[Tensor]:
        """As in the base, and what tokens are rated by."""
        return [*super().seated(table), *self._state()]

    def rise(self, seat: int, other: Replay, table: DecodeTable) -> None:
        """What the last step saw, which is still to count, and where tokens lie."""
        assert isinstance(other, LowestOut)
        other._make_room()
        room = other._logits.shape[3]
        for theirs, own in zip(other._state(), self._state(), strict=True):
            theirs[0].copy_(own[seat, ..., :room] if own.dim() == 4 else own[seat])
        other._rows = table.seated[seat]

    def _state(self) -> list[Tensor]:
        sums = [self._sums] if len(self._sums) else []
        return [self._logits, self._norms, self._positions, self._limits, self._recents, *sums]

    def load(self, caches: Sequence[LayerCache], table: DecodeTable) -> None:
        """As in the base, and keeps the table's rows at hand."""
        super().load(caches, table)
        self._rows = table.rows

    def take(self, caches: Sequence[LayerCache], *, rehearsal: bool) -> None:
        """Nothing is to go yet, and nothing was seen, so a rehearsal does no harm."""
        self._place(0, self, caches)

    def _place(self, seat: int, other: LowestOut | None, caches: Sequence[LayerCache]) -> None:
        """Nothing was seen of the request yet."""
        self._logits[seat].zero_()
        self._norms[seat].fill_(torch.inf)
        self._limits[seat] = _NEVER if other is None else torch.tensor(other._most, device=self._limits.device)
        self._recents[seat] = 0 if other is None else torch.tensor(other._recent, device=self._limits.device)
        for held, cache in zip(self._positions[seat], caches, strict=True):
            held[:, : cache.length] = cache.positions.T[: len(held)]
        if len(self._sums):
            self._sums[seat].zero_()
        for layer, sums in ((other and other._theirs) or {}).items():
            self._sums[seat, layer, :, : caches[layer].length] = sums

    def attend(self, layer: int, heads: Heads, table: DecodeTable) -> Tensor:
        """Lets tokens go ahead of the first layer, by what the last step saw, and notes what this one sees."""
        if layer == 0:
            self._settle(heads.positions, heads.k[0], table.rows)
        return table.attend(layer, heads, (self._logits, self._norms))

    def give_back(self, caches: Sequence[LayerCache], count: int, position: int) -> None:
        """Caches hold what the steps left there, by position, and sums are theirs."""
        coming = torch.tensor([position + count], device=self._rows.device)
        last = self._positions[0, 0, 0].gather(0, self._rows[0, 2:] - 1)
        # Has no step been begun that nobody asked for, the last one still has to be counted.
        if not torch.equal(last, coming):
            self._settle(coming, caches[0].keys[0], self._rows)
        for layer, (cache, most) in enumerate(zip(caches, self._most, strict=True)):
            cache.claim(min(cache.length + count, most) - cache.length)
            positions = self._positions[0, layer, :, : cache.length]
            order = positions.argsort(1)
            cache.place(positions.T)
            cache.keep(order.T.squeeze(1))
            if self._theirs is not None:
                self._theirs[layer] = self._sums[0, layer, :, : cache.length].gather(1, order)

    def _settle(self, positions: Tensor, like: Tensor, rows: Tensor) -> None:
        from harness.engine.kernels.eviction import settle

        n = len(positions)
        sums = self._sums[:n] if len(self._sums) else None
        settle(
            self._logits[:n], self._norms[:n], sums, self._positions[:n], self._limits[:n], self._recents[:n],
            positions, like, self._counters[:n], rows,
        )  # fmt: skip
