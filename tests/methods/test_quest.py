"""Quest: replayed steps that read the same pages, prompts that share a recording, keys and values in host memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.conformance.tiny import random_ids, tiny_engine, tiny_model, tiny_shape
from harness.engine.engine import Engine
from harness.engine.replay.pages import MOST_PAGES
from harness.engine.replay.recorded import RecordedDecode
from harness.engine.replay.replay import Replay
from harness.engine.request import Request
from harness.engine.step import Step
from harness.errors import InputError
from harness.measuring.ledger import ledger
from methods.quest import Quest
from tests.engine.test_replay import PROMPT, attention_alone, same_answer
from tests.reference.interpreter import DEVICE, kernels
from tests.tiny import build

kernels("page_select")

QUEST = "quest:dense_layers=1:per="
TOKEN_BYTES = 2 * 2 * 16 * 4
"""Of one token's keys and values in one layer of the tiny model."""


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[RecordedDecode]:
    """An entry for every step that is recorded."""
    made: list[RecordedDecode] = []
    record = RecordedDecode._record

    def counted(graph: RecordedDecode, replay: Replay) -> None:
        made.append(graph)
        record(graph, replay)

    monkeypatch.setattr(RecordedDecode, "_record", counted)
    return made


def quest(engine: Engine, text: str) -> Quest:
    method = build(QUEST + text, engine)
    assert isinstance(method, Quest)
    return method


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
@pytest.mark.slow
def test_replayed_quest_reads_the_same_pages(per: str, budget: float, replayed: list[bool]) -> None:
    stock, fused = attention_alone()
    expected, method = (build(f"{QUEST}{per}:budget={budget}", engine) for engine in (stock, fused))
    for length, static in zip((63, 31, 39), replayed, strict=True):
        request = Request(PROMPT[:length], 3)
        fused.read(method, request)
        assert (method.replay() is not None) == static
        same_answer(method, expected, request, fused, stock)
        assert method.decode_bytes() == expected.decode_bytes()


@pytest.mark.parametrize("options", ["kv_head", "query_head:offload=host"])
def test_prompts_of_different_lengths_share_a_recording(options: str, recordings: list[RecordedDecode]) -> None:
    stock, fused = attention_alone()
    expected, method = (quest(engine, f"{options}:budget=8:page=4") for engine in (stock, fused))
    keys = []
    # They need 21 pages, for which 24 are held, then 17, 11 and 20; 24 are too many for 5, and 5 too few for 6.
    for length, new in ((80, 2), (64, 3), (41, 2), (78, 2), (18, 2), (20, 2)):
        same_answer(method, expected, Request(PROMPT[:length], new), fused, stock)
        keys.append(method._replay.key())
    assert keys[0] == keys[1] == keys[2] == keys[3]
    assert len(set(keys)) == len(recordings) == 3


def test_bounds_are_gone_when_a_request_is_over() -> None:
    stock = attention_alone()[0]
    method = quest(stock, "kv_head:budget=8:page=4")
    for length in (80, 41):
        list(stock.stream(method, Request(PROMPT[:length], 2)))
        pages = -(-(length + 2) // 4)
        assert method.extra_bytes() == 2 * sum(bounds.low.nbytes for bounds in method.pages) == 2 * pages * TOKEN_BYTES
        method.end()
        assert method.extra_bytes() == 0


def test_quest_reports_what_it_holds_after_replayed_steps() -> None:
    stock, fused = attention_alone()
    expected, method = quest(stock, "query_head:budget=32"), quest(fused, "query_head:budget=32")
    same_answer(method, expected, Request(PROMPT[:76], 3), fused, stock)
    scores_and_pages = 5 * 4 * (4 + 4)
    assert method.extra_bytes() == expected.extra_bytes() + scores_and_pages
    # A request that fits the budget has no bounds, and the room that was kept for long ones is gone.
    same_answer(method, expected, Request(PROMPT[:10], 1), fused, stock)
    assert method.extra_bytes() == expected.extra_bytes() == 0


@pytest.mark.parametrize("offload", ["none", "host"])
def test_quest_goes_on_eagerly_behind_replayed_steps(offload: str) -> None:
    stock, fused = attention_alone()
    expected, method = quest(stock, "kv_head:budget=32"), quest(fused, f"kv_head:budget=32:offload={offload}")
    same_answer(method, expected, Request(PROMPT[:62], 5), fused, stock)
    # Of replayed steps the host has not seen a key.
    step, token = Step("decode", 66, 1), torch.tensor([7], device=DEVICE)
    ours, theirs = fused.forward(method, token, step), stock.forward(expected, token, step)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_quest_with_more_pages_than_can_be_chosen_from_is_not_replayed() -> None:
    method = quest(attention_alone()[1], "kv_head:budget=32:page=1")
    for prompt_len, static in ((MOST_PAGES - 2, True), (MOST_PAGES - 1, False), (MOST_PAGES - 2, True)):
        method.begin(prompt_len, 2)
        assert (method.replay() is not None) == static


def lies_on_the_host(method: Quest, expected: Quest) -> None:
    """All but the first layer's keys and values, in the method's own memory there, and nothing else differs."""
    first, *others = expected.cache
    room = sum(cache.nbytes for cache in others)
    assert method.kv_bytes() == first.nbytes and expected.kv_bytes() == first.nbytes + room
    assert room <= method.kv_bytes_host() <= 4 * room and expected.kv_bytes_host() == 0
    assert method.decode_bytes() == expected.decode_bytes()
    for layer, store in method.stores.items():
        cache = method.cache[layer]
        assert cache.keys.data_ptr() == store.keys.data_ptr() and cache.values.data_ptr() == store.values.data_ptr()
        assert cache.keys.device.type == "cpu" and cache.keys.is_pinned() == (DEVICE == "cuda")


@pytest.mark.parametrize("per", ["query_head", "kv_head"])
def test_keys_and_values_in_host_memory_change_no_token(per: str) -> None:
    stock = attention_alone()[0]
    expected, method = quest(stock, f"{per}:budget=24"), quest(stock, f"{per}:budget=24:offload=host")
    # The last one fits the budget.
    for length in (70, 40, 80, 1, 12):
        same_answer(method, expected, Request(PROMPT[:length], 5), stock, stock)
        lies_on_the_host(method, expected)
        # On a CPU the host's room for longer requests is memory of the device as well.
        spare = sum(store.spare_nbytes for store in method.stores.values())
        assert method.extra_bytes() == expected.extra_bytes() + spare and (spare == 0 or DEVICE == "cpu")


@pytest.mark.parametrize(("per", "budget"), [("query_head", 32), ("kv_head", 32), ("kv_head", 1000)])
def test_replayed_steps_read_host_memory(per: str, budget: int, recordings: list[RecordedDecode]) -> None:
    stock, fused = attention_alone()
    expected, method = quest(stock, f"{per}:budget={budget}"), quest(fused, f"{per}:budget={budget}:offload=host")
    for length, new in ((64, 3), (50, 2)):
        same_answer(method, expected, Request(PROMPT[:length], new), fused, stock)
        lies_on_the_host(method, expected)
    assert len(recordings) == 1


def test_the_question_is_read_from_host_memory() -> None:
    stock = attention_alone()[0]
    for options in ("question=decode:question_tokens=9", "budget=16"):
        request = Request(PROMPT, 3, question=9, question_after="decode" not in options)
        methods = [quest(stock, f"kv_head:page=4:{options}:offload={offload}") for offload in ("none", "host")]
        same_answer(methods[1], methods[0], request, stock, stock)
        lies_on_the_host(methods[1], methods[0])


def test_two_layers_at_most_are_on_their_way_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, copies = tiny_engine(), []
    method = quest(engine, "kv_head:budget=32:offload=host")
    after_layer = method.after_layer

    def watched(*hook: Any) -> Any:
        out = after_layer(*hook)
        caches = [(method.cache[layer].keys, store.keys) for layer, store in method.stores.items()]
        copies.append(sum(len(keys) > 0 and keys.data_ptr() != kept.data_ptr() for keys, kept in caches))
        return out

    monkeypatch.setattr(method, "after_layer", watched)
    engine.read(method, Request(random_ids(50), 2))
    assert copies == [0, 1, 2, 2, 2, 0]


def test_the_ledger_finds_no_copy_that_was_left() -> None:
    engine, request = tiny_engine(), Request(random_ids(512), 8)
    on_device, on_host = (
        ledger(engine, quest(engine, f"kv_head:budget=128:offload={offload}"), request) for offload in ("none", "host")
    )
    assert on_device.kv_after_prefill == 6 * on_host.kv_after_prefill == 6 * 520 * TOKEN_BYTES
    assert on_host.kv_host == 5 * 520 * TOKEN_BYTES and on_device.kv_host == 0
    assert on_host.unexplained == on_device.unexplained and on_host.unexplained_steady == on_device.unexplained_steady


def test_a_host_without_memory_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def full(*shape: Any, **options: Any) -> Tensor:
        if "pin_memory" in options:
            raise RuntimeError("can't allocate memory")
        return empty(*shape, **options)

    stock = attention_alone()[0]
    method = quest(stock, "kv_head:budget=32:offload=host")
    with monkeypatch.context() as patch:
        patch.setattr("methods.common.host_store.torch.empty", full)
        with pytest.raises(InputError, match="of host memory .*; offload=none keeps them on the device"):
            list(stock.stream(method, Request(PROMPT, 2)))
    expected = quest(stock, "kv_head:budget=32")
    same_answer(method, expected, Request(PROMPT, 2), stock, stock)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_prefill_never_holds_all_keys_and_values_on_the_device() -> None:
    layers, length = 12, 8192
    engine = Engine(copy.deepcopy(tiny_model(layers=layers)).to(DEVICE), tiny_shape(layers=layers))
    request = Request(random_ids(length).to(DEVICE), 2)
    peaks = []
    for offload in ("none", "host", "none", "host"):
        method = quest(engine, f"kv_head:budget=64:offload={offload}")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        engine.read(method, request)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        method.end()
    # One dense layer, the one at work and two behind it stay; the allocator rounds.
    saved = (layers - 5) * length * TOKEN_BYTES
    assert peaks[2] - peaks[3] >= saved, peaks
