"""SlimInfer's recorded decode step: which blocks come in is decided, and fetched, on the device, beside the step."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext

from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.overlap import Overlap, SideStream
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads
from methods.common.active_blocks import ActiveBlocks
from methods.common.active_sets import ActiveSets


class SlimReplay(Replay):
    """Full attention over what is active, and then the choice of what is active next."""

    def __init__(self, active: Mapping[int, ActiveBlocks], gamma: float, *, beside: bool) -> None:
        """
        Args:
            active: by layer, where a choice fell; the method's own mapping, which changes with the request.
            gamma: least overlap that keeps an active set.
            beside: choose and fetch beside the rest of the step, not ahead of it.
        """
        self._active, self._gamma = active, gamma
        self._side = SideStream() if beside else None

    def key(self) -> Hashable:
        """Changes with the memory that active blocks are managed in, not with how much of it a prompt uses."""
        return tuple((layer, active.memory) for layer, active in self._active.items())

    def load(self, caches: Sequence[LayerCache], table: DecodeTable) -> None:
        """As in the base, and keeps the table at hand."""
        super().load(caches, table)
        self._table = table

    def attend(self, layer: int, heads: Heads, table: DecodeTable) -> Tensor:
        """Attends to the active blocks, and chooses those for the steps that follow."""
        out = table.attend(layer, heads)
        if layer in self._active:
            active = self._active[layer]
            with nullcontext() if self._side is None else self._side.beside(heads.q):
                self._fetch(layer, active.rechoose(heads.q, self._gamma), table)
        return out

    def seats(self, count: int) -> Replay:
        """With room for active sets of the size of this one's."""
        return SeatedSlim(self._active, self._gamma, count, beside=self._side is not None)

    def end_step(self) -> Overlap | None:
        """Blocks have come in."""
        return None if self._side is None else self._side.join()

    def undo(self, table: DecodeTable) -> None:
        """Brings back the blocks that were active before the step."""
        for layer, active in self._active.items():
            self._fetch(layer, active.take_back(), table)

    def give_back(self, caches: Sequence[LayerCache], count: int, position: int) -> None:
        """Positions follow the blocks that came in; those of a step that nobody asked for go again."""
        super().give_back(caches, count, position)
        if self._active and int(self._table.rows[0, 2]) > caches[0].length:
            self.undo(self._table)
        for active in self._active.values():
            active.settle()

    def _fetch(self, layer: int, source: Tensor, table: DecodeTable) -> None:
        from harness.engine.kernels.fetch import fetch_blocks

        active = self._active[layer]
        fetch_blocks(source, active.addresses, active.state.units, table.rows, layer, active.block)


class SeatedSlim(Replay):
    """The same of several requests: those that choose, choose at once."""

    def __init__(self, active: Mapping[int, ActiveBlocks], gamma: float, seats: int, *, beside: bool) -> None:
        """
        Args:
            active: of a request, by layer.
            gamma, beside: as in `SlimReplay`.
            seats: requests at once.
        """
        self._sets = {layer: ActiveSets(one, seats) for layer, one in active.items()}
        self._gamma, self._side = gamma, SideStream() if beside else None

    def serves(self, other: Replay) -> bool:
        """What chooses in the same layers, among no more blocks."""
        return (
            isinstance(other, SlimReplay)
            and (other._gamma, other._side is None) == (self._gamma, self._side is None)
            and other._active.keys() == self._sets.keys()
            and all(sets.hold(other._active[layer]) for layer, sets in self._sets.items())
        )

    def sit(self, seat: int, other: Replay | None, caches: Sequence[LayerCache], table: DecodeTable) -> None:
        """With the request's active sets."""
        super().sit(seat, other, caches, table)
        for layer, sets in self._sets.items():
            sets.take(seat, other._active[layer] if isinstance(other, SlimReplay) else None)

    def seated(self, table: DecodeTable) -> Sequence[Tensor]:
        """As in the base, and the active sets."""
        return [*super().seated(table), *(part for sets in self._sets.values() for part in sets.parts)]

    def rise(self, seat: int, other: Replay, table: DecodeTable) -> None:
        """Which blocks are active, and which were before the last step."""
        assert isinstance(other, SlimReplay)
        other._table = table.of(seat)
        for layer, sets in self._sets.items():
            sets.tell(seat, other._active[layer])

    def attend(self, layer: int, heads: Heads, table: DecodeTable) -> Tensor:
        """As `SlimReplay` does."""
        out = table.attend(layer, heads)
        if layer in self._sets:
            with nullcontext() if self._side is None else self._side.beside(heads.q):
                self._choose(self._sets[layer], layer, heads.q, table)
        return out

    def _choose(self, sets: ActiveSets, layer: int, q: Tensor, table: DecodeTable) -> None:
        from harness.engine.kernels.fetch import fetch_blocks

        source, apart = sets.rechoose(q, self._gamma), table.shape.layers
        fetch_blocks(source, sets.addresses, sets.state.units, table.rows, layer, sets.block, len(q), apart)

    def end_step(self) -> Overlap | None:
        """Blocks have come in."""
        return None if self._side is None else self._side.join()
