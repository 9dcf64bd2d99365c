"""Queues on a clock that only the work moves: a prefill takes 1 second, a decode step a tenth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from harness.conformance.tiny import random_ids, tiny_engine
from harness.engine.batch import Ended, Slot
from harness.engine.continuous import Continuous
from harness.engine.replay.seating import Seatings
from harness.engine.request import Request
from harness.measuring.arrivals import Arriving, Visit, WallClock, serve
from harness.measuring.clock import Measured
from harness.runner.catalog import parse_methods


class FakeClock:
    """Moved by hand; what happens while it is stopped takes no time."""

    def __init__(self) -> None:
        self.seconds, self.waits, self._still = 0.0, list[float](), False

    def now(self) -> float:
        return self.seconds

    def wait(self, until: float) -> None:
        assert until > self.seconds, "there is something to do"
        self.waits.append(until)
        self.seconds = until

    def move(self, seconds: float) -> None:
        if not self._still:
            self.seconds = round(self.seconds + seconds, 6)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self._still = True
        yield
        self._still = False


class Paced(Continuous):
    """Takes its time."""

    clock: FakeClock

    def join(self, request: Request, ended: Ended | None = None) -> Slot:
        self.clock.move(1.0)
        return super().join(request, ended)

    def step(self) -> list[Slot]:
        self.clock.move(0.1)
        return super().step()


Left = list[tuple[Visit, Measured]]


def served(arrivals: Sequence[float], tokens: Sequence[int], places: int) -> tuple[Left, FakeClock]:
    """What was noted of requests of so many new tokens, in the order in which they left."""
    engine, clock = tiny_engine(layers=1), FakeClock()
    (full,) = parse_methods("full")
    batch = Paced(engine, [full.build(engine.context) for _ in range(places)], Seatings(engine))
    batch.clock = clock
    coming = [
        Arriving(second, Request(random_ids(20, number), count))
        for number, (second, count) in enumerate(zip(arrivals, tokens, strict=True))
    ]
    left: Left = []

    def leaves(visit: Visit, measured: Measured) -> None:
        clock.move(50.0)  # what is noted takes long, and no time
        assert visit.slot.method.kv_bytes() > 0
        left.append((visit, measured))

    serve(batch, coming, clock, leaves)
    assert batch.places == places and len(left) == len(coming)
    return left, clock


def test_alone_a_request_waits_for_nobody() -> None:
    ((visit, measured),), clock = served([2.0], [4], 1)
    assert clock.waits == [2.0] and visit.arrived == visit.start == 2.0
    assert visit.tokens == [3.0, 3.1, 3.2, 3.3] and visit.sizes == [1, 1, 1]
    assert measured.ttft_s == 1.0 and measured.e2e_s == pytest.approx(1.3)
    assert measured.token_s == pytest.approx([0.1] * 3) and len(measured.tokens) == 4


def test_one_who_comes_later_is_prefilled_between_two_steps() -> None:
    left, _ = served([0.0, 1.15], [5, 3], 2)
    (first, early), (second, late) = sorted(left, key=lambda one: one[0].number)
    # Two steps of the first one alone; then it waits for the other one's prefill, and they go on together.
    assert first.tokens == pytest.approx([1.0, 1.1, 1.2, 2.3, 2.4]) and first.sizes == [1, 1, 2, 2]
    assert second.start == 1.2 and second.tokens == pytest.approx([2.2, 2.3, 2.4]) and second.sizes == [2, 2]
    assert late.ttft_s == pytest.approx(1.0) and max(early.token_s) == pytest.approx(1.1)


def test_without_a_place_they_wait_in_their_order_and_the_place_is_taken_at_once() -> None:
    left, _ = served([0.0, 0.1, 0.2], [3, 2, 2], 1)
    assert [visit.number for visit, _ in left] == [0, 1, 2]
    assert [visit.start for visit, _ in left] == pytest.approx([0.0, 1.2, 2.3])
    assert [visit.start - visit.arrived for visit, _ in left] == pytest.approx([0.0, 1.1, 2.1])
    assert {size for visit, _ in left for size in visit.sizes} == {1}


def test_who_is_done_leaves_and_the_others_go_on() -> None:
    left, clock = served([0.0, 0.0, 0.0], [2, 6, 3], 2)
    assert [visit.number for visit, _ in left] == [0, 2, 1]
    by_number = {visit.number: visit for visit, _ in left}
    # The third one gets the place of the first, behind the only step of that.
    assert by_number[0].tokens[-1] == by_number[2].start == 2.1
    assert by_number[1].sizes == [2, 2, 2, 1, 1] and clock.seconds == pytest.approx(3.5)


def test_answers_of_one_token_leave_behind_their_prefill() -> None:
    left, clock = served([0.0, 0.0], [1, 1], 1)
    assert [visit.tokens for visit, _ in left] == [[1.0], [2.0]] and clock.seconds == 2.0
    assert [measured.token_s for _, measured in left] == [[], []]


def test_an_idle_server_waits_for_the_next_arrival() -> None:
    left, clock = served([0.0, 5.0], [2, 2], 4)
    assert clock.waits == [5.0] and [visit.start for visit, _ in left] == [0.0, 5.0]


def test_the_real_clock_stands_still_when_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.0, 11.5, 17.5, 18.0])
    monkeypatch.setattr("harness.measuring.arrivals.time.perf_counter", lambda: next(times))
    clock = WallClock()
    assert clock.now() == 1.0
    with clock.stopped():
        pass
    assert clock.now() == 2.0


def test_the_real_clock_waits_no_less_than_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("harness.measuring.arrivals.time.perf_counter", lambda: now[0])
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds * 0.9 if len(slept) < 3 else seconds

    monkeypatch.setattr("harness.measuring.arrivals.time.sleep", sleep)
    clock = WallClock()
    clock.wait(2.0)
    assert now[0] >= 2.0 - 1e-9 and len(slept) == 3
    clock.wait(1.0)
    assert len(slept) == 3
