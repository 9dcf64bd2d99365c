"""The fused verbs and the resident decode step against the stock model; Triton's interpreter stands in for a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import cycle

import pytest
import torch

from harness.conformance.tiny import tiny_model, tiny_shape
from harness.conformance.witness import memory
from harness.engine.cache import LayerCache
from harness.engine.engine import Engine, build_engine
from harness.engine.fused import why_not_fused
from harness.engine.method import Method
from harness.engine.replay import recorded
from harness.engine.replay.recorded import RecordedDecode
from harness.engine.request import Request
from harness.errors import InputError
from methods.h2o import H2O
from tests.reference.interpreter import DEVICE, kernels
from tests.tiny import build, stock_verbs

for name in ("rowwise", "gemv", "decode_attention", "row_attention", "token_scores", "revival", "eviction"):
    kernels(name)

pytestmark = pytest.mark.slow

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LAYERS = 3
NONE: frozenset[int] = frozenset()
PROMPT = torch.randint(0, 60, (80,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
SCHEDULE = "layers=1/2:budgets=48/32:block=16"
STATIC = (
    "full", f"slim:{SCHEDULE}:reselect=A", "lazyllm:layers=1/2:keep=48/32:revive=false", f"random:{SCHEDULE}",
    f"truncate:{SCHEDULE}", "streaming:window=32", "streaming:mode=evict:window=32", "ashape:sinks=4:window=32",
)  # fmt: skip


REVIVING = (
    "lazyllm:layers=1/3/5:keep=48/32/16", "lazyllm:layers=2/4:keep=0.5/0.3",
    "lazyllm:layers=1/4:keep=0.5/0.3:of=survivors", "lazyllm:layers=5:keep=1", "lazyllm:layers=1:keep=1",
)  # fmt: skip
COUNTS = (1, 4, 8), (1, 16)
"""Rows that pieces are recorded for, in place of the many that a GPU takes: rows in portions, and behind padding."""


def engines(family: str, layers: int = LAYERS) -> tuple[Engine, Engine]:
    model, shape = tiny_model(family, layers=layers), tiny_shape(layers=layers, family=family)
    stock, fused = (copy.deepcopy(model).to(DEVICE) for _ in range(2))
    return Engine(stock, shape), Engine(fused, shape, kind="graphed")


def attention_alone(layers: int = LAYERS, prefill: bool = False) -> tuple[Engine, Engine]:
    """The second one decodes on resident caches, with the stock verbs, and may read prompts as if recorded."""
    stock, fused = engines("llama", layers)
    stock_verbs(fused, stock)
    fused.prefill = fused.prefill if prefill else None
    return stock, fused


def rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on steps run once before they are first replayed, as before a recording on a GPU."""

    def captured(_: RecordedDecode, body: Callable[[], None], pool: object) -> Callable[[], None]:
        body()
        return body

    monkeypatch.setattr(RecordedDecode, "_captured", captured)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_logits_equal_the_stock_model(family: str) -> None:
    stock, fused = engines(family)
    a, b = (engine.read(build("full", engine), Request(PROMPT[:40], 1))[0] for engine in (stock, fused))
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def same_answer(method: Method, expected: Method, request: Request, fused: Engine, stock: Engine) -> None:
    assert list(fused.stream(method, request)) == list(stock.stream(expected, request))
    for ours, theirs in zip(method.cache, expected.cache, strict=True):
        by_place, expected_order = ours.token_positions.argsort(), theirs.token_positions.argsort()
        assert method.reorders or ours.token_positions.tolist() == theirs.token_positions.tolist()
        assert ours.token_positions[by_place].tolist() == theirs.token_positions[expected_order].tolist()
        # Quest's may lie on the host.
        for here, there in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            mine, other = here[by_place.to(here.device)].cpu(), there[expected_order.to(there.device)].cpu()
            assert torch.allclose(mine, other, atol=1e-4)


@pytest.mark.parametrize("text", STATIC)
def test_replayed_decode_gives_the_same_tokens_and_caches(text: str) -> None:
    stock, fused = engines("llama") if text == "full" else attention_alone()
    expected, method = build(text, stock), build(text, fused)
    for length, new in ((64, 3), (56, 2)):
        same_answer(method, expected, Request(PROMPT[:length], new), fused, stock)
        assert method.replay() is not None


@pytest.mark.parametrize("text", ["adakv:budget=24:window=4:kernel=3", "duo:sinks=3:recent=2", "duo:sinks=0:recent=19"])
def test_heads_of_different_lengths_are_replayed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed(monkeypatch)
    stock, fused = attention_alone()
    expected, method = build(text, stock), build(text, fused)
    plain = list(stock.stream(expected, Request(PROMPT[:70], 6)))
    stop = frozenset({next(token for at, token in enumerate(plain) if at >= 2 and token not in plain[:at])})
    # The second prompt is not pruned, but fills up under `duo`; in the last one a step is begun in vain.
    for length, new, ends in ((64, 6, NONE), (17, 4, NONE), (80, 2, NONE), (70, 6, stop)):
        request = Request(PROMPT[:length], new, ends)
        assert list(fused.stream(method, request)) == list(stock.stream(expected, request))
        for ours, theirs in zip(method.cache, expected.cache, strict=True):
            for one, other in zip(ours.heads(), theirs.heads(), strict=True):
                assert torch.equal(one.positions, other.positions)
                assert torch.allclose(one.keys, other.keys, atol=1e-4)
                assert torch.allclose(one.values, other.values, atol=1e-4)
    assert len({len(head.keys) for cache in method.cache for head in cache.heads()}) > 1


def test_full_layers_lose_a_token_for_each_that_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed(monkeypatch)
    stock, fused = attention_alone()
    expected, method = build("tova:budget=12", stock), build("tova:budget=12", fused)
    for length, new in ((30, 3), (10, 5), (40, 2)):  # the second prompt's layers fill up
        same_answer(method, expected, Request(PROMPT[:length], new), fused, stock)
    plain = list(stock.stream(expected, Request(PROMPT[:30], 7)))
    stop = next(token for at, token in enumerate(plain) if at >= 2 and token not in plain[:at])
    same_answer(method, expected, Request(PROMPT[:30], 7, frozenset({stop})), fused, stock)  # a step is begun in vain


@pytest.mark.parametrize("window", [3, 0])
def test_full_heads_lose_the_token_of_the_lowest_sum(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed(monkeypatch)
    stock, fused = attention_alone()
    expected, method = (build(f"h2o:mode=drop:budget=12:window={window}", engine) for engine in (stock, fused))
    assert isinstance(expected, H2O) and isinstance(method, H2O)
    plain = list(stock.stream(expected, Request(PROMPT[:30], 7)))
    stop = next(token for at, token in enumerate(plain) if at >= 2 and token not in plain[:at])
    answers = [(30, 3, frozenset()), (10, 5, frozenset()), (40, 2, frozenset()), (30, 7, frozenset({stop}))]
    for length, new, stops in answers:  # the second prompt's layers fill up, and a step of the last is begun in vain
        request = Request(PROMPT[:length], new, stops)
        assert list(fused.stream(method, request)) == list(stock.stream(expected, request))
        for layer, (ours, theirs) in enumerate(zip(method.cache, expected.cache, strict=True)):
            assert torch.equal(ours.positions, theirs.positions)
            assert torch.allclose(ours.keys, theirs.keys, atol=1e-4)
            assert torch.allclose(ours.values, theirs.values, atol=1e-4)
            assert torch.allclose(method._sums[layer], expected._sums[layer], atol=1e-4)
    assert any((cache.positions != cache.positions[:, :1]).any() for cache in method.cache)


def test_a_stop_token_ends_a_replayed_answer_and_leaves_no_trace_of_what_was_begun() -> None:
    stock, fused = attention_alone()
    plain = list(stock.stream(build("full", stock), Request(PROMPT[:40], 6)))
    request = Request(PROMPT[:40], 6, frozenset({plain[2]}), min_new_tokens=2)
    expected, method = build("full", stock), build("full", fused)
    assert list(fused.stream(method, request)) == list(stock.stream(expected, request))
    assert [cache.length for cache in method.cache] == [cache.length for cache in expected.cache]


@pytest.mark.parametrize(
    ("text", "counts"), [*zip(REVIVING, cycle(COUNTS), strict=False), (REVIVING[0], COUNTS[1])], ids=str
)
def test_replayed_revival_gives_the_same_tokens_and_caches(
    text: str, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "ROW_COUNTS", counts)
    stock, fused = attention_alone(layers=6)
    expected, method = build(text, stock), build(text, fused)
    for length, new in ((64, 3), (80, 2), (56, 2)):
        same_answer(method, expected, Request(PROMPT[:length], new), fused, stock)
        assert method.tokens_recomputed() == expected.tokens_recomputed()
        assert (method.tokens_recomputed() > 0) == ("keep=1" not in text)


def test_revived_tokens_may_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "ROW_COUNTS", (1,))
    stock, fused = attention_alone(layers=4)
    text = "lazyllm:layers=1/3:keep=8/4"
    same_answer(build(text, fused), build(text, stock), Request(PROMPT[:24], 3), fused, stock)


def test_replayed_revival_follows_steps_that_were_not_replayed() -> None:
    stock, fused = attention_alone(layers=6)
    expected, method = build(REVIVING[0], stock), build(REVIVING[0], fused)
    plain = list(stock.stream(expected, Request(PROMPT, 6)))
    request = Request(PROMPT, 6, frozenset({plain[4]}), min_new_tokens=3)
    same_answer(method, expected, request, fused, stock)
    late = Request(PROMPT, 4, question=6, question_after=True)
    same_answer(method, expected, late, fused, stock)


def test_memory_for_revived_tokens_grows_with_them() -> None:
    _, fused = attention_alone(layers=6)
    method = build("lazyllm:layers=2:keep=0.2", fused)
    list(fused.stream(method, Request(PROMPT, 1)))
    before = [cache.room + cache.length for cache in method.cache]
    list(fused.stream(method, Request(PROMPT, 8)))
    after = [cache.room + cache.length for cache in method.cache]
    assert before[0] + 7 == after[0] >= after[2] > before[2] + 7
    assert len(set(method.cache[2].token_positions.tolist())) == method.cache[2].length <= after[2]


@pytest.mark.parametrize("text", REVIVING[:2])
def test_pieces_that_run_only_to_be_recorded_do_no_harm(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed(monkeypatch)
    monkeypatch.setattr(recorded, "ROW_COUNTS", (1, 4))
    stock, fused = attention_alone(layers=6)
    expected, method = build(text, stock), build(text, fused)
    for length, new in ((72, 2), (56, 2), (80, 2)):  # in memory that is new, known and outgrown
        same_answer(method, expected, Request(PROMPT[:length], new), fused, stock)


def test_a_request_that_has_ended_holds_no_hidden_state() -> None:
    _, fused = attention_alone(layers=6)
    method = build(REVIVING[0], fused)
    list(fused.stream(method, Request(PROMPT, 4)))
    before = memory(method).floats
    method.end()
    assert memory(method).floats + 64 * 4 * 24 <= before


def test_a_request_that_finds_no_room_for_revived_tokens_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, fused = attention_alone(layers=6)
    expected, method = build(REVIVING[1], stock), build(REVIVING[1], fused)
    claim, left = LayerCache.claim, iter(range(7))

    def scarce(cache: LayerCache, count: int) -> bool:
        if next(left, None) is None:
            raise torch.OutOfMemoryError
        return claim(cache, count)

    with monkeypatch.context() as patch:
        patch.setattr(LayerCache, "claim", scarce)
        with pytest.raises(torch.OutOfMemoryError):
            list(fused.stream(method, Request(PROMPT[:64], 6)))
    method.end()
    same_answer(method, expected, Request(PROMPT[:64], 3), fused, stock)


def test_what_a_step_that_was_begun_revived_is_forgotten() -> None:
    stock, fused = attention_alone(layers=6)
    expected, method = build(REVIVING[0], stock), build(REVIVING[0], fused)
    plain = list(stock.stream(build(REVIVING[0], stock), Request(PROMPT, 6)))
    stop = next(token for at, token in enumerate(plain) if at >= 2 and token not in plain[:at])
    same_answer(method, expected, Request(PROMPT, 6, frozenset({stop})), fused, stock)


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
    generation = fused.stream(slim, Request(PROMPT, 6))
    assert list(generation)
    found = generation.overlap()
    if DEVICE == "cpu":
        assert found is None
    else:
        assert found is not None and found["beside_s"] > 0 and found["waited_s"] > 0 and 0 <= found["hidden"] < 1
    generation = fused.stream(full, Request(PROMPT, 3))
    assert list(generation) and generation.overlap() is None


@pytest.mark.parametrize("vocab", [1, 97, 512, 49_152])
def test_the_next_token_is_the_first_of_the_best(vocab: int) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)).to(DEVICE, torch.bfloat16)
    assert recorded._argmax(logits).tolist() == [int(logits.argmax())]
    ties = [place for place in (vocab // 3, vocab // 2, vocab - 1) if place < vocab]
    logits[ties] = 9.0
    assert recorded._argmax(logits).tolist() == [ties[0]]
    assert recorded._argmax(torch.full_like(logits, -torch.inf)).tolist() == [0]
