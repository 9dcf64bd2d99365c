"""Requests that are decoded together get the answers that each would get alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from harness.conformance.tiny import END, random_ids, tiny_engine
from harness.engine.batch import Batch
from harness.engine.engine import Engine
from harness.engine.method import Method
from harness.engine.promises import BrokenPromise
from harness.engine.request import Request
from harness.engine.step import Heads, Rows, Step
from harness.errors import InputError
from harness.models.load import FAMILIES
from harness.runner.catalog import METHODS, MethodSpec, parse_methods

pytestmark = pytest.mark.slow

REVIVING = ["lazyllm", "lazyllm:keep=0.5/20:layers=1/5:of=survivors", "lazyllm+ashape:sinks=4:window=64"]
EVERY = [name for name in METHODS.names() if name not in REVIVING] + ["lazyllm:revive=false"]
"""Their variants are asked together by the conformance checks."""
REQUESTS = [
    Request(random_ids(130, 1), 7),
    Request(random_ids(70, 2), 9),
    Request(random_ids(300, 3), 5),
    Request(random_ids(257, 4), 8, question=11),
]


def spec(text: str) -> MethodSpec:
    (found,) = parse_methods(text)
    return found


def alone(engine: Engine, method: MethodSpec, requests: Sequence[Request]) -> list[list[int]]:
    return [list(engine.stream(method.build(engine.context), request)) for request in requests]


def batch_of(engine: Engine, method: MethodSpec, size: int) -> Batch:
    return Batch(engine, [method.build(engine.context) for _ in range(size)])


def answers(batch: Batch, requests: Sequence[Request]) -> list[list[int]]:
    first = [slot.tokens.copy() for slot in batch.read(requests)]
    assert all(len(tokens) == 1 for tokens in first)
    steps = list(batch.steps())
    assert all(slot.done for slot in batch.slots)
    assert sum(map(len, steps)) == sum(len(slot.tokens) - 1 for slot in batch.slots)
    return [slot.tokens for slot in batch.slots]


@pytest.mark.parametrize("text", EVERY)
def test_every_method_answers_as_it_does_alone(text: str) -> None:
    engine, method = tiny_engine(), spec(text)
    batch = batch_of(engine, method, len(REQUESTS))
    assert answers(batch, REQUESTS) == alone(engine, method, REQUESTS)
    fewer = REQUESTS[2:]
    assert answers(batch, fewer) == alone(engine, method, fewer)
    batch.end()
    assert not batch.slots


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_it_does_alone(family: str) -> None:
    engine, method = tiny_engine(family, "MQA"), spec("full")
    assert answers(batch_of(engine, method, 4), REQUESTS) == alone(engine, method, REQUESTS)


def stopping(plain: Sequence[Sequence[int]]) -> list[Request]:
    """The first answer ends with its first token, the second one later, the third may not end as early as it would."""
    kinds = [(plain[0][0], 0), (plain[1][3], 0), (plain[2][1], 3), (END, 0)]
    pairs = zip(REQUESTS, kinds, strict=True)
    return [replace(one, stop_ids=frozenset({stop}), min_new_tokens=least) for one, (stop, least) in pairs]


def test_each_answer_ends_by_its_own_stop_token() -> None:
    engine, method = tiny_engine(), spec("full")
    requests = stopping(alone(engine, method, REQUESTS))
    expected = alone(engine, method, requests)
    assert len({len(tokens) for tokens in expected}) > 2
    assert answers(batch_of(engine, method, 4), requests) == expected


def test_each_answer_may_be_ended_from_outside() -> None:
    engine, method = tiny_engine(), spec("full")
    batch = batch_of(engine, method, 2)
    assert len(list(batch.read(REQUESTS[:2], [lambda tokens: len(tokens) == 3, None]))) == 2
    list(batch.steps())
    assert [len(slot.tokens) for slot in batch.slots] == [3, REQUESTS[1].max_new_tokens]


def test_the_question_may_follow_the_pruned_context() -> None:
    engine, method = tiny_engine(), spec("snapkv:budget=40:window=8")
    requests = [replace(request, question=6, question_after=True) for request in REQUESTS]
    assert answers(batch_of(engine, method, 4), requests) == alone(engine, method, requests)


@pytest.mark.parametrize("text", REVIVING)
def test_revival_is_refused_by_name(text: str) -> None:
    method = spec(text)
    with pytest.raises(InputError, match="lazyllm.*revive=false"):
        method.kind.check_batch(method.options)


class Doubling(Method):
    """Two rows for one in decode."""

    name = summary = "doubling"

    def after_layer(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        if step.phase == "prefill":
            return rows
        return rows.select(torch.tensor([0, 0]))


def test_rows_that_come_up_in_decode_are_a_broken_promise() -> None:
    engine = tiny_engine()
    batch = Batch(engine, [Doubling(Method.Options(), engine.context) for _ in range(2)])
    list(batch.read(REQUESTS[:2]))
    with pytest.raises(BrokenPromise, match="2 rows"):
        list(batch.steps())


class Shifting(Method):
    """Changes its row between layers, by its request's length."""

    name = summary = "shifting"

    def after_layer(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        return replace(rows, hidden=rows.hidden + self.prompt_len / 100) if self.prompt_len > 100 else rows

    after_attention = after_layer


def test_what_hooks_do_to_a_row_stays_with_it() -> None:
    engine = tiny_engine()
    methods = [Shifting(Method.Options(), engine.context) for _ in REQUESTS]
    expected = [list(engine.stream(methods[0], request)) for request in REQUESTS]
    assert answers(Batch(engine, methods), REQUESTS) == expected
