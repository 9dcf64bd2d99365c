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
                self._fetch(layer, active.reselect(active.wanted(heads.q), self._gamma), table)
        return out

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
        fetch_blocks(source, active.addresses, active.units, table.rows, layer, active.block)
