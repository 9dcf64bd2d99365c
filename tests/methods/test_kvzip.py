"""KVzip: what is repeated, which tokens that rates, and what is left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.engine.engine import Engine
from harness.engine.request import Request
from harness.errors import InputError
from harness.runner.catalog import parse_methods
from tests.methods.test_eviction import distinct_ids
from tests.reference.cuts import zip_keeps, zip_table
from tests.tiny import HEAD_DIM, HEADS, LAYERS, build, random_ids, tiny_engine, tiny_model, tiny_shape

WORDS = {True: [7, 8, 9], False: [5, 6]}
"""What a tokenizer makes of the requests: of the first one, and of later ones."""


def engine(heads: str = "GQA") -> Engine:
    def encode(text: str) -> list[int]:
        return WORDS["starting with" not in text]

    return Engine(tiny_model(heads=heads), tiny_shape(heads), encode=encode)


def repeats(ids: Tensor, chunk: int) -> list[tuple[range, Tensor]]:
    found = []
    for start in range(0, len(ids), chunk):
        asked = torch.tensor(WORDS[start == 0])
        part = range(start, min(start + chunk, len(ids)))
        found.append((part, torch.cat((asked, ids[max(0, start - 8) : start], ids[part.start : part.stop]))))
    return found


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    ("length", "chunk", "share", "sinks"), [(50, 2000, 0.5, 4), (50, 20, 0.3, 1), (40, 3, 0.25, 5)]
)
@pytest.mark.slow
def test_it_keeps_what_its_twin_keeps(
    heads: str, length: int, chunk: int, share: float, sinks: int, plus: bool
) -> None:
    ids, model = distinct_ids(length), tiny_model(heads=heads)
    method = build(f"kvzip:budget={share}:chunk={chunk}:sinks={sinks}:plus={plus}", engine(heads))
    engine(heads).read(method, Request(ids, 1))
    table = zip_table(model, ids, repeats(ids, chunk), sinks, plus)
    table[:, :, :sinks] = torch.inf
    for cache, layer in zip(method.cache, zip_keeps(table, share), strict=True):
        held = [positions.tolist() for positions in cache.kept_positions()]
        assert held == [row.nonzero().flatten().tolist() for row in layer]


def test_weighing_by_what_values_add_keeps_others() -> None:
    plain, plus = (build(f"kvzip:budget=20:plus={plus}", engine()) for plus in ("false", "true"))
    for method in (plain, plus):
        engine().read(method, Request(random_ids(100), 1))
    pairs = zip(plain.cache, plus.cache, strict=True)
    assert any(
        one.tolist() != other.tolist()
        for ours, theirs in pairs
        for one, other in zip(ours.kept_positions(), theirs.kept_positions(), strict=True)
    )


def test_memory_is_of_what_is_kept_and_every_head_has_the_sinks() -> None:
    method = build("kvzip:budget=20:chunk=30", engine())
    list(engine().stream(method, Request(random_ids(100), 3)))
    held = [set(positions.tolist()) for cache in method.cache for positions in cache.kept_positions()]
    assert sum(len(head & set(range(100))) for head in held) == 20 * 2 * LAYERS == sum(method.tokens_kept()) * 2
    assert all({0, 1, 2, 3, 100, 101} <= head for head in held) and len(set(map(len, held))) > 1
    assert method.kv_bytes() == (20 + 3) * 2 * LAYERS * 2 * HEAD_DIM * 4


def test_the_first_token_is_full_attentions_and_repeating_counts_as_prefill() -> None:
    method, ids = build("kvzip:budget=20:chunk=60", engine()), random_ids(100)
    stream = engine().stream(method, Request(ids, 1))
    assert [next(stream)] == list(engine().stream(build("full", engine()), Request(ids, 1)))
    rows = [100] * LAYERS + [60 + 3] * LAYERS + [40 + 2 + 8] * LAYERS
    assert stream.work.projected == stream.work.fed == rows
    assert stream.work.past == [0] * LAYERS + [100] * 2 * LAYERS


def test_nothing_is_repeated_where_everything_stays() -> None:
    method = build("kvzip:budget=100", engine())
    stream = engine().stream(method, Request(random_ids(100), 1))
    next(stream)
    assert stream.work.projected == [100] * LAYERS and method.tokens_kept() == [100] * LAYERS


def test_a_question_has_no_say() -> None:
    one, other, ids = (build("kvzip:budget=0.3", engine()), build("kvzip:budget=0.3", engine()), random_ids(100))
    engine().read(one, Request(ids, 1, question=10, question_after=True))
    engine().read(other, Request(ids[:90], 1))
    for ours, theirs in zip(one.cache, other.cache, strict=True):
        for many, few in zip(ours.kept_positions(), theirs.kept_positions(), strict=True):
            assert many.tolist() == [*few.tolist(), *range(90, 100)]


def test_a_model_without_a_tokenizer_repeats_the_chunk_alone() -> None:
    method = build("kvzip:budget=20:chunk=60", tiny_engine())
    stream = tiny_engine().stream(method, Request(random_ids(100), 1))
    next(stream)
    assert stream.work.projected[LAYERS:] == [60] * LAYERS + [40 + 8] * LAYERS


def test_what_is_read_again_must_fit_the_sliding_window_too() -> None:
    sliding = engine()
    sliding.window = 160
    sliding.read(build("kvzip:budget=20:chunk=40", sliding), Request(random_ids(100), 1))
    with pytest.raises(InputError, match="163 tokens, new ones included, exceed the model's sliding window of 160"):
        sliding.read(build("kvzip:budget=20:chunk=60", sliding), Request(random_ids(100), 1))


def test_a_budget_below_the_sinks_is_refused() -> None:
    (spec,) = parse_methods("kvzip:budget=3")
    with pytest.raises(InputError, match="kvzip: budget=3 is less than sinks=4"):
        spec.check(tiny_shape())


def test_it_is_asked_for_its_sinks_where_they_are_more_than_the_budget() -> None:
    method = build("kvzip:budget=0.01:sinks=40", tiny_engine())
    assert [method.asked_share(length) for length in (200, 20, 8000)] == [0.2, 1, 0.01]
