"""LazyLLM's decode in recorded pieces: where all tokens are, on the device, and how many have arrived, on the host.

A step is cut at the pruning points, where the device chooses among tokens. How many of them have to be revived only it
knows; the host waits for that one number, while the rest of the layer still runs, and replays the piece that fits.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Hashable, MutableMapping, Sequence
from functools import reduce
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.parallel import ALONE, Ranks
from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.recorded import ROW_COUNTS
from harness.engine.replay.replay import Replay
from harness.engine.replay.rows import RowAttention
from harness.engine.step import Heads, Rows
from methods.common.aux_cache import AuxCache
from methods.common.capacity import capacity

if TYPE_CHECKING:
    from harness.engine.kernels.revival import RevivalState


class Revival(Replay):
    """The device's account of one request's tokens, in memory that serves all requests it has room for.

    Segments are the layers between pruning points; the first one holds all tokens.

    Attributes:
        recomputed: tokens times layers that replayed steps computed for revival; the method sets it back.
    """

    def __init__(
        self, layers: Sequence[int], depth: int, aux: MutableMapping[int, AuxCache], ranks: Ranks = ALONE
    ) -> None:
        """
        Args:
            layers: the first one of each segment but the first.
            depth: layers of the model.
            aux: by layer, the hidden states that wait before pruning points; the method's own mapping, which changes
                with the request. They keep the memory, which `take` makes this object refer to.
            ranks: that choose together.
        """
        self._aux, self._ranks = aux, ranks
        self.cuts = self._starts = layers
        self._segments = [range(*ends) for ends in pairwise((0, *layers, depth))]
        self._memory: _Memory | None = None
        self._attention: RowAttention | None = None
        self._slots = torch.empty(0)
        self._moved = False
        self.recomputed = 0

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return 0 if self._memory is None else self._memory.nbytes

    def prepare(self, caches: Sequence[LayerCache], total: int, wanted: Sequence[Sequence[int]]) -> None:
        """Is told of the request whose steps are to be replayed.

        Args:
            caches: a layer each.
            total: tokens of the request, new ones included.
            wanted: for each of the next steps, how many tokens the pruning points choose.
        """
        held, device = self._memory, caches[0].keys.device
        room = capacity(total, held.room if held is not None else 0)
        if held is None or held.room != room:
            self._memory = _Memory(len(self._segments), room, device)
        self._wanted = wanted

    def key(self) -> Hashable:
        """Changes with the memory that revival is managed in."""
        return self._memory

    @property
    def _held(self) -> _Memory:
        assert self._memory is not None
        return self._memory

    def forget(self) -> None:
        """Nothing of the last request counts any more."""
        self._moved, self.recomputed = False, 0

    def settle(self) -> None:
        """Hidden states go to the Aux Caches before which their tokens wait since steps were replayed, if any were."""
        held = [aux.rows for aux in self._aux.values() if aux.rows is not None]
        if self._moved and held:
            rows = reduce(Rows.merged, held)
            depths = self._held.state.depths[rows.positions]
            for number, layer in enumerate(self._starts, 1):
                self._aux[layer] = AuxCache()
                self._aux[layer].put(rows.select((depths == number).nonzero().squeeze(1)))
        self._moved = False

    def take(self, caches: Sequence[LayerCache], *, rehearsal: bool) -> None:
        """Takes the request over as it is; for a rehearsal, a state in which new tokens go where there is room."""
        self.settle()
        if rehearsal:
            for cache in caches[self._starts[0] :]:
                # Each number of rows that a piece is recorded for chooses anew for the next one.
                cache.make_room(len(ROW_COUNTS) + 1)
            self._forget(caches)
            self._held.state.slots.zero_()
        else:
            self._forget(caches)
            self._load(caches)

    def _load(self, caches: Sequence[LayerCache]) -> None:
        state, device = self._held.state, self._held.device
        for number, layer in enumerate(self._starts, 1):
            positions = caches[layer].token_positions
            state.slots[number, positions] = torch.arange(len(positions), dtype=torch.int32, device=device)
            if (rows := self._aux[layer].rows) is not None:
                apart = rows.hidden.stride(0) * rows.hidden.element_size()
                state.depths[rows.positions] = number
                state.homes[rows.positions] = rows.hidden.data_ptr() + apart * torch.arange(len(rows), device=device)

    def _forget(self, caches: Sequence[LayerCache]) -> None:
        state, start = self._held.state, caches[0].length
        state.depths.fill_(len(self._segments))
        state.counts.zero_()
        state.lengths.copy_(torch.tensor([caches[layers.start].length for layers in self._segments]))
        chosen = torch.tensor(self._wanted, dtype=torch.int32).T
        state.wanted[1:, start : start + len(self._wanted)] = chosen.to(self._held.device)
        # These copies have waited for the device, so no older number is on its way any more.
        self._held.arriving.fill_(-1)

    def attend(self, layer: int, heads: Heads, table: DecodeTable) -> Tensor:
        """Stores the rows' keys and values and attends to the tokens chosen for the segment, by their positions."""
        self._attention = self._attention or RowAttention(table)
        segment, state = self._segment(layer), self._held.state
        if segment:
            tokens, seen = state.tokens[segment], state.counts[segment, :1]
            return self._attention.attend(layer, heads, self._slots, tokens, seen, table)
        if layer == 0:
            torch.add(heads.positions, 1, out=state.counts[0, 1:2])
        return self._attention.attend_all(layer, heads, table)

    def after_attention(self, layer: int, heads: Heads, table: DecodeTable, *, last: bool) -> None:
        """At the end of a segment: chooses for the next one, by the attention of the newest token, the last row.

        Ahead of the feed forward, so that the host learns how many rows come while the layer runs on.
        """
        if not last or layer + 1 not in self._starts:
            return
        assert self._attention is not None
        before, held = self._segment(layer), self._held
        tokens, count = held.state.tokens[before], held.state.counts[before, 1:2]
        self._attention.rate(layer, heads.q[-1], tokens, count, held.scores, table)
        self._ranks.mean(held.scores)
        held.kernels.choose(held.scores, held.state, before + 1)
        held.arriving[before + 1].copy_(held.state.counts[before + 1, 2], non_blocking=True)

    def enter(self, layer: int, rows: Rows, count: int, *, last: bool) -> Rows:
        """Revived rows, and the newest token's."""
        held, segment = self._held, self._segment(layer)
        hidden, positions, self._slots = held.kernels.enter(held.state, segment, rows.hidden, count, last=last)
        return Rows(hidden, positions)

    def after_layer(self, layer: int, rows: Rows, *, last: bool) -> None:
        """Behind a segment's last layer: puts the hidden states of revived rows back to where they were on hold."""
        segment, held = self._segment(layer), self._held
        if not segment or layer + 1 < self._segments[segment].stop:
            return
        if layer + 1 in self._starts:
            held.kernels.leave(held.state, rows.hidden, rows.positions, self._slots, last=last)
        if not last:
            held.state.counts[segment, :1] += len(rows)

    def arriving(self, layer: int, caches: Sequence[LayerCache], table: DecodeTable) -> int:
        """Waits for how many rows the segment that begins with a layer takes in, and makes room for them."""
        segment = self._segment(layer)
        layers, count = self._segments[segment], self._wait(segment)
        self.recomputed += (count - 1) * len(layers)
        moved = [caches[each].claim(count) for each in layers]
        if any(moved):
            table.move(layers, caches)
        return count

    def _wait(self, segment: int) -> int:
        held, idle = self._held, False
        while (count := int(held.told[segment])) < 0:
            assert not idle, "the device has no number of rows to tell"
            idle = held.device.type != "cuda" or torch.cuda.current_stream(held.device).query()
        held.told[segment] = -1
        return count

    def give_back(self, caches: Sequence[LayerCache], count: int, position: int) -> None:
        """Writes down the positions of tokens that came in, of those that were asked for: a step may have begun."""
        state, end = self._held.state, position + count
        for cache in caches[: self._starts[0]]:
            cache.extended(count, position)
        # What a step that was begun has chosen still waits: no layer behind the first cut has seen it.
        begun = state.slots[1, :end] >= caches[self._starts[0]].length
        state.depths[:end].masked_fill_(begun & (state.depths[:end] > 1), 1)
        self._moved = True
        for number, layers in enumerate(self._segments[1:], 1):
            has = (state.depths[:end] > number).nonzero().squeeze(1)
            slots = state.slots[number, has].long()
            for layer in layers:
                # Where memory ran out, not all layers have room for the last ones.
                there = slots < caches[layer].length
                caches[layer].token_positions[slots[there]] = has[there]

    def _segment(self, layer: int) -> int:
        return bisect(self._starts, layer)


class _Memory:
    """What stays at its address for all requests that fit.

    Attributes:
        room: tokens it has room for.
        state: where all tokens are.
        scores: [room] float32, of the tokens that a pruning point chooses from.
        arriving: [segments] int64, pinned: how many rows enter each, as the host learns it; -1 until it does.
        told: the same memory, as the host reads it soonest.
    """

    def __init__(self, segments: int, room: int, device: torch.device) -> None:
        from harness.engine.kernels import revival

        self.kernels, self.room, self.device = revival, room, device
        self.state: RevivalState = revival.RevivalState.empty(segments, room, device)
        self.state.tokens[0] = torch.arange(room, device=device)
        self.scores = torch.zeros(room, device=device)
        self.arriving = torch.zeros(segments, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.told = self.arriving.numpy()

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.state.nbytes + self.scores.nbytes
