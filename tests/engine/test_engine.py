"""The engine under full attention is the stock model, bit for bit."""

from __future__ import annotations

import pytest
import torch

from harness.engine.request import Request
from harness.engine.step import Step
from tests.tiny import END, FAMILIES, HEADS, build, generate, random_ids, tiny_engine, tiny_model

EVERY_MODEL = [(family, heads) for family in FAMILIES for heads in HEADS]


@pytest.mark.parametrize(("family", "heads"), EVERY_MODEL)
@pytest.mark.parametrize("length", [1, 2, 65, 333])
def test_logits_equal_the_stock_forward_bit_for_bit(family: str, heads: str, length: int) -> None:
    engine, ids = tiny_engine(family, heads), random_ids(length)
    method = build("full", engine)
    method.begin(length, 0)
    with torch.no_grad():
        stock = tiny_model(family, heads)(ids[None], logits_to_keep=1).logits[0, -1]
    assert torch.equal(engine.forward(method, ids, Step("prefill", 0, length)), stock)


@pytest.mark.parametrize(("family", "heads"), EVERY_MODEL)
def test_tokens_equal_generate(family: str, heads: str) -> None:
    ids = random_ids(77)
    stock = tiny_model(family, heads).generate(ids[None], max_new_tokens=24, do_sample=False)[0, 77:].tolist()
    assert generate("full", tiny_engine(family, heads), ids, 24) == stock


def test_a_question_fed_after_its_context_sees_all_of_it() -> None:
    engine, ids = tiny_engine(), random_ids(50)
    method = build("full", engine)
    method.begin(50, 0)
    whole = engine.forward(method, ids, Step("prefill", 0, 50))
    method.begin(40, 10)
    engine.forward(method, ids[:40], Step("prefill", 0, 40))
    torch.testing.assert_close(engine.forward(method, ids[40:], Step("decode", 40, 10)), whole, rtol=1e-5, atol=1e-5)


def test_generation_stops_behind_a_stop_token() -> None:
    engine, ids = tiny_engine(), random_ids(30)
    free = list(engine.stream(build("full", engine), Request(ids, 10)))
    stopped = list(engine.stream(build("full", engine), Request(ids, 10, frozenset([free[3]]))))
    assert stopped == free[: free.index(free[3]) + 1]


def test_stop_tokens_are_suppressed_before_the_least_length() -> None:
    engine, ids = tiny_engine(), random_ids(30)
    (first,) = engine.stream(build("full", engine), Request(ids, 1))
    tokens = list(engine.stream(build("full", engine), Request(ids, 10, frozenset([first]), min_new_tokens=1)))
    assert tokens[0] != first


def test_an_end_token_at_once_leaves_one_token() -> None:
    engine, ids = tiny_engine(), random_ids(30)
    (first,) = engine.stream(build("full", engine), Request(ids, 1))
    assert list(engine.stream(build("full", engine), Request(ids, 9, frozenset([first])))) == [first]


@pytest.mark.parametrize(("ids", "new"), [([], 4), ([1], 0)])
def test_empty_requests_are_refused(ids: list[int], new: int) -> None:
    with pytest.raises(ValueError):
        Request(torch.tensor(ids, dtype=torch.long), new, frozenset([END]))
