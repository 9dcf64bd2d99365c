"""Requests that come and go between decode steps: continuous batching (Orca: Yu et al., OSDI 2022), prompts whole.

Who is there takes part in the next step. Steps are recorded for some numbers of requests; for a number between two of
them the greater one is replayed, with rows that stand for nobody, whose keys and values go where nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.engine import promises
from harness.engine.batch import Batch, Ended, Slot
from harness.engine.cache import LayerCache
from harness.engine.engine import Engine
from harness.engine.method import Method
from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.replay import Replay
from harness.engine.replay.stepped import LAID, Laid, LaidRagged, SteppedDecode, laid
from harness.engine.request import Request


def sizes(most: int) -> Iterator[int]:
    """Numbers of requests that steps are recorded for, up to `most`: at most a fifth of their rows is padding."""
    size = 1
    while size < most:
        yield size
        size += max(1, size // 4)
    yield most


class Recordings:
    """The recorded steps of one engine; all methods whose steps do the same work share them."""

    def __init__(self, engine: Engine) -> None:
        """
        Args:
            engine: around the model.
        """
        self._engine = engine
        self._recorded: dict[tuple[type[Replay], int], tuple[Laid | LaidRagged, SteppedDecode]] = {}
        self._nobody = LayerCache(0)

    def of(self, kind: type[Replay], size: int) -> tuple[Laid | LaidRagged, SteppedDecode]:
        """What does steps of a kind in `LAID` for so many requests."""
        if (kind, size) not in self._recorded:
            engine = self._engine
            table = DecodeTable(engine.context.shape, engine.embed.weight.device, size)
            self._recorded[kind, size] = LAID[kind](), SteppedDecode(engine.embed, engine.verbs, table, ())
        return self._recorded[kind, size]

    def nobody(self, replay: Replay, steps: int) -> Tensor:
        """As `laid`, of a row that stands for nobody: a cache that has room for so many steps and serves all layers."""
        shape, weight = self._engine.context.shape, self._engine.embed.weight
        if self._nobody.room < steps:
            self._nobody = LayerCache(steps)
            nothing = weight.new_zeros((1, shape.kv_heads, shape.head_dim))
            self._nobody.append(nothing, nothing, torch.zeros(1, dtype=torch.int64, device=weight.device))
        return laid(replay, [self._nobody] * shape.layers)


@dataclass(frozen=True)
class _Addresses:
    """Where a request's keys and values lie, as they were when it was at a position."""

    replay: Replay
    position: int
    rows: Tensor

    def at(self, position: int) -> Tensor:
        """The same now: every step has added a token."""
        now = self.rows.clone()
        now[..., 2] += position - self.position
        return now


class Continuous(Batch):
    """A batch that requests join and leave between steps.

    Steps are replayed where all methods' attention can share a launch; otherwise every kernel is launched anew.

    Attributes:
        slots: the requests that are there, in the order in which they came.
    """

    def __init__(self, engine: Engine, methods: Sequence[Method], recordings: Recordings) -> None:
        """
        Args:
            engine: around the model.
            methods: an instance for each request that may be there at once.
            recordings: of the engine.
        """
        super().__init__(engine, methods)
        self._recordings_of = recordings
        self._addresses: dict[Slot, _Addresses | None] = {}
        self._stepped: SteppedDecode | None = None

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
        self._stepped = None
        # Instances that serve a request come first.
        return self.add(request, request.max_new_tokens, ended)

    def leave(self, slot: Slot) -> None:
        """Frees a request's keys and values, and its place."""
        self._stepped = None
        slot.method.end()
        self._addresses.pop(slot, None)
        self.slots.remove(slot)
        self._methods = [*(method for method in self._methods if method is not slot.method), slot.method]

    def end(self) -> None:
        """All leave."""
        try:
            super().end()
        finally:
            self.slots, self._addresses, self._stepped = [], {}, None

    @torch.inference_mode()
    def step(self) -> list[Slot]:
        """One token of each, of whom none is done; returns them.

        Raises:
            BrokenPromise: a hook of a method returned what the engine cannot go on with.
        """
        live = list(self.slots)
        self._stepped = self._stepped or self._gathered(len(live))
        if self._stepped is None:
            self._step(live)
            return live
        for slot, token in zip(live, self._stepped.step(), strict=False):  # behind them there may be nobody's
            slot.position += 1
            slot.take(token)
        return live

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Records the steps of every size, and runs each once, over the requests that are there.

        These stay where they are: what a step stores behind their last tokens the next one stores again.
        """
        for size in sizes(len(self._methods)):
            stepped = self._gathered(size) if size >= len(self.slots) else None
            if stepped is not None:
                stepped.step()
        self._stepped = None

    def _gathered(self, size: int) -> SteppedDecode | None:
        """What replays steps of those who are there, of at least so many rows; None where they are launched anew."""
        found = [self._where(slot) for slot in self.slots]
        there = [one for one in found if one is not None]
        kinds = {type(one.replay) for one in there}
        if len(there) < len(found) or len(kinds) > 1 or any(slot.suppressed for slot in self.slots):
            self._settle()
            return None
        return self._begun(kinds.pop(), there, next(each for each in sizes(len(self._methods)) if each >= size))

    def _where(self, slot: Slot) -> _Addresses | None:
        if slot not in self._addresses:
            self._addresses[slot] = self._looked_up(slot)
        return self._addresses[slot]

    def _looked_up(self, slot: Slot) -> _Addresses | None:
        caches = slot.method.cache
        if self._engine.table is None or not all(each.length > 0 and each.room >= slot.left for each in caches):
            return None
        replay = promises.replay(slot.method.replay())
        if replay is None or type(replay) not in LAID:
            return None
        return _Addresses(replay, slot.position, laid(replay, caches))

    def _begun(self, kind: type[Replay], there: Sequence[_Addresses], size: int) -> SteppedDecode:
        shared, stepped = self._recordings_of.of(kind, size)
        rows = [one.at(slot.position) for one, slot in zip(there, self.slots, strict=True)]
        empty = size - len(rows)
        rows += [self._recordings_of.nobody(shared, max(slot.left for slot in self.slots))] * empty
        shared.rows = torch.stack(rows, 1).flatten(0, 1)
        tokens, positions = [slot.tokens[-1] for slot in self.slots], [slot.position for slot in self.slots]
        stepped.begin(shared, tokens + [0] * empty, positions + [0] * empty)
        return stepped

    def _settle(self) -> None:
        """Notes in the caches what was replayed: the next step is launched anew, and reads them, and so do look-ups."""
        there = {slot: one for slot, one in self._addresses.items() if one is not None}
        for slot, one in there.items():
            del self._addresses[slot]
            if slot.position > one.position:
                one.replay.give_back(slot.method.cache, slot.position - one.position, one.position)
