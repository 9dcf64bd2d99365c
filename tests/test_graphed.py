"""The fused verbs and the resident decode step against the stock model; Triton's interpreter stands in for a GPU."""

from __future__ import annotations

import copy

import pytest
import torch

from harness.engine import Engine, Request, build_engine
from harness.errors import InputError
from harness.fused import why_not_fused
from harness.tiny import tiny_model, tiny_shape
from methods.base import Method
from methods.registry import parse_methods
from tests.reference.interpreter import DEVICE, kernels

for name in ("rowwise", "gemv", "decode_attention"):
    kernels(name)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LAYERS = 3
PROMPT = torch.randint(0, 60, (80,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
SCHEDULE = "layers=1/2:budgets=48/32:block=16"
STATIC = (
    "full", f"slim:{SCHEDULE}:reselect=A", "lazyllm:layers=1/2:keep=48/32:revive=false", f"random:{SCHEDULE}",
    f"truncate:{SCHEDULE}", "streaming:window=32", "streaming:mode=evict:window=32", "streaming:mode=ashape:window=32",
)  # fmt: skip


def engines(family: str) -> tuple[Engine, Engine]:
    model, shape = tiny_model(family, layers=LAYERS), tiny_shape(layers=LAYERS, family=family)
    stock, fused = (copy.deepcopy(model).to(DEVICE) for _ in range(2))
    return Engine(stock, shape), Engine(fused, shape, kind="graphed")


def attention_alone() -> tuple[Engine, Engine]:
    """The second one decodes on resident caches, with the stock verbs: interpreted products would take most time."""
    stock, fused = engines("llama")
    fused.verbs = stock.verbs
    return stock, fused


def build(text: str, engine: Engine) -> Method:
    (spec,) = parse_methods(text)
    return spec.build(engine.context)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_logits_equal_the_stock_model(family: str) -> None:
    stock, fused = engines(family)
    a, b = (engine.read(build("full", engine), Request(PROMPT[:40], 1))[0] for engine in (stock, fused))
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def same_answer(method: Method, expected: Method, request: Request, fused: Engine, stock: Engine) -> None:
    assert list(fused.stream(method, request)) == list(stock.stream(expected, request))
    for ours, theirs in zip(method.cache, expected.cache, strict=True):
        assert ours.positions.tolist() == theirs.positions.tolist()
        assert torch.allclose(ours.keys.cpu(), theirs.keys.cpu(), atol=1e-4)
        assert torch.allclose(ours.values.cpu(), theirs.values.cpu(), atol=1e-4)


@pytest.mark.parametrize("text", STATIC)
def test_replayed_decode_gives_the_same_tokens_and_caches(text: str) -> None:
    stock, fused = engines("llama") if text == "full" else attention_alone()
    expected, method = build(text, stock), build(text, fused)
    for length, new in ((64, 3), (56, 2)):
        same_answer(method, expected, Request(PROMPT[:length], new), fused, stock)
        assert method.static_decode()


def test_a_stop_token_ends_a_replayed_answer_and_leaves_no_trace_of_what_was_begun() -> None:
    stock, fused = attention_alone()
    plain = list(stock.stream(build("full", stock), Request(PROMPT[:40], 6)))
    request = Request(PROMPT[:40], 6, frozenset({plain[2]}), min_new_tokens=2)
    expected, method = build("full", stock), build("full", fused)
    assert list(fused.stream(method, request)) == list(stock.stream(expected, request))
    assert [cache.length for cache in method.cache] == [cache.length for cache in expected.cache]


def test_methods_that_choose_anew_are_not_replayed() -> None:
    _, fused = attention_alone()
    method = build("lazyllm:layers=1/2:keep=48/32", fused)
    assert len(list(fused.stream(method, Request(PROMPT, 2)))) == 2
    assert not fused._can_replay(method, 2)


def test_joined_weights_are_not_stored_twice() -> None:
    model = copy.deepcopy(tiny_model("qwen2"))
    stored = {p.untyped_storage().data_ptr() for p in model.parameters()}
    bytes_before = sum(p.untyped_storage().nbytes() for p in model.parameters())
    Engine(model, tiny_shape(family="qwen2"), kind="fused")
    after: dict[int, int] = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert len(after) < len(stored) and sum(after.values()) == bytes_before


def test_the_engine_says_why_it_cannot_fuse() -> None:
    model, shape = tiny_model("llama"), tiny_shape()
    assert "not on a CUDA device" in why_not_fused(model, shape)
    assert build_engine(model, shape).kind == "stock"
    with pytest.raises(InputError, match="--engine fused"):
        build_engine(model, shape, kind="fused")


def test_work_beside_a_step_is_timed_where_there_are_streams() -> None:
    _, fused = attention_alone()
    slim, full = build(f"slim:{SCHEDULE}", fused), build("full", fused)
    assert list(fused.stream(slim, Request(PROMPT, 6)))
    found = fused.overlap()
    if DEVICE == "cpu":
        assert found is None
    else:
        assert found is not None and found["beside_s"] > 0 and found["waited_s"] > 0 and 0 <= found["hidden"] < 1
    assert list(fused.stream(full, Request(PROMPT, 3))) and fused.overlap() is None
