"""Recorded decode steps in which a layer that is full loses a token for each that comes."""

from __future__ import annotations

from collections.abc import Hashable, MutableMapping, Sequence

import torch
from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads


class LowestOut(Replay):
    """One new token a step attends to all that is there; of a full layer, the tokens of the lowest score then go.

    A score is the attention that a token got in the last step, mean over all heads, and the same token leaves all KV
    heads (TOVA: Oren et al., arXiv 2401.06104). Or it is the sum of this over the steps that the token was there for,
    mean over a KV head's query heads, and each KV head loses a token of its own (H2O: Zhang et al., arXiv 2306.14048).
    While steps are replayed tokens lie in any order; afterwards they ascend again. What a step saw counts when the next
    one begins, so a step that nobody asked for takes nothing away.
    """

    def __init__(self) -> None:
        self._logits, self._norms, self._sums = torch.empty((0, 0, 0)), torch.empty((0, 0)), torch.empty(0)

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
        """Has memory for a request.

        Args:
            caches: a layer each.
            heads: query heads.
            limits: tokens that each may hold, and no more now.
            recents: last tokens of each that stay; None for no token.
            sums: by layer, [kv_heads, n] float32, each KV head's own; is brought up to date when the steps are over.
                None for the last step's scores, and one choice for all heads.
        """
        device, layers = caches[0].keys.device, len(caches)
        # A slot more: the last token that is asked for makes room for one that does not come.
        room = max(cache.length + cache.room for cache in caches) + 1
        if self._logits.shape[2] < room:
            lists = 1 if sums is None else caches[0].keys.shape[1]
            self._logits = torch.empty((layers, heads, room), device=device)
            self._norms = torch.empty((layers, heads), device=device)
            self._positions = torch.empty((layers, lists, room), dtype=torch.int64, device=device)
            self._sums = self._logits.new_empty((layers, lists, room) if sums is not None else 0)
            self._limits, self._recents = self._positions.new_empty((2, layers))
            self._counters = torch.zeros(layers, dtype=torch.int32, device=device)
        self._most, self._recent, self._theirs = list(limits), list(recents or [0] * layers), sums

    def key(self) -> Hashable:
        """Changes with the memory that slots are managed in."""
        return self._logits.data_ptr()

    def load(self, caches: Sequence[LayerCache], table: DecodeTable) -> None:
        """As in the base, and keeps the table's rows at hand."""
        super().load(caches, table)
        self._rows = table.rows

    def take(self, caches: Sequence[LayerCache], *, rehearsal: bool) -> None:
        """Nothing is to go yet, and nothing was seen, so a rehearsal does no harm."""
        self._logits.zero_()
        self._norms.fill_(torch.inf)
        self._limits.copy_(torch.tensor(self._most))
        self._recents.copy_(torch.tensor(self._recent))
        for held, cache in zip(self._positions, caches, strict=True):
            held[:, : cache.length] = cache.positions.T[: len(held)]
        self._sums.zero_()
        if self._theirs is not None:
            for layer, cache in enumerate(caches):
                self._sums[layer, :, : cache.length] = self._theirs[layer]

    def attend(self, layer: int, heads: Heads, table: DecodeTable) -> Tensor:
        """Lets tokens go ahead of the first layer, by what the last step saw, and notes what this one sees."""
        if layer == 0:
            self._settle(heads.positions, heads.k[0])
        return table.attend(layer, heads, (self._logits, self._norms))

    def give_back(self, caches: Sequence[LayerCache], count: int, position: int) -> None:
        """Caches hold what the steps left there, by position, and sums are theirs."""
        coming = torch.tensor([position + count], device=self._rows.device)
        last = self._positions[0, 0].gather(0, self._rows[0, 2:] - 1)
        # Has no step been begun that nobody asked for, the last one still has to be counted.
        if not torch.equal(last, coming):
            self._settle(coming, caches[0].keys[0])
        for layer, (cache, most) in enumerate(zip(caches, self._most, strict=True)):
            cache.claim(min(cache.length + count, most) - cache.length)
            positions = self._positions[layer, :, : cache.length]
            order = positions.argsort(1)
            cache.place(positions.T)
            cache.keep(order.T.squeeze(1))
            if self._theirs is not None:
                self._theirs[layer] = self._sums[layer, :, : cache.length].gather(1, order)

    def _settle(self, position: Tensor, like: Tensor) -> None:
        from harness.engine.kernels.eviction import settle

        settle(
            self._logits, self._norms, None if self._theirs is None else self._sums, self._positions, self._limits,
            self._recents, position, like, self._counters, self._rows,
        )  # fmt: skip
