"""Several requests at once: prefilled one after the other, decoded together, each with a cache of its own.

A decode step reads all weights once whatever the number of rows, so requests share that; what each reads for itself is
its own keys and values, which is where pruning methods differ. Requests have any length: a row is a token of one
request, at that request's position. Answers are those that each request would get alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from harness.engine import promises
from harness.engine.engine import Engine
from harness.engine.generation import Work
from harness.engine.method import Method
from harness.engine.promises import BrokenPromise
from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.recorded import RecordedDecode
from harness.engine.replay.replay import Replay
from harness.engine.replay.seating import Seated, Seatings
from harness.engine.replay.together import OneByOne
from harness.engine.request import Request
from harness.engine.step import Heads, Rows, Step

Ended = Callable[[Sequence[int]], bool]
"""Whether an answer is complete, by its tokens so far."""


@dataclass(eq=False)
class Slot:
    """A request on its way, and the method instance that is its alone.

    Attributes:
        method: which tokens are kept.
        request: what is asked.
        position: of the token that comes in next.
        tokens: new ones so far, each once it is on the host.
        done: whether the answer is complete: by a stop token, its greatest length, or `ended`.
        ended: asked behind each token.
        work: what its prefill computed.
    """

    method: Method
    request: Request
    position: int
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    ended: Ended | None = None
    work: Work = field(default_factory=Work)

    @property
    def left(self) -> int:
        """New tokens that may still come."""
        return self.request.max_new_tokens - len(self.tokens)

    @property
    def suppressed(self) -> frozenset[int]:
        """Tokens that may not come next; none once the answer is complete."""
        return frozenset() if self.done else self.request.suppressed(len(self.tokens) + 1)

    def take(self, token: int) -> None:
        """The next token is there."""
        self.tokens.append(token)
        ended = self.ended is not None and self.ended(self.tokens)
        self.done = ended or not self.left or token in self.request.stop_ids


class Batch:
    """Runs requests of one model together, greedily.

    Attributes:
        slots: the requests of the current batch.
    """

    def __init__(self, engine: Engine, methods: Sequence[Method], seatings: Seatings | None = None) -> None:
        """
        Args:
            engine: around the model.
            methods: an instance for each request, so as many as requests can be there at once.
            seatings: of the engine; of the batch alone where there are none.

        Raises:
            ValueError: one instance is to serve two requests at once.
        """
        if len({id(method) for method in methods}) < len(methods):
            raise ValueError("requests that are there at once need a method instance each")
        self._engine, self._methods = engine, methods
        self._seatings = Seatings(engine) if seatings is None else seatings
        self._recordings: dict[Hashable, tuple[Replay, RecordedDecode]] = {}
        self._replays_now: RecordedDecode | None = None
        self.slots: list[Slot] = []

    def read(self, requests: Sequence[Request], ended: Sequence[Ended | None] = ()) -> Generator[Slot]:
        """Prefills a new batch, one request after the other; each is handed out with its first token.

        Args:
            requests: as many as there are methods, or fewer.
            ended: of each, see `Slot`; nobody asks where there are none.

        Raises:
            InputError: as `Engine.read`.
            BrokenPromise: a hook of a method returned what the engine cannot go on with.
        """
        self.end()
        # A request that is done may be stepped on until the last one is: there has to be room for that.
        room = max(request.max_new_tokens for request in requests)
        for number, request in enumerate(requests):
            yield self.add(request, room, ended[number] if ended else None)

    @torch.inference_mode()
    def add(self, request: Request, room: int, ended: Ended | None = None) -> Slot:
        """Prefills one request more, ahead of the batch's first step; returns it with its first token.

        Args:
            request: what is asked.
            room: most new tokens of any request of the batch.
            ended: see `Slot`.

        Raises:
            InputError, BrokenPromise: as `read`.
        """
        method, work = self._methods[len(self.slots)], Work()
        logits, position = self._engine.read(method, replace(request, max_new_tokens=room), work)
        slot = Slot(method, request, position, ended=ended, work=work)
        slot.take(_greedy(logits.unsqueeze(0), [slot])[0])
        self.slots.append(slot)
        return slot

    @torch.inference_mode()
    def steps(self) -> Generator[list[Slot]]:
        """Decodes until all answers are complete; hands out, behind each step, the slots that got a token.

        Steps are replayed where the engine replays them and the methods' steps can be recorded.

        Raises:
            BrokenPromise: a hook of a method returned what the engine cannot go on with.
        """
        while live := [slot for slot in self.slots if not slot.done]:
            if (replays := self._replays()) is not None:
                yield from self._replayed(replays)
                return
            self._step(live)
            yield live

    @torch.inference_mode()
    def rehearse(self, requests: Sequence[Request]) -> None:
        """Prefills and a step as such a batch has them, unasked, so that nothing is recorded when it is asked.

        Where there are seats, a request of each length stands for all, and memory is taken and given back for the
        rest. Not where methods keep memory of the host, which takes long to get: that is of each instance.

        Raises:
            InputError, BrokenPromise: as `read`.
        """
        list(self.read(list({len(request.prompt): request for request in requests}.values())))
        replays = self._replays()
        seating = None if replays is None else self._seatings.of(replays, len(requests))
        methods = [slot.method for slot in self.slots]
        if seating is not None and not any(method.kv_bytes_host() for method in methods):
            seating.steps(len(requests))
            each = max(method.kv_bytes() + method.extra_bytes() for method in methods)
            torch.empty(each * (len(requests) - len(methods)), dtype=torch.uint8, device=requests[0].prompt.device)
        else:
            list(self.read(requests))
            with closing(self.steps()) as steps:
                next(steps, None)

    def end(self) -> None:
        """Frees the batch's keys and values."""
        for slot in self.slots:
            slot.method.end()
        self.slots, self._replays_now = [], None

    def overlap(self) -> dict[str, float] | None:
        """As `Overlap.read`, of the batch's last step; None where nothing runs beside it or it was not replayed."""
        overlap = None if self._replays_now is None else self._replays_now.overlap
        return None if overlap is None else overlap.read()

    def _step(self, live: Sequence[Slot]) -> None:
        """One token of each, through hooks that see one request at a time."""
        device = self._engine.embed.weight.device
        ids = torch.tensor([slot.tokens[-1] for slot in live], device=device)
        positions = torch.tensor([slot.position for slot in live], device=device)
        logits = self._engine.verbs.all_logits(self._through(live, Rows(self._engine.embed(ids), positions)))
        for slot, token in zip(live, _greedy(logits, live), strict=True):
            slot.position += 1
            slot.take(token)

    def _through(self, live: Sequence[Slot], rows: Rows) -> Rows:
        verbs, steps = self._engine.verbs, [Step("decode", slot.position, 1) for slot in live]
        for layer in range(len(self._engine.layers)):
            heads = list(verbs.project(layer, rows).single())
            attended = [
                promises.attended(slot.method.attend(layer, own, step), layer, own)
                for slot, own, step in zip(live, heads, steps, strict=True)
            ]
            rows = rows.with_attended(torch.cat(attended))
            rows = _hooked("after_attention", layer, rows, live, heads, steps)
            rows = _hooked("after_layer", layer, verbs.feed_forward(layer, rows), live, heads, steps)
        return rows

    def _replays(self) -> list[Replay] | None:
        """What replays the steps of every slot, complete or not, if all of them may be replayed together."""
        if self._engine.table is None or any(slot.suppressed for slot in self.slots):
            return None
        count, found = self._count(), []
        for slot in self.slots:
            fits = all(cache.length > 0 and cache.room >= count for cache in slot.method.cache)
            replay = promises.replay(slot.method.replay()) if fits else None
            if replay is None or replay.cuts:
                return None
            found.append(replay)
        return found

    def _count(self) -> int:
        """Steps until the last answer is complete, at most."""
        return max(slot.left for slot in self.slots if not slot.done)

    def _replayed(self, replays: Sequence[Replay]) -> Iterator[list[Slot]]:
        pairs = zip(self.slots, replays, strict=True)
        each = [Seated(replay, slot.method.cache, slot.position) for slot, replay in pairs]
        with closing(self._from_seats(each) or self._side_by_side(each)) as steps:
            for tokens in steps:
                live = [(slot, token) for slot, token in zip(self.slots, tokens, strict=True) if not slot.done]
                for slot, new in live:
                    slot.take(new)
                yield [slot for slot, _ in live]
                if all(slot.done for slot in self.slots):
                    return

    def _from_seats(self, each: Sequence[Seated]) -> Generator[list[int]] | None:
        """Tokens of steps in which every request has a seat; None where there are no seats for all of them."""
        seating = self._seatings.of([one.replay for one in each], len(each))
        if seating is None:
            return None
        self._replays_now = steps = seating.steps(len(each))
        for seat, one in enumerate(each):
            seating.sit(seat, one)
        steps.place([slot.tokens[-1] for slot in self.slots], [one.position for one in each])

        def give_back(count: int) -> None:
            for seat, one in enumerate(each):
                seating.rise(seat, one)
            self._give_back(each, count)

        return steps.run(self._count(), give_back)

    def _side_by_side(self, each: Sequence[Seated]) -> Generator[list[int]]:
        """Tokens of steps that are recorded for these very methods."""
        replays = [one.replay for one in each]
        shared, recorded = self._recorded(replays)
        self._replays_now = recorded
        caches = [cache for one in each for cache in one.caches]
        token = torch.tensor([slot.tokens[-1] for slot in self.slots])
        positions = [one.position for one in each]
        return recorded.steps(shared, caches, token, positions, self._count(), partial(self._give_back, each))

    def _give_back(self, each: Sequence[Seated], count: int) -> None:
        for slot, one in zip(self.slots, each, strict=True):
            slot.position = one.position + count
            one.give_back(slot.position)

    def _recorded(self, replays: Sequence[Replay]) -> tuple[Replay, RecordedDecode]:
        key = tuple(map(id, replays))
        if key not in self._recordings:
            engine = self._engine
            table = DecodeTable(engine.context.shape, engine.embed.weight.device, len(replays))
            recorded = RecordedDecode(engine.embed, engine.verbs, table, ())
            self._recordings[key] = (OneByOne(replays), recorded)
        return self._recordings[key]


def _greedy(logits: Tensor, slots: Sequence[Slot]) -> list[int]:
    """The likeliest token of each row that may come next."""
    for row, slot in zip(logits, slots, strict=True):
        if slot.suppressed:
            row[list(slot.suppressed)] = -torch.inf
    tokens: list[int] = logits.argmax(1).tolist()
    return tokens


def _hooked(
    hook: str, layer: int, rows: Rows, slots: Sequence[Slot], heads: Sequence[Heads], steps: Sequence[Step]
) -> Rows:
    """The rows as a hook of each request's method leaves its own one."""
    before = list(rows.single())
    each = zip(slots, before, heads, steps, strict=True)
    after = [_kept(hook, layer, row, getattr(slot.method, hook)(layer, row, *own)) for slot, row, *own in each]
    if all(new is old for new, old in zip(after, before, strict=True)):
        return rows
    changed = Rows(torch.cat([row.hidden for row in after]), rows.positions)
    attended = [row.attended for row in after if row.attended is not None]
    return changed.with_attended(torch.cat(attended)) if attended else changed


def _kept(hook: str, layer: int, before: Rows, after: Rows) -> Rows:
    row = promises.rows(hook, after, layer, before)
    if len(row) != 1:
        raise BrokenPromise(
            hook, f"returned {len(row)} rows for a new token; requests that are decoded together keep one each", layer
        )
    return row
