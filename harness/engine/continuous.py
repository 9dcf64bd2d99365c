"""Requests that come and go between decode steps: continuous batching (Orca: Yu et al., OSDI 2022), prompts whole.

Who is there takes part in the next step. Steps are recorded for some numbers of requests; for a number between two of
them the greater one is replayed, with rows that stand for nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from harness.engine import promises
from harness.engine.batch import Batch, Ended, Slot
from harness.engine.engine import Engine
from harness.engine.method import Method
from harness.engine.replay.seating import Seated, SeatedDecode, Seating, Seatings
from harness.engine.request import Request


def sizes(most: int) -> Iterator[int]:
    """Numbers of requests that steps are recorded for, up to `most`: at most a fifth of their rows is padding."""
    size = 1
    while size < most:
        yield size
        size += max(1, size // 4)
    yield most


class Continuous(Batch):
    """A batch that requests join and leave between steps.

    Steps are replayed where there are seats for all methods' requests; otherwise every kernel is launched anew.

    Attributes:
        slots: the requests that are there, in the order in which they came.
    """

    def __init__(self, engine: Engine, methods: Sequence[Method], seatings: Seatings) -> None:
        """
        Args:
            engine: around the model.
            methods: an instance for each request that may be there at once.
            seatings: of the engine.
        """
        super().__init__(engine, methods, seatings)
        self._seating: Seating | None = None
        self._seated: list[tuple[Slot, Seated]] = []
        # Whether those who are there may fit together, as far as is known.
        self._seatable = True
        self._stepped: SeatedDecode | None = None

    @property
    def places(self) -> int:
        """Requests that may join now."""
        return len(self._methods) - len(self.slots)

    @property
    def replayed(self) -> bool:
        """Whether the last step was replayed."""
        return self._stepped is not None

    def join(self, request: Request, ended: Ended | None = None) -> Slot:
        """Prefills one request more, for which there is a place; returns it with its first token.

        Args:
            request: what is asked.
            ended: see `Slot`.

        Raises:
            InputError, BrokenPromise: as `read`.
        """
        self._change()
        # Instances that serve a request come first.
        return self.add(request, request.max_new_tokens, ended)

    def _change(self) -> None:
        """Others are there than in the last step."""
        self._stepped, self._seatable = None, True

    @torch.inference_mode()
    def settle(self, slot: Slot) -> None:
        """Lets a request's method know what was replayed; nothing may be replayed of it then."""
        for seat, (who, one) in enumerate(self._seated):
            if who is slot and self._seating is not None and slot.position > one.position:
                self._seating.rise(seat, one)
                one.give_back(slot.position)

    @torch.inference_mode()
    def leave(self, slot: Slot) -> None:
        """Frees a request's keys and values, and its place."""
        self._change()
        self._stand_up(slot)
        slot.method.end()
        self.slots.remove(slot)
        self._methods = [*(method for method in self._methods if method is not slot.method), slot.method]

    def end(self) -> None:
        """All leave."""
        try:
            super().end()
        finally:
            self.slots, self._seated = [], []
            self._change()

    @torch.inference_mode()
    def step(self) -> list[Slot]:
        """One token of each, of whom none is done; returns them.

        Raises:
            BrokenPromise: a hook of a method returned what the engine cannot go on with.
        """
        live = list(self.slots)
        self._stepped = self._stepped or self._begun(len(live))
        if self._stepped is None:
            self._step(live)
            return live
        for (slot, _), token in zip(self._seated, self._stepped.step(), strict=False):  # behind them there is nobody
            slot.position += 1
            slot.take(token)
        return live

    @torch.inference_mode()
    def record(self) -> None:
        """Records the steps of every size that those who are there would take part in, beside others of their kind."""
        if self._all_sit() and self._seating is not None:
            for size in sizes(len(self._methods)):
                self._seating.steps(size)

    def _begun(self, count: int) -> SeatedDecode | None:
        """What replays steps of those who are there, so many; None where they are launched anew."""
        if any(slot.suppressed for slot in self.slots) or not self._all_sit() or self._seating is None:
            self._all_rise()
            return None
        size = next(each for each in sizes(len(self._methods)) if each >= count)
        stepped, empty = self._seating.steps(size), size - count
        self._seating.leave_empty(range(count, size), max(slot.left for slot in self.slots))
        there = [slot for slot, _ in self._seated]
        stepped.place(
            [slot.tokens[-1] for slot in there] + [0] * empty, [slot.position for slot in there] + [0] * empty
        )
        return stepped

    def _all_sit(self) -> bool:
        """Whether all who are there have a seat now; where some do not fit beside those who sit already, anew."""
        if not self._seatable:
            return False
        known = [slot for slot, _ in self._seated]
        if self._sit_down([slot for slot in self.slots if slot not in known]):
            return True
        self._all_rise()
        self._seatable = self._sit_down(self.slots)
        return self._seatable

    def _sit_down(self, slots: Sequence[Slot]) -> bool:
        """Seats these beside those who sit, if there are seats for all of them."""
        looked_up = [self._looked_up(slot) for slot in slots]
        new = [one for one in looked_up if one is not None]
        replays = [one.replay for one in [*(one for _, one in self._seated), *new]]
        if len(new) < len(slots):
            return False
        if not self._seated:
            self._seating = self._seatings.of(replays, len(self._methods))
        if self._seating is None or not self._seating.serves(replays):
            return False
        for pair in zip(slots, new, strict=True):
            self._seating.sit(len(self._seated), pair[1])
            self._seated.append(pair)
        return True

    def _looked_up(self, slot: Slot) -> Seated | None:
        caches = slot.method.cache
        if self._engine.table is None or not all(each.length > 0 and each.room >= slot.left for each in caches):
            return None
        replay = promises.replay(slot.method.replay())
        return None if replay is None or replay.cuts else Seated(replay, caches, slot.position)

    def _stand_up(self, slot: Slot) -> None:
        """The last one who sits takes the seat."""
        seat = next((seat for seat, (who, _) in enumerate(self._seated) if who is slot), None)
        if seat is None or self._seating is None:
            return
        last = self._seated.pop()
        if seat < len(self._seated):
            self._seating.move(len(self._seated), seat)
            self._seated[seat] = last

    def _all_rise(self) -> None:
        """Notes in the caches what was replayed: the next step is launched anew, or from other seats."""
        for slot, _ in self._seated:
            self.settle(slot)
        self._seated = []
