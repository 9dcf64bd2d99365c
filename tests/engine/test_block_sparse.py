"""Attention over chosen keys, plain and by the kernel (interpreted where there is no GPU), against a dense mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from harness.engine import block_pages
from harness.engine.attention import Attention, pick_attention
from harness.engine.shape import ModelShape
from harness.engine.sparse import Choice, listed
from tests.reference.interpreter import DEVICE, kernels

block_sparse = kernels("block_sparse")

CUDA = DEVICE == "cuda"
DTYPE = torch.bfloat16 if CUDA else torch.float32


class Case(NamedTuple):
    """Who attends to how much."""

    n: int
    rows: int
    width: int
    heads: int = 4
    kv_heads: int = 2
    d: int = 16
    singles: bool = False


CASES = [
    Case(1, 64, 64),
    Case(64, 64, 64, singles=True),
    Case(65, 64, 64, 2, 2),
    Case(200, 64, 64, singles=True),
    Case(321, 64, 64, 2, 1, singles=True),
    Case(300, 128, 128),
    Case(257, 128, 128, 3, 1, 32),
    Case(300, 128, 64, singles=True),
]


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values that lie beside each other, as a fused projection leaves them."""
    generator = torch.Generator().manual_seed(case.n)
    every = torch.randn(case.n, case.heads + 2 * case.kv_heads, case.d, generator=generator).to(DEVICE, DTYPE)
    q, k, v = torch.split(every, [case.heads, case.kv_heads, case.kv_heads], 1)
    return q, k, v


def choice(case: Case) -> Choice:
    """The rows' own keys, some blocks before them that begin anywhere, and some single keys between those."""
    generator = torch.Generator().manual_seed(case.n + 1)
    found = [[lists(case, first, generator) for first in range(0, case.n, case.rows)] for _ in range(case.heads)]
    blocks, singles = ([[each[kind] for each in head] for head in found] for kind in (0, 1))
    return Choice(case.rows, case.width, *padded(blocks), *(padded(singles) if case.singles else (None, None)))


def lists(case: Case, first: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    blocks = list(range(first, first + case.rows, case.width))
    singles: list[int] = []
    while (first := first - int(torch.randint(0, 20, (), generator=generator)) - case.width) >= 0:
        if torch.rand((), generator=generator) < 0.5:
            blocks.append(first)
        else:
            singles += range(first, first + case.width, 7)
    return sorted(blocks), sorted(singles)


def padded(lists: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    """With what must not be read behind each list."""
    most = max(1, *(len(one) for head in lists for one in head))
    values = [[one + [10**6] * (most - len(one)) for one in head] for head in lists]
    counts = [[len(one) for one in head] for head in lists]
    return tuple(torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in (values, counts))  # type: ignore[return-value]


def mask(case: Case, chosen: Choice) -> Tensor:
    """[heads, n, n] bool, key by key."""
    found = torch.zeros(case.heads, case.n, case.n, dtype=torch.bool)
    for head in range(case.heads):
        for block in range(chosen.counts.shape[1]):
            rows = slice(block * case.rows, (block + 1) * case.rows)
            for start in chosen.blocks[head, block, : chosen.counts[head, block]].tolist():
                found[head, rows, start : start + case.width] = True
            if chosen.singles is not None and chosen.single_counts is not None:
                found[head, rows, chosen.singles[head, block, : chosen.single_counts[head, block]].long().cpu()] = True
    return found.tril()


def written_out(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    q, k, v = (x.float().cpu().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    weights = (q @ k.transpose(1, 2) / q.shape[2] ** 0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    out: Tensor = weights @ v
    return out.transpose(0, 1).flatten(1)


def kernel(q: Tensor, k: Tensor, v: Tensor, chosen: Choice) -> Any:
    lists = chosen.blocks, chosen.counts, chosen.width, chosen.rows, chosen.singles, chosen.single_counts
    return block_sparse.block_sparse_attention(q, k, v, *lists)


def check(case: Case, chosen: Choice, found: tuple[Tensor, Tensor]) -> None:
    q, k, v = tensors(case)
    seen, (out, pairs) = mask(case, chosen), found
    expected = written_out(q, k, v, seen)
    assert (out.float().cpu() - expected).norm() <= (1e-2 if CUDA else 1e-6) * expected.norm()
    assert pairs.dtype == torch.int32
    assert pairs.tolist() == [[int(rows.sum()) for rows in head.split(case.rows)] for head in seen]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plainly(case: Case) -> None:
    chosen = choice(case)
    check(case, chosen, chosen.attend(Attention(), *tensors(case)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel(case: Case) -> None:
    chosen = choice(case)
    check(case, chosen, kernel(*tensors(case), chosen))


def test_heads_may_share_a_list() -> None:
    case = Case(200, 64, 64)
    one = choice(case)
    shared = Choice(64, 64, one.blocks[:1].expand(4, -1, -1), one.counts[:1].expand(4, -1))
    check(case, shared, kernel(*tensors(case), shared))
    check(case, shared, shared.attend(Attention(), *tensors(case)))


def test_a_map_of_blocks_becomes_lists() -> None:
    case = Case(300, 128, 128)
    chosen = torch.rand(4, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    chosen |= torch.eye(3, dtype=torch.bool)
    found = Choice.on_grid(chosen.to(DEVICE), 128)
    expected = chosen.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :300, :300].tril()
    assert torch.equal(mask(case, found), expected)
    check(case, found, found.attend(Attention(), *tensors(case)))


@pytest.mark.parametrize(("n", "apart"), [(384, True), (300, True), (300, False), (1, True)])
def test_blocks_are_read_as_pages(n: int, apart: bool) -> None:
    case = Case(n, 128, 128, d=128 if CUDA else 16)
    blocks = -(-n // 128)
    found = Choice.on_grid(
        (torch.rand(4, blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.5).to(DEVICE), 128
    )
    q, k, v = tensors(case) if apart else (x.contiguous() for x in tensors(case))
    out = block_pages.attend(paging(), q, k, v, found.blocks, found.counts)
    check(case, found, (out, found._pairs(n)))


def paging() -> Attention:
    """What reads pages: FlashAttention 3 where it runs, else the plain loop."""
    if not CUDA:
        return Attention()
    shape = ModelShape("llama", 1, 512, 512, 4, 2, 128, 512, 512)
    return pick_attention("auto", shape, torch.device(DEVICE), DTYPE)


def test_rows_have_their_own_block() -> None:
    found = Choice.on_grid(torch.zeros(1, 3, 3, dtype=torch.bool), 128)
    assert found.blocks[0, :, 0].tolist() == [0, 128, 256] and found.counts.tolist() == [[1, 1, 1]]


def test_chosen_values_move_to_the_front() -> None:
    values = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 7]], dtype=torch.int32)
    chosen = torch.tensor([[False, True, True], [True, True, True], [False, False, False]])
    out, counts = listed(values, chosen)
    assert counts.tolist() == [2, 3, 0] and out.dtype == counts.dtype == torch.int32
    assert out[0, :2].tolist() == [6, 7] and out[1].tolist() == [5, 6, 7]
