"""Decode attention against attention written out token by token; interpreted where there is no GPU."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import decode
from tests.reference.interpreter import DEVICE, kernels

DecodeAttention = kernels("decode_attention").DecodeAttention
SPARE = 3


@dataclass(frozen=True)
class Case:
    kv_heads: int = 2
    group: int = 4
    d: int = 16
    length: int = 65
    splits: int = 3
    page: int = 16
    dtype: torch.dtype = torch.float32


CASES = [
    Case(1, 1, 16, 0, 1),
    Case(1, 8, 64, 1, 2),
    Case(2, 4, 16, 15, 3),
    Case(8, 4, 128, 16, 1),
    Case(2, 2, 64, 63, 4),
    Case(2, 3, 32, 64, 5),
    Case(1, 16, 16, 65, 9),
    Case(1, 4, 64, 500, 9),
    Case(8, 1, 16, 300, 1),
    Case(1, 5, 16, 130, 3, page=7),
    Case(1, 4, 16, 130, 2, page=40),
    Case(2, 2, 32, 100, 4, dtype=torch.float16),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


class Step:
    """A few layers' caches with one more token to come in, and everything that must stay as it is poisoned."""

    def __init__(self, case: Case, lengths: list[int], seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.case, self.lengths = case, lengths
        self.caches = [self._cache(length) for length in lengths]
        rows = [[keys.data_ptr(), values.data_ptr(), n] for (keys, values), n in zip(self.caches, lengths, strict=True)]
        self.table = torch.tensor(rows, device=DEVICE)
        self.fresh()

    def _cache(self, length: int) -> tuple[Tensor, Tensor]:
        case = self.case
        both = torch.full((2, length + SPARE, case.kv_heads, case.d), torch.nan, dtype=case.dtype)
        both[:, :length] = torch.randn(2, length, case.kv_heads, case.d).to(case.dtype)
        keys, values = both.to(DEVICE)
        return keys, values

    def fresh(self) -> None:
        """A new token, its heads views into one buffer."""
        heads = self.case.kv_heads * self.case.group
        fused = torch.randn(1, (heads + 2 * self.case.kv_heads) * self.case.d).to(DEVICE, self.case.dtype)
        self.q, self.k, self.v = fused.view(-1, self.case.d).tensor_split([heads, heads + self.case.kv_heads])

    def kernel(self) -> Any:
        case = self.case
        attention = DecodeAttention(case.kv_heads * case.group, case.kv_heads, case.d, DEVICE, case.splits)
        for buffer in (attention._sums, attention._tops, attention._totals):
            buffer.fill_(torch.nan)
        return attention

    def expected(self, layer: int, seen: list[list[int]]) -> Tensor:
        length = self.lengths[layer]
        keys, values = (
            torch.cat([cache[:length], new.unsqueeze(0)]).cpu()
            for cache, new in zip(self.caches[layer], (self.k, self.v), strict=True)
        )
        return decode.attend(self.q.cpu(), keys, values, seen)

    def everything(self, layer: int) -> list[list[int]]:
        return [list(range(self.lengths[layer] + 1))] * self.q.shape[0]

    def close(self, out: Tensor, expected: Tensor) -> None:
        assert out.shape == expected.shape and out.dtype == self.case.dtype
        torch.testing.assert_close(out.cpu().double(), expected, atol=TOLERANCE[self.case.dtype], rtol=0)


def poisoned(step: Step) -> Tensor:
    return torch.full((1, step.q.numel()), torch.nan, dtype=step.case.dtype, device=DEVICE)


def some_pages(step: Step, lists: int, count: int) -> Tensor:
    """The last page and others, in any order."""
    last = step.lengths[0] // step.case.page
    chosen = [random.Random(i).sample(range(last), min(count, last)) + [last] for i in range(lists)]
    return torch.tensor([random.Random(i).sample(row, len(row)) for i, row in enumerate(chosen)], dtype=torch.int32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dense(case: Case) -> None:
    step = Step(case, [case.length])
    out = poisoned(step)
    assert step.kernel().dense(step.q, step.k, step.v, step.table, 0, out) is out
    step.close(out, step.expected(0, step.everything(0)))


@pytest.mark.parametrize("case", CASES[:8], ids=str)
def test_what_each_token_weighs_can_be_left_behind(case: Case) -> None:
    step, layers = Step(case, [5, case.length]), 2
    heads = step.q.shape[0]
    logits, norms = (torch.full((layers, heads, *room), torch.nan, device=DEVICE) for room in ((case.length + 3,), ()))
    out = step.kernel().dense(step.q, step.k, step.v, step.table, 1, logits=(logits, norms))
    step.close(out, step.expected(1, step.everything(1)))
    keys = torch.cat([step.caches[1][0][: case.length], step.k.unsqueeze(0)]).repeat_interleave(case.group, 1)
    weights = (torch.einsum("hd,nhd->hn", step.q, keys).double() * case.d**-0.5).softmax(1)
    assert torch.allclose((logits[1, :, : case.length + 1] - norms[1].unsqueeze(1)).double().exp2(), weights, atol=1e-5)
    assert logits[0].isnan().all() and norms[0].isnan().all() and logits[1, :, case.length + 1 :].isnan().all()


RAGGED = [
    (Case(2, 4, 16, splits=3), [[65, 0], [3, 48]]),
    (Case(4, 1, 64, splits=2), [[1, 16, 200, 15]]),
    (Case(1, 3, 32, splits=4, dtype=torch.float16), [[0], [70]]),
]


@pytest.mark.parametrize(("case", "lengths"), RAGGED, ids=str)
def test_heads_of_different_lengths(case: Case, lengths: list[list[int]]) -> None:
    """A layer of the test's caches stands for one KV head."""
    single = [Step(replace(case, kv_heads=1), layer, seed) for seed, layer in enumerate(lengths)]
    table = torch.stack([step.table for step in single])
    step = Step(case, [0])
    kernel, before = step.kernel(), table.clone()
    for layer, heads in enumerate(single):
        out = kernel.ragged(step.q, step.k, step.v, table, layer, poisoned(step))
        queries = step.q.chunk(case.kv_heads)
        for head, length in enumerate(heads.lengths):
            heads.q, heads.k, heads.v = queries[head], step.k[head : head + 1], step.v[head : head + 1]
            own = out.view(-1, case.d)[head * case.group : (head + 1) * case.group].view(1, -1)
            heads.close(own, heads.expected(head, heads.everything(head)))
            for cache, new in zip(heads.caches[head], (heads.k, heads.v), strict=True):
                assert torch.equal(cache[length], new) and cache[length + 1 :].isnan().all()
    assert torch.equal(table, before) and not kernel._counters.any()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_pages(case: Case, per: str) -> None:
    step = Step(case, [case.length])
    heads, lists = step.q.shape[0], case.kv_heads if per == "kv_head" else step.q.shape[0]
    pages = some_pages(step, lists, 3)
    out = step.kernel().paged(step.q, step.k, step.v, step.table, 0, pages.to(DEVICE), case.page, poisoned(step))
    rows = [pages[head * lists // heads].tolist() for head in range(heads)]
    step.close(out, step.expected(0, [decode.tokens_in(row, case.page, case.length + 1) for row in rows]))


@pytest.mark.parametrize("paged", [False, True])
def test_the_new_token_is_stored_and_nothing_else_changes(paged: bool) -> None:
    step = Step(Case(length=33), [33, 48, 17])
    before = [[cache.clone() for cache in pair] for pair in step.caches]
    table = step.table.clone()
    pages = torch.tensor([[0, 3]] * 8, dtype=torch.int32, device=DEVICE)
    kernel = step.kernel()
    if paged:
        kernel.paged(step.q, step.k, step.v, step.table, 1, pages, 16)
    else:
        kernel.dense(step.q, step.k, step.v, step.table, 1)
    before[1][0][48], before[1][1][48] = step.k, step.v
    for old, new in zip(before, step.caches, strict=True):
        for a, b in zip(old, new, strict=True):
            assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
    assert torch.equal(table, step.table)


def test_one_object_serves_layers_and_steps_of_all_lengths() -> None:
    step = Step(Case(kv_heads=1, splits=4), [70, 0, 14])
    kernel = step.kernel()
    for _ in range(SPARE):
        for layer in range(len(step.lengths)):
            out = kernel.dense(step.q, step.k, step.v, step.table, layer)
            step.close(out, step.expected(layer, step.everything(layer)))
        step.table[:, 2] += 1
        step.lengths = [length + 1 for length in step.lengths]
        step.fresh()
    assert not kernel._counters.any()


@pytest.mark.parametrize("length", [0, 15, 16, 70])
def test_all_pages_are_dense_attention(length: int) -> None:
    step = Step(Case(), [length])
    dense = step.kernel().dense(step.q, step.k, step.v, step.table, 0)
    pages = torch.randperm(length // 16 + 1).expand(2, -1).contiguous().to(DEVICE, torch.int32)
    paged = step.kernel().paged(step.q, step.k, step.v, step.table, 0, pages, 16)
    torch.testing.assert_close(paged, dense, atol=1e-5, rtol=0)


def test_pages_behind_the_last_count_for_nothing() -> None:
    step = Step(Case(length=20), [20])
    pages = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.int32, device=DEVICE)
    out = step.kernel().paged(step.q, step.k, step.v, step.table, 0, pages, 16)
    step.close(out, step.expected(0, step.everything(0)))


def test_great_logits_neither_overflow_nor_vanish() -> None:
    step = Step(Case(splits=4), [65])
    step.q.mul_(1e4)
    out = step.kernel().dense(step.q, step.k, step.v, step.table, 0)
    step.close(out, step.expected(0, step.everything(0)))


@pytest.mark.parametrize("heads, kv_heads, d", [(3, 2, 16), (34, 2, 16), (4, 2, 48), (4, 2, 8)])
def test_shapes_it_cannot_do(heads: int, kv_heads: int, d: int) -> None:
    with pytest.raises(ValueError):
        DecodeAttention(heads, kv_heads, d, DEVICE, 2)
