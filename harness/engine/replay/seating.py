"""Recorded decode steps of requests that have a seat each, so that they may come and go between any two steps.

A step is recorded for a number of requests, and for nobody in particular: while that is done there is nobody. All that
tells it whom it is for lies in memory, a row a seat. Seats are taken from the first on, and a step of so many requests
is one of the first so many seats; behind the last request there may be seats of nobody, whose keys and values go where
nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import torch

from harness.engine.cache import LayerCache
from harness.engine.engine import Engine
from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.recorded import RecordedDecode
from harness.engine.replay.replay import Replay


class Seated(NamedTuple):
    """A request at a seat.

    Attributes:
        replay: what does its steps alone.
        caches: a layer each, as they were when it sat down.
        position: of the token that came next then.
    """

    replay: Replay
    caches: Sequence[LayerCache]
    position: int

    def give_back(self, position: int) -> None:
        """Notes in the caches what was replayed until this position was next."""
        self.replay.give_back(self.caches, position - self.position, self.position)


class SeatedDecode(RecordedDecode):
    """A `RecordedDecode` without cuts whose object has seats; it is recorded when it is made."""

    def record(self, shared: Replay) -> None:
        """Runs the step, and records it; the object must stay as long as it is replayed."""
        self._shared = shared
        self._record(shared)

    def place(self, tokens: Sequence[int], positions: Sequence[int]) -> None:
        """The last token of the request at each seat, and where it comes in."""
        self._place(torch.tensor(tokens), positions)

    def step(self) -> list[int]:
        """The next token of each, once they are on the host."""
        self._pieces[0].replay(1)
        return self._fetch(0)()

    def run(self, count: int, give_back: Callable[[int], None]) -> Generator[list[int]]:
        """As `RecordedDecode.steps`, of all who are seated."""
        return self._steps(self._shared, (), count, give_back)


class Seating:
    """Seats, and the steps over them that were recorded.

    Attributes:
        count: seats.
    """

    def __init__(self, engine: Engine, shared: Replay, count: int) -> None:
        """
        Args:
            engine: around the model.
            shared: has so many seats.
            count: of seats.
        """
        self._engine, self._shared, self.count = engine, shared, count
        self._table = DecodeTable(engine.context.shape, engine.embed.weight.device, count)
        self._recorded: dict[int, SeatedDecode] = {}
        self._nobody = LayerCache(0)

    def serves(self, replays: Sequence[Replay]) -> bool:
        """Whether those may sit here whose steps these would do alone."""
        return len(replays) <= self.count and all(map(self._shared.serves, replays))

    def sit(self, seat: int, one: Seated) -> None:
        """A request takes a seat."""
        self._shared.sit(seat, one.replay, one.caches, self._table)

    def leave_empty(self, seats: range, steps: int) -> None:
        """Nobody sits there for so many steps."""
        caches = [self._room_for(steps)] * self._engine.context.shape.layers
        for seat in seats:
            self._shared.sit(seat, None, caches, self._table)

    def move(self, seat: int, into: int) -> None:
        """A request changes seats."""
        for state in self._shared.seated(self._table):
            state[into].copy_(state[seat])

    def rise(self, seat: int, one: Seated) -> None:
        """The request's own object goes on from where it is."""
        self._shared.rise(seat, one.replay, self._table)

    def steps(self, size: int) -> SeatedDecode:
        """The step of the first so many seats."""
        if size not in self._recorded:
            engine = self._engine
            self._recorded[size] = SeatedDecode(engine.embed, engine.verbs, self._table.first(size), ())
            self._record(size)
        return self._recorded[size]

    def _record(self, size: int) -> None:
        states = self._shared.seated(self._table)
        before = [state.clone() for state in states]
        self.leave_empty(range(size), _REHEARSED)
        self._recorded[size].record(self._shared)
        for state, was in zip(states, before, strict=True):
            state.copy_(was)

    def _room_for(self, steps: int) -> LayerCache:
        """A cache of a token that has room for so many steps and serves all layers of all who are not there."""
        shape, weight = self._engine.context.shape, self._engine.embed.weight
        if self._nobody.room < steps:
            self._nobody = LayerCache(steps)
            nothing = weight.new_zeros((1, shape.kv_heads, shape.head_dim))
            self._nobody.append(nothing, nothing, torch.zeros(1, dtype=torch.int64, device=weight.device))
        return self._nobody


_REHEARSED = 8
"""Steps that there is room for while one is recorded, which takes two."""


class Seatings:
    """All seats of one engine; requests of all methods whose steps do the same work take the same ones."""

    def __init__(self, engine: Engine) -> None:
        """
        Args:
            engine: around the model.
        """
        self._engine = engine
        self._made: list[Seating] = []

    def of(self, replays: Sequence[Replay], count: int) -> Seating | None:
        """So many seats for requests whose steps these would do alone; None where they do not fit together."""
        found = (one for one in self._made if one.count == count and one.serves(replays))
        return next(found, None) or self._make(replays, count)

    def _make(self, replays: Sequence[Replay], count: int) -> Seating | None:
        # Who needs most has an object made that serves all.
        made = (replay.seats(count) for replay in replays)
        fits = (shared for shared in made if shared is not None and all(map(shared.serves, replays)))
        shared = next(fits, None)
        if shared is None:
            return None
        self._made.append(Seating(self._engine, shared, count))
        return self._made[-1]
