"""One recorded step of several requests for whose methods there are no seats (`Replay.seats`).

They act one after the other, each on a table of its own; projections and feed forward are shared all the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.overlap import Overlap
from harness.engine.replay.replay import Replay
from harness.engine.step import Heads, Rows


class OneByOne(Replay):
    """Each request's own steps, side by side in one recording."""

    def __init__(self, members: Sequence[Replay]) -> None:
        """
        Args:
            members: of each request, without cuts.
        """
        self._members = list(members)
        self._tables: list[DecodeTable] = []

    def key(self) -> Hashable:
        """Changes with any member's."""
        return tuple(member.key() for member in self._members)

    def load(self, caches: Sequence[LayerCache], table: DecodeTable) -> None:
        """Each member's caches go into a table of its own."""
        if not self._tables:
            self._tables = [DecodeTable(table.shape, table.device) for _ in self._members]
        for member, own, each in self._each(caches):
            member.load(each, own)

    def take(self, caches: Sequence[LayerCache], *, rehearsal: bool) -> None:
        """As each member's."""
        for number, member in enumerate(self._members):
            member.take(self._own(caches, number), rehearsal=rehearsal)

    def undo(self, table: DecodeTable) -> None:
        """As each member's."""
        for member, own in zip(self._members, self._tables, strict=True):
            member.undo(own)

    def attend(self, layer: int, heads: Heads, table: DecodeTable) -> Tensor:
        """One row after the other: [batch, heads * head_dim]."""
        each = zip(self._members, heads.single(), self._tables, strict=True)
        return torch.cat([member.attend(layer, row, own) for member, row, own in each])

    def after_attention(self, layer: int, heads: Heads, table: DecodeTable, *, last: bool) -> None:
        """As each member's."""
        for member, row, own in zip(self._members, heads.single(), self._tables, strict=True):
            member.after_attention(layer, row, own, last=last)

    def after_layer(self, layer: int, rows: Rows, *, last: bool) -> None:
        """As each member's."""
        for member, row in zip(self._members, rows.single(), strict=True):
            member.after_layer(layer, row, last=last)

    def end_step(self) -> Overlap | None:
        """Every member's step is through."""
        # A recorded step holds marks that nobody reads, so they have to stay.
        self._marks = [member.end_step() for member in self._members]
        for own in self._tables:
            own.advance()
        return None

    def _each(self, caches: Sequence[LayerCache]) -> Iterator[tuple[Replay, DecodeTable, Sequence[LayerCache]]]:
        for number, (member, own) in enumerate(zip(self._members, self._tables, strict=True)):
            yield member, own, self._own(caches, number)

    def _own(self, caches: Sequence[LayerCache], number: int) -> Sequence[LayerCache]:
        """Of one of the requests, whose caches lie one request behind the other."""
        layers = len(caches) // len(self._members)
        return caches[number * layers : (number + 1) * layers]
