"""RetrievalAttention: exact attention to both ends and to the best of the middle, which lies on the host."""

from __future__ import annotations

import pytest
import torch

from harness.engine.attention import Attention
from harness.engine.request import Request
from harness.engine.step import Step
from methods.retrieval import softmax_part
from tests.methods.test_eviction import distinct_ids
from tests.methods.test_eviction import run as traced
from tests.methods.test_references import Model, same_logits
from tests.reference.retrieval import RetrievalTwin
from tests.tiny import FAMILIES, HEAD_DIM, HEADS, LAYERS, build, random_ids, tiny_engine, tiny_model

STEPS = 5
SIZES = [(100, 4, 16, 20), (100, 0, 2, 2), (60, 30, 29, 7), (60, 10, 20, 30), (50, 20, 40, 5), (20, 4, 8, 12)]


@pytest.mark.parametrize(
    ("length", "sinks", "recent", "topk", "model"),
    [
        (*size, (FAMILIES[(turn + at) % len(FAMILIES)], heads))
        for turn, size in enumerate(SIZES)
        for at, heads in enumerate(HEADS)
    ],
)
def test_it_answers_as_exact_top_k_attention(length: int, sinks: int, recent: int, topk: int, model: Model) -> None:
    method, ids = (
        build(f"retrieval:sinks={sinks}:recent={recent}:topk={topk}", tiny_engine(*model)),
        distinct_ids(length + STEPS),
    )
    twin = RetrievalTwin(tiny_model(*model), length, len(ids), sinks, recent, topk)
    same_logits(traced(method, ids, length, model), twin.run(ids))


@torch.inference_mode()
def test_parts_joined_by_their_denominators_are_the_whole() -> None:
    q, k, v = torch.randn(1, 4, HEAD_DIM), torch.randn(30, 2, HEAD_DIM), torch.randn(30, 2, HEAD_DIM)
    outs, norms = zip(
        *(softmax_part(q, k[part], v[part], len(k[part])) for part in (slice(9), slice(9, None))), strict=True
    )
    joined = (torch.stack(norms).softmax(0).unsqueeze(-1) * torch.stack(outs)).sum(0)
    torch.testing.assert_close(joined.view(1, -1), Attention().causal(q, k, v))


def test_a_question_comes_in_token_by_token() -> None:
    engine, ids, late = tiny_engine(), random_ids(80), 7
    together, alone = (build("retrieval:sinks=4:recent=16:topk=20", engine) for _ in range(2))
    logits = []
    for method, size in ((together, late), (alone, 1)):
        method.begin(80 - late, late)
        engine.forward(method, ids[:-late], Step("prefill", 0, 80 - late))
        for start in range(80 - late, 80, size):
            last = engine.forward(method, ids[start : start + size], Step("decode", start, size))
        logits.append(last)
    torch.testing.assert_close(*logits)


def test_the_device_holds_both_ends_and_the_host_the_prompt() -> None:
    method = build("retrieval:sinks=4:recent=16:topk=20", tiny_engine())
    list(tiny_engine().stream(method, Request(random_ids(100), 3)))
    token = 2 * 2 * HEAD_DIM * 4
    assert method.kv_bytes() == LAYERS * (20 + 3) * token and method.kv_bytes_host() == LAYERS * (100 + 3) * token
    assert method.tokens_kept() == method.tokens_requested() == [100] * LAYERS
    searched, found = LAYERS * 80 * token // 2, LAYERS * 20 * 4 * HEAD_DIM * 4
    assert method.notes() == {"searched_bytes": searched}
    assert method.decode_bytes() == LAYERS * (20 + 2) * token + searched + found
    assert method.replay() is None


def test_a_short_prompt_stays_on_the_device_and_gives_host_memory_back() -> None:
    method = build("retrieval:sinks=4:recent=16", tiny_engine())
    list(tiny_engine().stream(method, Request(random_ids(100), 3)))
    list(tiny_engine().stream(method, Request(random_ids(20), 3)))
    assert method.kv_bytes_host() == method.extra_bytes() == 0 and method.notes() == {}
    assert method.kv_bytes() == LAYERS * 23 * 2 * 2 * HEAD_DIM * 4 and method.replay() is not None
