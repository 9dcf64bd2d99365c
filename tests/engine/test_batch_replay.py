"""Steps of several requests recorded as one, against each request alone; Triton's interpreter stands in for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from weakref import ReferenceType, ref

import pytest
import torch

from harness.engine.batch import Batch
from harness.engine.engine import Engine
from harness.engine.replay.overlap import Overlap
from harness.engine.replay.recorded import RecordedDecode
from harness.engine.replay.replay import Replay
from harness.engine.replay.seating import Seatings
from harness.engine.replay.together import OneByOne
from harness.engine.request import Request
from harness.runner.catalog import parse_methods
from tests.engine.test_decode_kernels import Case, Step
from tests.engine.test_replay import PROMPT, SCHEDULE, attention_alone, engines, rehearsed
from tests.reference.interpreter import DEVICE, kernels

pytestmark = pytest.mark.slow

module = kernels("decode_attention")
for name in ("listed_attention", "page_select", "eviction", "fetch"):
    kernels(name)
REQUESTS = [Request(PROMPT[:64], 4), Request(PROMPT[10:41], 3), Request(PROMPT[5:], 5)]
DENSE = ("full", "snapkv:budget=24:window=4:kernel=3", f"slim:{SCHEDULE}:reselect=A")
RAGGED = ("adakv:budget=24:window=4:kernel=3",)
OTHERS = (
    "duo:sinks=3:recent=2", "streaming:window=16", "streaming:mode=slide:window=20", "tova:budget=12",
    "h2o:mode=drop:budget=12:window=3", "quest:budget=32:page=8",
    "slim:layers=1/2:budgets=24/16:block=8", "slim:layers=1/2:budgets=24/16:block=8:gamma=1",
    "lychee:budget=12:retrieval=0.5",
)  # fmt: skip
ALONE = (f"slim:{SCHEDULE}",)
"""Requests of which each has steps of its own: two of three are pruned."""


def recorded_or_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are recorded where there is a GPU; elsewhere steps run once in vain, as they do ahead of a recording."""
    if DEVICE == "cpu":
        rehearsed(monkeypatch)


def batches(text: str, engine: Engine, size: int = len(REQUESTS)) -> Batch:
    (spec,) = parse_methods(text)
    return Batch(engine, [spec.build(engine.context) for _ in range(size)])


def same(batch: Batch, stock: Engine, text: str, requests: Sequence[Request]) -> None:
    """Answers, and keys and values of those that ran to the end."""
    (spec,) = parse_methods(text)
    list(batch.read(requests))
    list(batch.steps())
    for slot, request in zip(batch.slots, requests, strict=True):
        expected = spec.build(stock.context)
        assert slot.tokens == list(stock.stream(expected, request))
        if len(slot.tokens) < max(one.max_new_tokens for one in requests):
            continue
        for ours, theirs in zip(slot.method.cache, expected.cache, strict=True):
            for one, other in zip(ours.heads(), theirs.heads(), strict=True):
                order, expected_order = one.positions.argsort(), other.positions.argsort()
                assert torch.equal(one.positions[order], other.positions[expected_order])
                assert torch.allclose(one.keys[order].cpu(), other.keys[expected_order].cpu(), atol=1e-4)
                assert torch.allclose(one.values[order].cpu(), other.values[expected_order].cpu(), atol=1e-4)


@pytest.mark.parametrize("text", DENSE + RAGGED + OTHERS + ALONE)
def test_replayed_steps_give_the_same_answers_and_caches(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded_or_rehearsed(monkeypatch)
    stock, fused = attention_alone()
    batch = batches(text, fused)
    same(batch, stock, text, REQUESTS)
    assert (len(batch._seatings._made), len(batch._recordings)) == ((0, 1) if text in ALONE else (1, 0))
    same(batch, stock, text, REQUESTS[::-1])
    assert len(batch._seatings._made) + len(batch._recordings) == 1


def test_a_number_of_requests_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[RecordedDecode] = []

    def captured(self: RecordedDecode, body: Callable[[], None], pool: object) -> Callable[[], None]:
        recorded.append(self)
        return body

    monkeypatch.setattr(RecordedDecode, "_captured", captured)
    stock, fused = attention_alone()
    batch = batches("full", fused)
    for requests in (REQUESTS, REQUESTS[:2], REQUESTS[1:], REQUESTS[::-1], REQUESTS[:1]):
        same(batch, stock, "full", requests)
    assert len(recorded) == 3


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_fused_verbs_take_a_row_of_each_request(family: str) -> None:
    stock, fused = engines(family)
    same(batches("full", fused), stock, "full", REQUESTS)


def test_an_answer_that_ends_early_does_not_disturb_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded_or_rehearsed(monkeypatch)
    stock, fused = attention_alone()
    plain = [list(stock.stream(batches("full", stock, 1)._methods[0], request)) for request in REQUESTS]
    # The first ends with its prefill, the second one later, and the last may not end when it would.
    ends = [(plain[0][0], 0), (plain[1][1], 0), (plain[2][1], 2)]
    pairs = zip(REQUESTS, ends, strict=True)
    requests = [replace(one, stop_ids=frozenset({stop}), min_new_tokens=least) for one, (stop, least) in pairs]
    same(batches("full", fused), stock, "full", requests)


def test_seats_are_for_those_who_do_the_same_alone() -> None:
    class Other(Replay):
        pass

    _, fused = attention_alone()
    seatings = Seatings(fused)
    plain = seatings.of([Replay(), Replay()], 2)
    assert plain is not None and seatings.of([Replay()], 2) is plain is not seatings.of([Replay()], 1)
    assert (
        seatings.of([Replay(), Other()], 2) is None is seatings.of([Other(), Other()], 2) and len(seatings._made) == 2
    )


LENGTHS = [[0, 70, 33], [16, 15, 200], [1, 1, 1]]
"""Tokens of each request, in three layers."""


class Requests:
    """Several requests' caches and new tokens, whose heads lie in one buffer."""

    def __init__(self, case: Case) -> None:
        self.each = [Step(case, [lengths[number] for lengths in LENGTHS], number) for number in range(3)]
        rows = [step.table[layer] for step in self.each for layer in range(len(LENGTHS))]
        self.table = torch.stack(rows)
        self.kernel = module.DecodeAttention(
            case.kv_heads * case.group, case.kv_heads, case.d, DEVICE, case.splits, batch=3
        )
        for buffer in (self.kernel._sums, self.kernel._tops, self.kernel._totals):
            buffer.fill_(torch.nan)
        whole = torch.stack([torch.cat([step.q, step.k, step.v]) for step in self.each])
        self.heads = whole.tensor_split([case.kv_heads * case.group, case.kv_heads * (case.group + 1)], 1)


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("case", [Case(), Case(1, 5, 16), Case(2, 2, 64, dtype=torch.float16)], ids=str)
def test_dense_attention_of_several_requests(case: Case, splits: int) -> None:
    several = Requests(replace(case, splits=splits))
    for layer in range(len(LENGTHS)):
        out = several.kernel.dense(*several.heads, several.table, layer)
        for number, step in enumerate(several.each):
            step.close(out[number : number + 1], step.expected(layer, step.everything(layer)))
            for cache, new in zip(step.caches[layer], (step.k, step.v), strict=True):
                length = step.lengths[layer]
                assert torch.equal(cache[length], new) and cache[length + 1 :].isnan().all()
    assert not several.kernel._counters.any()


def test_heads_of_different_lengths_of_several_requests() -> None:
    kv_heads, group, d = 2, 2, 16
    lengths = [[[5, 60], [0, 33]], [[1, 1], [100, 16]]]  # [layer][request][head]
    single = [[[Step(Case(1, group, d), [n]) for n in heads] for heads in layer] for layer in lengths]
    table = torch.stack(
        [torch.cat([step.table for step in layer[request]]) for request in range(2) for layer in single]
    )
    q, k, v = torch.randn(2, 8, d).to(DEVICE).tensor_split([4, 6], 1)
    kernel = module.DecodeAttention(kv_heads * group, kv_heads, d, DEVICE, 2, batch=2)
    for layer, requests in enumerate(single):
        out = kernel.ragged(q, k, v, table, layer).view(2, kv_heads, 1, group * d)
        for request, heads in enumerate(requests):
            for head, step in enumerate(heads):
                own = slice(head, head + 1)
                step.q, step.k, step.v = q[request].chunk(kv_heads)[head], k[request, own], v[request, own]
                step.close(out[request, head], step.expected(0, step.everything(0)))


@pytest.mark.parametrize("per", [2, 8])
def test_pages_of_several_requests(per: int) -> None:
    several = Requests(Case(2, 4, 16, page=16))
    last = [step.lengths[1] // 16 for step in several.each]
    listed = [[sorted({i % (end + 1), end}) for i in range(per)] for end in last]
    # Where the only page is the last one, another one is behind it, which counts for nothing.
    pages = torch.tensor([[(row + [1000])[:2] for row in rows] for rows in listed], dtype=torch.int32, device=DEVICE)
    out = several.kernel.paged(*several.heads, several.table, 1, pages, 16)
    for number, step in enumerate(several.each):
        seen = [page_tokens(row, step.lengths[1] + 1) for row in listed[number] for _ in range(8 // per)]
        step.close(out[number : number + 1], step.expected(1, seen))


def page_tokens(pages: Sequence[int], length: int) -> list[int]:
    return [token for token in range(length) if token // 16 in pages]


@pytest.mark.parametrize(("lists", "batch"), [(8, 2), (8, 16), (8, 20), (2, 3), (8, 64), (1, 5)])
def test_programs_find_work_in_their_last_round_too(lists: int, batch: int) -> None:
    splits = module.even_splits(132, lists, batch)
    programs = lists * batch * splits
    assert programs / (-(-programs // 132) * 132) > 0.9 and splits <= 132


def test_a_long_cache_is_more_shares_than_a_short_one() -> None:
    case = Case(1, 4, 16, splits=2)
    several = Requests(case)
    several.kernel.dense(*several.heads, several.table, 0)  # 0, 70 and 33 tokens
    left = ~several.kernel._tops[: 3 * 6 * case.group].isnan()
    shares = left.view(3, 6, case.group).any(2).sum(1).tolist()
    assert shares[0] == 1 < shares[2] < shares[1]


@pytest.mark.parametrize("text", ["full", "quest:budget=16:page=8", *ALONE])
def test_nothing_is_recorded_behind_a_rehearsal(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[RecordedDecode] = []

    def captured(self: RecordedDecode, body: Callable[[], None], pool: object) -> Callable[[], None]:
        recorded.append(self)
        body()
        return body

    monkeypatch.setattr(RecordedDecode, "_captured", captured)
    stock, fused = attention_alone()
    batch = batches(text, fused)
    batch.rehearse(REQUESTS)
    assert len(recorded) == 1
    same(batch, stock, text, REQUESTS)
    assert len(recorded) == 1


def test_marks_of_a_recorded_step_stay_as_long_as_it_is_replayed() -> None:
    class Marked(Replay):
        def end_step(self) -> Overlap:
            return Overlap(None)

    _, fused = attention_alone()
    assert fused.table is not None
    together = OneByOne([Marked(), Marked()])
    together._tables = [fused.table, fused.table]
    made: list[ReferenceType[Overlap]] = []
    remember = Overlap.__init__

    def noted(self: Overlap, side: object) -> None:
        remember(self, side)
        made.append(ref(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Overlap, "__init__", noted)
        together.end_step()
    assert len(made) == 2 and all(one() is not None for one in made)
