"""Requests that come and go between steps get the answers that each would get alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from harness.conformance.tiny import tiny_engine
from harness.engine.continuous import Continuous, sizes
from harness.engine.engine import Engine
from harness.engine.replay.recorded import RecordedDecode
from harness.engine.replay.replay import Replay
from harness.engine.replay.seating import Seating, Seatings
from harness.engine.request import Request
from harness.runner.catalog import METHODS, parse_methods
from tests.engine.test_batch import REQUESTS, alone, spec
from tests.engine.test_replay import PROMPT, SCHEDULE, attention_alone
from tests.reference.interpreter import DEVICE, kernels

for name in ("decode_attention", "eviction", "fetch", "page_select", "listed_attention"):
    kernels(name)
EVERY = [name for name in METHODS.names() if name != "lazyllm"] + ["lazyllm:revive=false"]
SHORT = [Request(PROMPT[:64], 3), Request(PROMPT[10:41], 2), Request(PROMPT[5:], 4), Request(PROMPT[:34], 3)]
MIXED = [replace(request, max_new_tokens=new) for request, new in zip(SHORT, (5, 3, 4, 4), strict=True)]
MANY = [replace(request, prompt=PROMPT[at : at + 49 + 7 * at]) for at, request in enumerate(MIXED)]
"""The second one leaves from between two others, whose answers go on."""
OWN = (
    "quest:budget=16:page=8:dense_layers=1", "streaming:window=16", "streaming:mode=slide:window=20", "tova:budget=12",
    "h2o:mode=drop:budget=12:window=3", "duo:sinks=3:recent=2", f"slim:{SCHEDULE}",
    "lychee:budget=12",
)  # fmt: skip
"""Methods whose steps do more than attend."""
DENSE, RAGGED = "snapkv:budget=24:window=4:kernel=3", "adakv:budget=24:window=4:kernel=3"


def continuous(engine: Engine, text: str, places: int) -> Continuous:
    (method,) = parse_methods(text)
    return Continuous(engine, [method.build(engine.context) for _ in range(places)], Seatings(engine))


def answers(batch: Continuous, requests: Sequence[Request]) -> list[list[int]]:
    """One joins ahead of every step as long as there is a place, and whoever is done leaves at once."""
    waiting, slots = list(requests), []
    while waiting or batch.slots:
        if waiting and batch.places:
            slots.append(batch.join(waiting.pop(0)))
        for slot in [each for each in batch.slots if each.done]:
            batch.leave(slot)
        if batch.slots:
            there = batch.slots.copy()
            assert batch.step() == there
    return [slot.tokens for slot in slots]


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.slow
def test_every_method_answers_as_it_does_alone(text: str) -> None:
    engine = tiny_engine()
    batch = continuous(engine, text, 2)
    assert answers(batch, REQUESTS) == alone(engine, spec(text), REQUESTS)
    assert batch.places == 2 and not batch.replayed


def test_whoever_leaves_gives_memory_and_place_back() -> None:
    batch = continuous(tiny_engine(), "full", 2)
    first, second = (batch.join(request) for request in REQUESTS[:2])
    assert batch.places == 0 and first.method is not second.method
    batch.leave(first)
    assert batch.places == 1 and first.method.kv_bytes() == 0 < second.method.kv_bytes()
    assert batch.join(REQUESTS[2]).method is first.method
    batch.end()
    assert batch.places == 2 and not batch.slots


def test_an_answer_of_one_token_is_done_when_it_comes() -> None:
    batch = continuous(tiny_engine(), "full", 1)
    slot = batch.join(replace(REQUESTS[0], max_new_tokens=1))
    assert slot.done and len(slot.tokens) == 1


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[RecordedDecode]:
    """What has been recorded so far; without a GPU a step runs once in vain, as it does ahead of a recording."""
    found: list[RecordedDecode] = []
    captured = RecordedDecode._captured

    def noted(self: RecordedDecode, body: Callable[[], None], pool: object) -> Callable[[], None]:
        found.append(self)
        if DEVICE == "cuda":
            return captured(self, body, pool)
        body()
        return body

    monkeypatch.setattr(RecordedDecode, "_captured", noted)
    return found


@pytest.mark.parametrize("text", [DENSE, RAGGED, *OWN])
@pytest.mark.slow
def test_replayed_steps_give_the_same_answers(text: str, recorded: list[RecordedDecode]) -> None:
    stock, fused = attention_alone()
    batch = continuous(fused, text, 3)
    assert answers(batch, MANY) == alone(stock, spec(text), MANY)
    assert {one._table.batch for one in recorded} == {1, 2, 3}
    known = len(recorded)
    assert answers(batch, MANY[3:]) == alone(stock, spec(text), MANY[3:]) and len(recorded) == known


@pytest.mark.parametrize("text", [f"slim:{SCHEDULE}", "quest:budget=40:page=8"])
def test_requests_that_are_not_pruned_have_seats_of_their_own(text: str, recorded: list[RecordedDecode]) -> None:
    stock, fused = attention_alone()
    batch = continuous(fused, text, 3)
    assert answers(batch, MIXED) == alone(stock, spec(text), MIXED) and len(batch._seatings._made) > 1


def test_at_most_a_fifth_of_the_rows_is_padding() -> None:
    assert [*sizes(1)] == [1] and [*sizes(10)] == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert [*sizes(20)][-5:] == [10, 12, 15, 18, 20]


def test_between_two_recorded_numbers_the_greater_one_is_replayed(
    recorded: list[RecordedDecode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.engine.continuous.sizes", lambda most: [1, most])
    stock, fused = attention_alone(2)
    batch = continuous(fused, DENSE, 4)
    batch.join(SHORT[0])
    batch.record()
    assert [one._table.batch for one in recorded] == [1, 4]
    batch.end()
    assert answers(batch, SHORT) == alone(stock, spec(DENSE), SHORT)
    assert len(recorded) == 2


def test_a_rehearsal_changes_no_answer(recorded: list[RecordedDecode]) -> None:
    stock, fused = attention_alone(2)
    batch = continuous(fused, "full", 2)
    slot = batch.join(SHORT[0])
    batch.record()
    while not slot.done:
        batch.step()
    assert [slot.tokens] == alone(stock, spec("full"), SHORT[:1]) and len(recorded) == 2


def test_methods_share_what_is_recorded(recorded: list[RecordedDecode]) -> None:
    _, fused = attention_alone(2)
    seatings = Seatings(fused)
    for text in ("full", DENSE, RAGGED, OWN[0], OWN[0]):
        batch = Continuous(fused, [spec(text).build(fused.context)], seatings)
        answers(batch, SHORT[1:2])
    assert len(recorded) == 3


def test_steps_that_were_replayed_are_there_when_one_is_launched_anew() -> None:
    stock, fused = attention_alone(2)
    plain = alone(stock, spec(RAGGED), SHORT)
    # The third may not end with what it would say next, and what may not come is known to launched steps alone.
    late = replace(SHORT[2], stop_ids=frozenset({plain[2][1]}), min_new_tokens=3)
    batch = continuous(fused, RAGGED, 2)
    first = batch.join(SHORT[0])
    batch.step()
    assert batch.replayed
    second = batch.join(late)
    batch.step()
    assert not batch.replayed
    while batch.slots:
        for slot in [each for each in batch.slots if each.done]:
            batch.leave(slot)
        if batch.slots:
            batch.step()
    assert [first.tokens, second.tokens] == alone(stock, spec(RAGGED), [SHORT[0], late])


@pytest.mark.parametrize("text", ["quest:budget=0.5:page=8"])
def test_steps_of_which_no_other_request_takes_part_are_launched_anew(text: str) -> None:
    stock, fused = attention_alone()
    batch = continuous(fused, text, 2)
    assert answers(batch, SHORT[:2]) == alone(stock, spec(text), SHORT[:2]) and not batch.replayed


def test_a_cache_that_stands_for_nobody_is_long_enough() -> None:
    _, fused = attention_alone(2)
    seating = Seating(fused, Replay(), 2)
    for steps in (3, 9, 4):
        seating.leave_empty(range(2), steps)
        assert seating._nobody.room >= steps and not seating._nobody.keys.any() and seating._nobody.length == 1


def test_a_method_learns_what_was_replayed_ahead_of_its_record(recorded: list[RecordedDecode]) -> None:
    stock, fused = attention_alone()
    text = f"slim:{SCHEDULE}:gamma=1"
    expected = []
    for request in MANY[:2]:
        method = spec(text).build(stock.context)
        list(stock.stream(method, request))
        expected.append((method.notes(), [cache.token_positions.sort().values.tolist() for cache in method.cache]))
    batch = continuous(fused, text, 2)
    slots = [batch.join(request) for request in MANY[:2]]
    found = {}
    while batch.slots:
        batch.step()
        for slot in [each for each in batch.slots if each.done]:
            batch.settle(slot)
            positions = [cache.token_positions.sort().values.tolist() for cache in slot.method.cache]
            found[slot] = slot.method.notes(), positions
            batch.leave(slot)
    assert [found[slot] for slot in slots] == expected and any(expected[0][0]["kv_swaps"].values())
