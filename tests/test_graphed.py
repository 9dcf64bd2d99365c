"""The fused verbs and the resident decode step against the stock model; Triton's interpreter stands in for a GPU."""

from __future__ import annotations

import copy

import pytest
import torch

from harness.engine import Engine, Request, build_engine
from harness.errors import InputError
from harness.fused import why_not_fused
from harness.resident_pages import MOST_PAGES
from harness.rows import Step
from harness.tiny import tiny_model, tiny_shape
from methods.base import Method
from methods.quest import Quest
from methods.registry import parse_methods
from tests.reference.interpreter import DEVICE, kernels

for name in ("rowwise", "gemv", "decode_attention", "page_select"):
    kernels(name)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LAYERS = 3
PROMPT = torch.randint(0, 60, (80,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
SCHEDULE = "layers=1/2:budgets=48/32:block=16"
STATIC = (
    "full", f"slim:{SCHEDULE}:reselect=A", "lazyllm:layers=1/2:keep=48/32:revive=false", f"random:{SCHEDULE}",
    f"truncate:{SCHEDULE}", "streaming:mode=ashape:window=32",
)  # fmt: skip
QUEST = "quest:dense_layers=1:per="


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
        assert torch.allclose(ours.keys, theirs.keys, atol=1e-4)
        assert torch.allclose(ours.values, theirs.values, atol=1e-4)


@pytest.mark.parametrize("text", STATIC)
def test_replayed_decode_gives_the_same_tokens_and_caches(text: str) -> None:
    stock, fused = engines("llama") if text == "full" else attention_alone()
    expected, method = build(text, stock), build(text, fused)
    for length, new in ((64, 3), (56, 2)):
        same_answer(method, expected, Request(PROMPT[:length], new), fused, stock)
        assert method.static_decode()


@pytest.mark.parametrize(
    ("per", "budget", "replayed"),
    [
        # Of prompts of 63, 31 and 39 tokens, two replayed steps each; 16 tokens a page.
        ("kv_head", 32, [True, True, True]),  # outgrown on the way by the second
        ("query_head", 32, [True, True, True]),
        ("query_head", 0.25, [True, True, True]),  # 16, 8 and 10 tokens: one page, the new token's
        ("kv_head", 40, [True, True, False]),  # no whole pages: two, but three while the third fits
        ("kv_head", 1000, [True, True, True]),
    ],
)
def test_replayed_quest_reads_the_same_pages(per: str, budget: float, replayed: list[bool]) -> None:
    stock, fused = attention_alone()
    expected, method = (build(f"{QUEST}{per}:budget={budget}", engine) for engine in (stock, fused))
    for length, static in zip((63, 31, 39), replayed, strict=True):
        request = Request(PROMPT[:length], 3)
        fused.read(method, request)
        assert method.static_decode() == static
        same_answer(method, expected, request, fused, stock)
        assert method.decode_bytes() == expected.decode_bytes()


def quest(engine: Engine, text: str) -> Quest:
    method = build(QUEST + text, engine)
    assert isinstance(method, Quest)
    return method


def test_quest_keeps_the_memory_that_a_recorded_step_knows_and_nothing_in_it() -> None:
    stock, fused = attention_alone()
    expected, method = quest(stock, "kv_head:budget=32"), quest(fused, "kv_head:budget=32")
    keys, addresses = [], []
    # Both totals take five pages; the third prompt takes six.
    for length, new in ((62, 3), (63, 2), (80, 2), (62, 3)):
        same_answer(method, expected, Request(PROMPT[:length], new), fused, stock)
        keys.append(method.capture_key())
        addresses.append([bound.data_ptr() for pages in method.pages for bound in (pages.low, pages.high)])
        with torch.inference_mode():
            for bound in (bound for pages in method.pages for bound in (pages.low, pages.high)):
                bound.fill_(torch.nan)
    assert keys[0] == keys[1] and addresses[0] == addresses[1]
    assert len(set(keys[1:])) == 3


def test_quest_reports_what_it_holds_after_replayed_steps() -> None:
    stock, fused = attention_alone()
    expected, method = quest(stock, "query_head:budget=32"), quest(fused, "query_head:budget=32")
    request = Request(PROMPT[:46], 4)
    same_answer(method, expected, request, fused, stock)
    scores_and_pages = 4 * 4 * (4 + 4)
    assert method.extra_bytes() == expected.extra_bytes() + scores_and_pages
    # A request without replayed steps, and the memory that was kept for them is gone.
    fused.read(method, Request(PROMPT[:1], 1))
    assert method.extra_bytes() < expected.extra_bytes()


def test_quest_goes_on_eagerly_behind_replayed_steps() -> None:
    stock, fused = attention_alone()
    expected, method = quest(stock, "kv_head:budget=32"), quest(fused, "kv_head:budget=32")
    same_answer(method, expected, Request(PROMPT[:62], 5), fused, stock)
    # Of replayed steps the host has not seen a key.
    step, token = Step("decode", 66, 1), torch.tensor([7], device=DEVICE)
    ours, theirs = fused.forward(method, token, step), stock.forward(expected, token, step)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_quest_with_more_pages_than_can_be_chosen_from_is_not_replayed() -> None:
    method = quest(attention_alone()[1], "kv_head:budget=32:page=1")
    for prompt_len, static in ((MOST_PAGES - 2, True), (MOST_PAGES - 1, False)):
        method.begin(prompt_len, 2)
        assert method.static_decode() == static


def test_a_stop_token_ends_a_replayed_answer_and_leaves_no_trace_of_what_was_begun() -> None:
    stock, fused = attention_alone()
    plain = list(stock.stream(build("full", stock), Request(PROMPT[:40], 6)))
    request = Request(PROMPT[:40], 6, frozenset({plain[2]}), min_new_tokens=2)
    expected, method = build("full", stock), build("full", fused)
    assert list(fused.stream(method, request)) == list(stock.stream(expected, request))
    assert [cache.length for cache in method.cache] == [cache.length for cache in expected.cache]


def test_methods_that_choose_anew_are_not_replayed() -> None:
    _, fused = attention_alone()
    for text in ("lazyllm:layers=1/2:keep=48/32", "streaming:window=32", "streaming:mode=evict:window=32"):
        method = build(text, fused)
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
