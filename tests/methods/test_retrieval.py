"""RetrievalAttention: exact attention to both ends and to the best of the middle, which lies on the host."""

from __future__ import annotations

import pytest
import torch

from harness.engine.attention import Attention
from harness.engine.request import Request
from harness.errors import InputError
from methods.common import key_index
from methods.common.key_index import KeyIndex, Recipe, recall, search
from methods.common.key_index import build as build_indexes
from methods.retrieval import Retrieval, all_weighed, best_keys, weighed
from tests.methods.test_eviction import distinct_ids
from tests.methods.test_eviction import run as traced
from tests.methods.test_references import Model, same_logits
from tests.reference.retrieval import RetrievalTwin
from tests.tiny import (
    FAMILIES,
    HEAD_DIM,
    HEADS,
    LAYERS,
    build,
    last_logits,
    random_ids,
    tiny_engine,
    tiny_model,
    tiny_shape,
)

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


@pytest.mark.parametrize("heads_apart", [True, False])
@torch.inference_mode()
def test_all_that_is_found_is_weighed_as_attention_does_wherever_it_lies(heads_apart: bool) -> None:
    both = torch.randn(2, 2, 50, HEAD_DIM).transpose(1, 2) if heads_apart else torch.randn(2, 50, 2, HEAD_DIM)
    (k, v), q = both[:, 5:35], torch.randn(4, HEAD_DIM)
    products, found = best_keys(q, k, 30)
    out, norms = weighed(products / HEAD_DIM**0.5, v, found)
    torch.testing.assert_close(out.view(1, -1), Attention().causal(q.unsqueeze(0), k, v))
    torch.testing.assert_close((out, norms), all_weighed(q, k, v))


@torch.inference_mode()
def test_the_best_keys_are_found_with_their_products() -> None:
    q, k = torch.randn(6, HEAD_DIM), torch.randn(2, 30, HEAD_DIM).transpose(0, 1)
    products, found = best_keys(q, k, 7)
    for head, query in enumerate(q):
        each = k[:, head // 3] @ query
        assert set(found[head].tolist()) == set(each.topk(7).indices.tolist())
        torch.testing.assert_close(products[head], each[found[head]])


def test_a_question_comes_in_token_by_token() -> None:
    engine, ids, late = tiny_engine(), random_ids(80), 7
    together, alone = (build("retrieval:sinks=4:recent=16:topk=20", engine) for _ in range(2))
    logits = [last_logits(engine, method, ids, late, size) for method, size in ((together, late), (alone, 1))]
    torch.testing.assert_close(*logits)


def test_the_device_holds_both_ends_and_the_host_the_prompt() -> None:
    method = build("retrieval:sinks=4:recent=16:topk=20", tiny_engine())
    list(tiny_engine().stream(method, Request(random_ids(100), 3)))
    token = 2 * 2 * HEAD_DIM * 4
    assert method.kv_bytes() == LAYERS * (20 + 3) * token and method.kv_bytes_host() == LAYERS * (100 + 3) * token
    assert method.tokens_kept() == method.tokens_requested() == [100] * LAYERS
    searched, found = LAYERS * 80 * token // 2, LAYERS * 20 * 4 * HEAD_DIM * 4
    assert method.notes() == {"searched_bytes": searched}
    own = LAYERS * (20 + 2) * token
    assert method.decode_bytes() == own + searched + found
    assert method.bus_bytes() == 2 * LAYERS * 4 * (HEAD_DIM + 1) * 4  # of two steps: an output and its denominator
    assert method.replay() is None


def test_what_the_host_reads_is_no_part_of_the_devices_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    method = build("retrieval:sinks=4:recent=16:topk=20", tiny_engine())
    assert isinstance(method, Retrieval)
    list(tiny_engine().stream(method, Request(random_ids(100), 3)))
    whole = method.decode_bytes()
    monkeypatch.setattr(Retrieval, "apart", True)
    assert method.decode_bytes() == LAYERS * (20 + 2) * 2 * 2 * HEAD_DIM * 4 < whole


INDEXES = ("flat", "ivf:nlist=8:nprobe=8", "ivf:nlist=8:nprobe=2", "hnsw:m=4:ef=24")


def indexed(index: str) -> Retrieval:
    method = build(f"retrieval:sinks=4:recent=16:topk=20:index={index}", tiny_engine())
    assert isinstance(method, Retrieval)
    return method


@pytest.mark.parametrize("index", INDEXES[:2])
def test_an_index_that_is_searched_whole_finds_what_products_find(index: str) -> None:
    ids, model = distinct_ids(100 + STEPS), (FAMILIES[0], next(iter(HEADS)))
    exact = build("retrieval:sinks=4:recent=16:topk=20", tiny_engine(*model))
    method = build(f"retrieval:sinks=4:recent=16:topk=20:index={index}", tiny_engine(*model))
    same_logits(traced(method, ids, 100, model), traced(exact, ids, 100, model))
    assert method.notes()["recall"] == 1


@pytest.mark.parametrize("index", INDEXES)
def test_what_an_index_costs_and_finds_is_told(index: str) -> None:
    method, steps = indexed(index), 3
    list(tiny_engine().stream(method, Request(random_ids(100), steps)))
    notes, keys, heads = method.notes(), LAYERS * 80 * HEAD_DIM * 4, 4
    assert 0 < notes["recall"] <= 1 and (notes["recall"] == 1 if index in INDEXES[:2] else notes["recall"] > 0.1)
    assert notes["index_build_s"] > 0 and notes["index_bytes"] >= 2 * keys
    exact = build("retrieval:sinks=4:recent=16:topk=20", tiny_engine())
    list(tiny_engine().stream(exact, Request(random_ids(100), steps)))
    assert method.kv_bytes_host() == exact.kv_bytes_host() + notes["index_bytes"]
    centroids = LAYERS * 8 * HEAD_DIM * 4 * heads if index.startswith("ivf") else 0
    if notes["recall"] < 1:
        assert 0 < notes["searched_bytes"] < heads * keys + centroids
    else:
        assert notes["searched_bytes"] == heads * keys + centroids
    method.end()
    assert method.notes().keys() == {"searched_bytes"} or method.kv_bytes_host() == exact.kv_bytes_host()


def test_as_much_memory_as_told_is_in_an_index() -> None:
    faiss = pytest.importorskip("faiss")
    keys = torch.randn(500, 16)
    for recipe in (Recipe("flat"), Recipe("ivf", cells=10), Recipe("hnsw", links=8)):
        index = KeyIndex(keys, recipe)
        assert len(faiss.serialize_index(index._index)) == pytest.approx(index.outside_nbytes, rel=0.05)


def test_a_graph_is_the_same_in_every_run() -> None:
    layers = [torch.randn(300, 4, 16)]
    first, second = (build_indexes(layers, Recipe("hnsw", links=4, breadth=10)) for _ in range(2))
    q = torch.randn(8, 16)
    for one, other in zip(search(first[0], q, 10), search(second[0], q, 10), strict=True):
        assert torch.equal(one, other)


def test_an_index_tells_the_products_of_what_it_finds() -> None:
    keys, q = torch.randn(300, 2, 16), torch.randn(4, 16)
    for recipe in (Recipe("flat"), Recipe("ivf", cells=8, probed=4), Recipe("hnsw", links=8, breadth=20)):
        products, found = search(build_indexes([keys], recipe)[0], q, 10)
        own = [keys[found[head], head // 2] @ q[head] for head in range(4)]
        torch.testing.assert_close(products, torch.stack(own))


def test_where_a_head_finds_nothing_only_the_device_attends() -> None:
    found = torch.tensor([[-1, -1, -1], [2, 0, -1]])
    out, norms = weighed(torch.zeros(2, 3), torch.arange(1.0, 13).view(3, 1, 4), found)
    assert (out[0] == 0).all() and norms[0] == -torch.inf
    assert out[1].tolist() == [5, 6, 7, 8] and norms[1].exp() == pytest.approx(2)


def test_recall_counts_what_is_among_the_best() -> None:
    keys = torch.arange(10.0).view(10, 1, 1)
    found = torch.tensor([[9, 7, 3], [0, 1, -1]])
    assert recall(found, torch.tensor([[1.0], [-1.0]]), keys) == pytest.approx(4 / 6)


def test_without_faiss_no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_index, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="retrieval: index=ivf needs faiss, which is not installed: pip install"):
        Retrieval.check(Retrieval.Options.read("retrieval", {"index": "ivf"}), tiny_shape())
    Retrieval.check(Retrieval.Options.read("retrieval", {}), tiny_shape())


def test_a_short_prompt_stays_on_the_device_and_gives_host_memory_back() -> None:
    method = build("retrieval:sinks=4:recent=16", tiny_engine())
    list(tiny_engine().stream(method, Request(random_ids(100), 3)))
    list(tiny_engine().stream(method, Request(random_ids(20), 3)))
    assert method.kv_bytes_host() == method.extra_bytes() == 0 and method.notes() == {}
    assert method.kv_bytes() == LAYERS * 23 * 2 * 2 * HEAD_DIM * 4 and method.replay() is not None
