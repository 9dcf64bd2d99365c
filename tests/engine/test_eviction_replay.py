"""Recorded steps in which full layers lose a token for each that comes, against the same done eagerly."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from harness.conformance.tiny import tiny_model, tiny_shape
from harness.engine.engine import Engine
from harness.engine.method import Method, ModelContext
from harness.engine.replay.eviction import LowestOut
from harness.engine.replay.recorded import RecordedDecode
from harness.engine.replay.replay import Replay
from harness.engine.request import Request
from harness.engine.step import Heads, Step
from harness.options import OptionSet
from methods.common.scores import token_attention
from tests.reference.interpreter import DEVICE, kernels

for name in ("rowwise", "gemv", "decode_attention", "token_scores", "eviction"):
    kernels(name)

LAYERS = 3
LIMITS = (12, 40, 9)
PROMPT = torch.randint(0, 60, (80,), generator=torch.Generator().manual_seed(3)).to(DEVICE)


class Least(Method):
    """Layers hold a few tokens each, those that the newest query attends to."""

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        super().__init__(options, model)
        self.recorded = LowestOut()

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        out, cache = super().attend(layer, heads, step), self.cache[layer]
        if cache.length > LIMITS[layer]:
            scores = token_attention(heads.q[-1:], cache.keys)
            cache.keep(scores.sort(stable=True, descending=True).indices[: LIMITS[layer]].sort().values)
        return out

    def replay(self) -> Replay | None:
        self.recorded.prepare(self.cache, LIMITS)
        return self.recorded


def attention_alone() -> tuple[Engine, Engine]:
    """The second one replays its decode steps, with the stock verbs: interpreted products would take most time."""
    model, shape = tiny_model("llama", layers=LAYERS), tiny_shape(layers=LAYERS)
    stock, graphed = (copy.deepcopy(model).to(DEVICE) for _ in range(2))
    one, other = Engine(stock, shape), Engine(graphed, shape, kind="graphed")
    other.verbs = one.verbs
    return one, other


def test_the_token_that_is_attended_to_least_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecordedDecode, "_captured", rehearsed)
    stock, graphed = attention_alone()
    expected, method = (Least(Least.Options(), engine.context) for engine in (stock, graphed))
    for length, new in ((30, 6), (6, 8), (38, 4), (50, 2)):  # full layers, layers that fill up, more memory, less
        answers_alike(graphed, method, stock, expected, Request(PROMPT[:length], new))


def test_a_step_that_was_begun_takes_nothing_away() -> None:
    stock, graphed = attention_alone()
    expected, method = (Least(Least.Options(), engine.context) for engine in (stock, graphed))
    plain = list(stock.stream(expected, Request(PROMPT[:30], 7)))
    stop = next(token for at, token in enumerate(plain) if at >= 2 and token not in plain[:at])
    answers_alike(graphed, method, stock, expected, Request(PROMPT[:30], 7, frozenset({stop})))


def rehearsed(_: RecordedDecode, body: Callable[[], None], pool: object) -> Callable[[], None]:
    """Runs a step once before it is first replayed, as before a recording on a GPU."""
    body()
    return body


def answers_alike(graphed: Engine, method: Method, stock: Engine, expected: Method, request: Request) -> None:
    assert list(graphed.stream(method, request)) == list(stock.stream(expected, request))
    for ours, theirs in zip(method.cache, expected.cache, strict=True):
        assert ours.token_positions.tolist() == theirs.token_positions.tolist()
        assert torch.allclose(ours.keys, theirs.keys, atol=1e-4)
        assert torch.allclose(ours.values, theirs.values, atol=1e-4)
