"""FastKV's scores and cut, and GemFilter's two passes, against their rules written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.engine.method import causal_pairs
from harness.engine.request import Request
from harness.engine.step import Heads
from harness.errors import InputError
from harness.runner.catalog import parse_methods
from methods.fastkv import FastKV
from tests.tiny import HEADS, LAYERS, build, random_ids, tiny_engine, tiny_shape

PROMPT = 120


def fastkv(options: str, heads: str = "GQA") -> FastKV:
    method = build(f"fastkv:{options}", tiny_engine(heads=heads))
    assert isinstance(method, FastKV)
    return method


def best(row: Tensor, count: int) -> list[int]:
    return sorted(sorted(range(len(row)), key=lambda at: (-float(row[at]), at))[:count])


def smooth(row: Tensor, kernel: int, pool: str) -> Tensor:
    beyond = row.new_full((kernel // 2,), 0.0 if pool == "avg" else -torch.inf)
    around = torch.cat((beyond, row, beyond)).unfold(0, kernel, 1)
    return around.mean(1) if pool == "avg" else around.max(1).values


def wanted(heads: Heads, window: int, kernel: int, pool: str) -> Tensor:
    """Scores of the tokens before the window, [kv_heads, n - window]."""
    n, group = len(heads), heads.q.shape[1] // heads.k.shape[1]
    scores = torch.zeros(heads.k.shape[1], n - window)
    for head in range(heads.q.shape[1]):
        keys, row = heads.k[:, head // group], torch.zeros(n)
        for at in range(n - window, n):
            row[: at + 1] += (keys[: at + 1] @ heads.q[at, head] / heads.q.shape[2] ** 0.5).softmax(0)
        scores[head // group] += smooth(row[: n - window], kernel, pool)
    return scores


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_fastkv_keeps_and_cuts_by_what_the_window_looks_at(heads: str, pool: str) -> None:
    engine, ids, window = tiny_engine(heads=heads), random_ids(PROMPT), 4
    method = fastkv(f"budget=30:keep=50:window={window}:kernel=5:pool={pool}:cut=1", heads)
    engine.read(method, Request(ids, 1))
    scores = wanted(engine.first_layers(ids, 1), window, 5, pool)
    tail = list(range(PROMPT - window, PROMPT))
    for head, row in enumerate(scores):
        assert method.cache[1].positions[:, head].tolist() == best(row, 26) + tail
    above = set(best(scores.sum(0), 46) + tail)
    assert all(set(cache.positions.flatten().tolist()) <= above for cache in method.cache[2:])
    assert method.tokens_kept() == [30] * LAYERS


def test_above_the_cut_layers_have_fewer_rows() -> None:
    method, engine = fastkv("budget=0.1:keep=0.2"), tiny_engine()
    stream = engine.stream(method, Request(random_ids(PROMPT), 1))
    next(stream)
    assert stream.work.projected == stream.work.fed[:4] + [24, 24] == [PROMPT] * 4 + [24, 24]  # 15 of 32 is 3 of 6
    assert method.tokens_requested() == method.tokens_kept() == [12] * LAYERS


@pytest.mark.parametrize(
    ("options", "requested"),
    [
        ("budget=200:keep=30", [PROMPT] * LAYERS),  # shorter than the budget: no cut
        (f"budget={PROMPT}:keep=30", [PROMPT] * 4 + [30] * 2),
        ("budget=1:keep=30", [PROMPT] * 4 + [30] * 2),
        ("budget=40:keep=30:cut=0", [40] + [30] * 5),
        ("budget=20:keep=1", [20] * LAYERS),
        ("budget=0.01:keep=0.01", [8] * LAYERS),  # the window stays
    ],
)
def test_a_cut_needs_a_prompt_as_long_as_the_budget(options: str, requested: list[int]) -> None:
    method = fastkv(options)
    tiny_engine().read(method, Request(random_ids(PROMPT), 1))
    assert method.tokens_requested() == method.tokens_kept() == requested


@pytest.mark.parametrize("depth", [4, 24, 32])
def test_the_cut_moves_with_the_depth(depth: int) -> None:
    method = build("fastkv", tiny_engine(layers=depth))
    assert isinstance(method, FastKV) and method.cut == round(15 * depth / 32)


def found(heads: Heads, count: int, kernel: int, last: int) -> list[int]:
    group = heads.q.shape[1] // heads.k.shape[1]
    products = sum(heads.k[:, head // group] @ heads.q[-1, head] for head in range(heads.q.shape[1]))
    assert isinstance(products, Tensor)
    row = smooth(products, kernel, "avg")
    row[len(row) - last :] = torch.inf
    return best(row, count)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("options", "layer", "kernel", "last"), [("", 2, 5, 1), ("layer=0:kernel=3:last=0", 0, 3, 0)])
def test_gemfilter_reads_again_what_the_last_query_matches(
    heads: str, options: str, layer: int, kernel: int, last: int
) -> None:
    engine, ids = tiny_engine(heads=heads), random_ids(PROMPT)
    method = build(f"gemfilter:budget=31:{options}".rstrip(":"), engine)
    chosen = ids[found(engine.first_layers(ids, layer), 31, kernel, last)]
    assert method.prompt(ids, engine.first_layers).tolist() == chosen.tolist()
    ours, position = engine.read(method, Request(ids, 1))
    alone, _ = engine.read(build("full", engine), Request(chosen, 1))
    assert torch.equal(ours, alone) and position == 31


def test_gemfilter_is_asked_for_its_last_tokens_where_they_are_more_than_the_budget() -> None:
    method = build("gemfilter:budget=0.01:last=50", tiny_engine())
    assert method.asked_share(200) == 0.25
    assert method.asked_share(20) == 1


def test_gemfilter_counts_both_passes_and_takes_none_to_find_everything() -> None:
    engine, method = tiny_engine(), build("gemfilter:budget=40:layer=2", tiny_engine())
    for length, first in ((PROMPT, [PROMPT] * 3), (40, [])):
        stream = engine.stream(method, Request(random_ids(length), 1))
        next(stream)
        assert stream.work.projected == first + [40] * LAYERS
        assert stream.work.fed == first[:2] + [0] * len(first[2:]) + [40] * LAYERS
        assert method.tokens_kept() == [40] * LAYERS and method.prefill_pairs(40) == causal_pairs(40)


@pytest.mark.parametrize("text", ["fastkv:budget=30:keep=50", "gemfilter:budget=50"])
def test_a_question_may_follow_what_was_cut(text: str) -> None:
    engine, ids, late = tiny_engine(), random_ids(PROMPT), 9
    after, before = (build(text, engine) for _ in range(2))
    list(engine.stream(after, Request(ids, 3, question=late, question_after=True)))
    engine.read(before, Request(ids[:-late], 3))
    assert after.tokens_kept() == before.tokens_kept()
    for ours, context in zip(after.cache, before.cache, strict=True):
        assert ours.length == context.length + late + 2
        assert torch.equal(ours.positions[: context.length], context.positions)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fastkv:cut=5", "fastkv: cut=5 has no layer above it; the model has 6 layers"),
        ("fastkv:keep=7", "fastkv: keep=7 is less than window=8"),
        ("fastkv:budget=7", "fastkv: budget=7 is less than window=8"),
        ("fastkv:kernel=4", "fastkv: kernel=4 is even"),
        ("gemfilter:layer=6", "gemfilter: layer=6, but the model has 6 layers"),
        ("gemfilter:kernel=2", "gemfilter: kernel=2 is even"),
        ("gemfilter:budget=7:last=7", "gemfilter: budget=7 leaves nothing beside last=7"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_loads(text: str, message: str) -> None:
    (spec,) = parse_methods(text)
    with pytest.raises(InputError, match=message):
        spec.check(tiny_shape())
