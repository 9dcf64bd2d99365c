"""LazyLLM's decode in recorded pieces: where all tokens are, on the device, and how many have arrived, on the host.

A step is cut at the pruning points, where the device chooses among tokens. How many of them have to be revived only it
knows; the host waits for that one number, while the rest of the layer still runs, and replays the piece that fits.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.replay.decode_table import ResidentCaches
from harness.engine.replay.graphs import ROW_COUNTS
from harness.engine.step import Heads, Rows
from methods.common.aux_cache import AuxCache


class Revival:
    """The device's account of one request's tokens, in memory that serves all requests it has room for.

    Segments are the layers between pruning points; the first one holds all tokens.

    Attributes:
        room: tokens it has room for.
        recomputed: tokens times layers that replayed steps computed for revival.
    """

    def __init__(self, layers: Sequence[int], depth: int, room: int, device: torch.device) -> None:
        """
        Args:
            layers: the first one of each segment but the first.
            depth: layers of the model.
            room: tokens of a request, new ones included.
            device: of the model.
        """
        from harness.engine.kernels import revival

        self._kernels, self.room, self.recomputed = revival, room, 0
        self._segments = [range(*ends) for ends in pairwise((0, *layers, depth))]
        self._starts = layers
        self._state = revival.RevivalState.empty(len(self._segments), room, device)
        self._state.tokens[0] = torch.arange(room, device=device)
        self._scores = torch.zeros(room, device=device)
        self._slots = torch.empty(0)
        self._arriving = torch.zeros(len(self._segments), dtype=torch.int64, pin_memory=device.type == "cuda")

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._state.nbytes + self._scores.nbytes

    def load(
        self, caches: Sequence[LayerCache], aux: Mapping[int, AuxCache], start: int, wanted: Sequence[Sequence[int]]
    ) -> None:
        """Takes the request over as it is: its caches, and the hidden states that wait before pruning points.

        Args:
            caches: a layer each.
            aux: by layer. They keep the memory, which from now on is only referred to here.
            start: position of the next token.
            wanted: for each of the next steps, how many tokens the pruning points choose.
        """
        self._forget(caches, start, wanted)
        state, device = self._state, self._state.depths.device
        for number, layer in enumerate(self._starts, 1):
            positions = caches[layer].positions
            state.slots[number, positions] = torch.arange(len(positions), dtype=torch.int32, device=device)
            if (rows := aux[layer].rows) is not None:
                apart = rows.hidden.stride(0) * rows.hidden.element_size()
                state.depths[rows.positions] = number
                state.homes[rows.positions] = rows.hidden.data_ptr() + apart * torch.arange(len(rows), device=device)

    def rehearse(self, caches: Sequence[LayerCache], start: int, wanted: Sequence[Sequence[int]]) -> None:
        """A state in which steps may run only to be recorded: nothing waits, and new tokens go where there is room.

        The arguments are those of `load`.
        """
        for cache in caches[self._starts[0] :]:
            # Each number of rows that a piece is recorded for chooses anew for the next one.
            cache.make_room(len(ROW_COUNTS) + 1)
        self._forget(caches, start, wanted)
        self._state.slots.zero_()

    def _forget(self, caches: Sequence[LayerCache], start: int, wanted: Sequence[Sequence[int]]) -> None:
        state, self.recomputed = self._state, 0
        state.depths.fill_(len(self._segments))
        state.counts.zero_()
        state.lengths.copy_(torch.tensor([caches[layers.start].length for layers in self._segments]))
        chosen = torch.tensor(wanted, dtype=torch.int32).T
        state.wanted[1:, start : start + len(wanted)] = chosen.to(state.wanted.device)
        # These copies have waited for the device, so no older number is on its way any more.
        self._arriving.fill_(-1)

    def attend(self, layer: int, heads: Heads, resident: ResidentCaches) -> Tensor:
        """Stores the rows' keys and values and attends to the tokens chosen for the segment, by their positions."""
        segment, state = self._segment(layer), self._state
        if segment:
            return resident.attend_rows(layer, heads, self._slots, state.tokens[segment], state.counts[segment, :1])
        if layer == 0:
            torch.add(heads.positions, 1, out=state.counts[0, 1:2])
        return resident.attend(layer, heads)

    def choose(self, layer: int, heads: Heads, resident: ResidentCaches) -> None:
        """At the end of a segment: chooses for the next one, by the attention of the newest token, the last row."""
        before, state = self._segment(layer), self._state
        tokens, count = state.tokens[before], state.counts[before, 1:2]
        resident.token_scores(layer, heads.q[-1], tokens, count, self._scores)
        self._kernels.choose(self._scores, state, before + 1)
        self._arriving[before + 1].copy_(state.counts[before + 1, 2], non_blocking=True)

    def enter(self, layer: int, rows: Rows, count: int, last: bool) -> Rows:
        """The next `count` rows that arrive before a layer; `last` as in `harness.engine.kernels.revival.enter`."""
        segment = self._segment(layer)
        hidden, positions, self._slots = self._kernels.enter(self._state, segment, rows.hidden, count, last=last)
        return Rows(hidden, positions)

    def leave(self, layer: int, rows: Rows, last: bool) -> None:
        """Behind a segment's last layer: puts the hidden states of revived rows back to where they were on hold."""
        segment = self._segment(layer)
        if not segment or layer + 1 < self._segments[segment].stop:
            return
        if layer + 1 in self._starts:
            self._kernels.leave(self._state, rows.hidden, rows.positions, self._slots, last=last)
        if not last:
            self._state.counts[segment, :1] += len(rows)

    def arriving(self, layer: int, caches: Sequence[LayerCache], resident: ResidentCaches) -> int:
        """Waits for how many rows the segment that begins with a layer takes in, and makes room for them."""
        segment = self._segment(layer)
        layers, count = self._segments[segment], self._wait(segment)
        self.recomputed += (count - 1) * len(layers)
        moved = [caches[each].claim(count) for each in layers]
        if any(moved):
            resident.move(layers, caches)
        return count

    def _wait(self, segment: int) -> int:
        device, idle = self._state.depths.device, False
        while (count := int(self._arriving[segment])) < 0:
            assert not idle, "the device has no number of rows to tell"
            idle = device.type != "cuda" or torch.cuda.current_stream(device).query()
        self._arriving[segment] = -1
        return count

    def settle(self, caches: Sequence[LayerCache], end: int) -> None:
        """Writes down the positions of tokens that came in, of those before `end`: another step may have begun."""
        for number, layers in enumerate(self._segments[1:], 1):
            has = (self._state.depths[:end] > number).nonzero().squeeze(1)
            slots = self._state.slots[number, has].long()
            for layer in layers:
                # Where memory ran out, not all layers have room for the last ones.
                there = slots < caches[layer].length
                caches[layer].positions[slots[there]] = has[there]

    def _segment(self, layer: int) -> int:
        return bisect(self._starts, layer)
