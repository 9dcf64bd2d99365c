"""StreamingLLM's sliding window in steps that may be replayed, against the same steps launched one by one."""

from __future__ import annotations

import copy

import pytest
import torch

from harness.engine.engine import Engine
from harness.engine.request import Request
from harness.engine.step import Step
from methods.streaming import Streaming
from tests.engine.test_replay import rehearsed
from tests.reference.interpreter import DEVICE, kernels
from tests.tiny import build, random_ids, stock_verbs, tiny_model, tiny_shape

for name in ("rowwise", "gemv", "decode_attention", "fetch"):
    kernels(name)

LAYERS = 2
PROMPT = random_ids(80).to(DEVICE)
SLIDING = ("faithful", "slide")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.engine.kernels.fetch._PROGRAMS", 2)


def engines(mode: str, band: str, family: str = "llama") -> tuple[tuple[Engine, Streaming], tuple[Engine, Streaming]]:
    """One that launches every step and one that may replay, each with the method; both with the stock verbs."""
    model, shape = tiny_model(family, layers=LAYERS), tiny_shape(layers=LAYERS, family=family)
    stock, replaying = (Engine(copy.deepcopy(model).to(DEVICE), shape, kind=kind) for kind in ("stock", "graphed"))
    stock_verbs(replaying, stock)
    assert replaying.table is not None
    replaying.table.attention.splits = 1  # interpreted programs take long
    pairs = [(engine, build(f"streaming:mode={mode}:{band}", engine)) for engine in (stock, replaying)]
    (a, plain), (b, replayed) = pairs
    assert isinstance(plain, Streaming) and isinstance(replayed, Streaming)
    return (a, plain), (b, replayed)


def same_answer(plain: tuple[Engine, Streaming], replaying: tuple[Engine, Streaming], request: Request) -> None:
    """Tokens, caches and reports; replayed steps keep the sinks in memory of their own."""
    (stock, expected), (engine, method) = plain, replaying
    assert list(engine.stream(method, request)) == list(stock.stream(expected, request))
    for ours, theirs in zip(method.cache, expected.cache, strict=True):
        assert ours.token_positions.tolist() == theirs.token_positions.tolist()
        assert torch.allclose(ours.keys, theirs.keys, atol=1e-4)
        assert torch.allclose(ours.values, theirs.values, atol=1e-4)
    for report in ("tokens_kept", "tokens_requested", "kv_bytes", "decode_bytes"):
        assert getattr(method, report)() == getattr(expected, report)()


@pytest.mark.parametrize("mode", SLIDING)
@pytest.mark.parametrize(
    ("band", "prompts"),
    [
        ("sinks=4:window=12", (16,)),
        ("sinks=4:window=12", (14, 4)),  # slides from the third step on, never
        ("sinks=0:window=16", (40,)),
        ("sinks=3:window=1", (20,)),
        ("sinks=0:window=1", (9,)),
        ("sinks=6:window=0.25", (40,)),
    ],
)
def test_replayed_steps_slide_the_window(mode: str, band: str, prompts: tuple[int, ...]) -> None:
    plain, replaying = engines(mode, band)
    for length in prompts:
        same_answer(plain, replaying, Request(PROMPT[:length], 6))
        assert replaying[1].replay() is not None


@pytest.mark.parametrize("mode", SLIDING)
def test_a_prompt_that_lacks_sinks_is_not_replayed(mode: str) -> None:
    plain, replaying = engines(mode, "sinks=8:window=4")
    for length, static in ((7, False), (8, True), (2, False)):
        request = Request(PROMPT[:length], 6)
        replaying[0].read(replaying[1], request)
        assert (replaying[1].replay() is not None) == static
        same_answer(plain, replaying, request)


@pytest.mark.parametrize("mode", SLIDING)
@pytest.mark.parametrize(("length", "count"), [(40, 6), (14, 4), (10, 3)])
def test_steps_behind_replayed_ones(mode: str, length: int, count: int) -> None:
    (stock, expected), (engine, method) = plain, replaying = engines(mode, "sinks=4:window=12")
    same_answer(plain, replaying, Request(PROMPT[:length], count))
    for position in range(length + count - 1, length + count + 2):
        step, token = Step("decode", position, 1), PROMPT[position : position + 1]
        ours, theirs = engine.forward(method, token, step), stock.forward(expected, token, step)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", SLIDING)
def test_a_step_that_was_begun_and_not_asked_for_does_no_harm(mode: str) -> None:
    (stock, expected), (engine, method) = engines(mode, "sinks=4:window=12")
    request = Request(PROMPT[:40], 12)
    tokens = list(stock.stream(expected, request))
    stopped = Request(PROMPT[:40], 12, frozenset({tokens[5]}), min_new_tokens=4)
    given = list(engine.stream(method, stopped))
    assert given == list(stock.stream(expected, stopped)) and 4 < len(given) <= 6
    for _ in range(2):
        assert [cache.token_positions.tolist() for cache in method.cache] == [
            c.token_positions.tolist() for c in expected.cache
        ]
        position = int(method.cache[0].token_positions[-1]) + 1
        step = Step("decode", position, 1)
        ours, theirs = (e.forward(m, PROMPT[:1], step) for e, m in ((engine, method), (stock, expected)))
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", SLIDING)
@pytest.mark.parametrize("length", [40, 15])
def test_a_step_that_runs_only_to_be_recorded_is_taken_back(
    mode: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsed(monkeypatch)
    same_answer(*engines(mode, "sinks=4:window=12"), Request(PROMPT[:length], 6))


@pytest.mark.parametrize("mode", SLIDING)
def test_a_recorded_step_finds_its_memory_again(mode: str) -> None:
    plain, (engine, method) = engines(mode, "sinks=4:window=0.25")
    keys, addresses = [], []
    for length, new in ((60, 3), (59, 3), (40, 2), (60, 2)):
        same_answer(plain, (engine, method), Request(PROMPT[:length], new))
        keys.append(method._replay.key())
        front = method._replay._front
        assert front is not None
        addresses.append([part.data_ptr() for part in (front.keys, front.values, front.seen)])
    assert keys[0] == keys[1] == keys[3] != keys[2]
    assert addresses[0] == addresses[1] == addresses[2] == addresses[3]


def test_sinks_of_replayed_steps_are_reported() -> None:
    for mode, parts in (("faithful", 3), ("slide", 2)):
        _, (engine, method) = engines(mode, "sinks=4:window=12")
        request = Request(PROMPT[:40], 2)
        list(engine.stream(method, request, eager=True))
        assert method.extra_bytes() == 0
        list(engine.stream(method, request))
        assert method.extra_bytes() == parts * LAYERS * 4 * 2 * 16 * 4


def test_evict_slides_nothing() -> None:
    plain, (engine, method) = engines("evict", "sinks=4:window=12")
    same_answer(plain, (engine, method), Request(PROMPT[:40], 3))
    assert method.replay() is method.dense_replay and method.extra_bytes() == 0
    assert [cache.length for cache in method.cache] == [16 + 2] * LAYERS
