"""Chosen tokens go into caches, of every KV head its own: keys, values and positions in one launch.

Of one layer, whose cache is an argument, or of many at once, as a table on the device tells.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16


def take_tokens(
    k: Tensor, v: Tensor, positions: Tensor, index: Tensor, keys: Tensor, values: Tensor, places: Tensor
) -> None:
    """Copies the tokens at an index.

    Args:
        k, v: [n, kv_heads, d], the heads of a token contiguous.
        positions: [n] int64 contiguous.
        index: [m, kv_heads] int64, or [m] where all heads take the same tokens; any strides.
        keys, values: where they go, [m, kv_heads, d] contiguous.
        places: where their positions go, [m, kv_heads] int64, or [m, 1] where all heads take the same; contiguous.
    """
    (count, *own), (_, kv_heads, dim) = index.shape, k.shape
    assert k.stride()[1:] == v.stride()[1:] == (dim, 1)
    _take[triton.cdiv(count, _ROWS), kv_heads](
        k, v, positions, index, keys, values, places, count, k.stride(0), v.stride(0), index.stride(0),
        index.stride(1) if own else 0, KV_HEADS=kv_heads, DIM=dim, WIDTH=triton.next_power_of_2(dim), OWN=bool(own),
        ROWS=_ROWS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _take(
    k, v, positions, index, keys, values, places, count, k_stride, v_stride, index_stride, index_head,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, ROWS: tl.constexpr,
) -> Any:  # fmt: skip
    token, head = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.program_id(1)
    there = token < count
    source = tl.load(index + token * index_stride + head * index_head, mask=there, other=0)
    go = (token * KV_HEADS + head) * DIM
    _copy(k + head * DIM, v + head * DIM, source, k_stride, v_stride, keys, values, go, there, DIM, WIDTH)
    place = tl.load(positions + source, mask=there, other=0)
    if OWN:
        tl.store(places + token * KV_HEADS + head, place, mask=there)
    else:
        tl.store(places + token, place, mask=there & (head == 0))


@triton.jit
def _copy(
    k, v, source, k_stride, v_stride, keys, values, go, there, DIM: tl.constexpr, WIDTH: tl.constexpr
) -> Any:  # fmt: skip
    """Keys and values of one head, from rows at a stride to where each goes."""
    at = tl.arange(0, WIDTH)[None, :]
    inside, go = there[:, None] & (at < DIM), go[:, None] + at
    tl.store(keys + go, tl.load(k + source[:, None] * k_stride + at, mask=inside, other=0.0), mask=inside)
    tl.store(values + go, tl.load(v + source[:, None] * v_stride + at, mask=inside, other=0.0), mask=inside)


def take_lists(k: Tensor, v: Tensor, positions: Tensor, lists: Tensor, table: Tensor, *, own: bool) -> None:
    """Copies the tokens of lists into caches, each of which holds as many KV heads.

    Args:
        k, v: [n, heads, d], the heads of a token contiguous: those of all caches side by side.
        positions: [n] int64 contiguous.
        lists: [heads, m] int64 contiguous, or a list for every few heads.
        table: [caches, 4] int64: the contiguous caches' addresses of keys, of values and of positions, and how many
            tokens of its lists one takes.
        own: whether a cache has a position for each of its heads; otherwise, one for all of them.
    """
    (count, most), (_, heads, dim) = lists.shape, k.shape
    assert k.stride()[1:] == v.stride()[1:] == (dim, 1) and lists.is_contiguous()
    _take_lists[triton.cdiv(most, _ROWS), heads](
        k, v, positions, lists, table, most, k.stride(0), v.stride(0),
        SHARING=heads // count, KV_HEADS=heads // len(table), DIM=dim, WIDTH=triton.next_power_of_2(dim), OWN=own,
        ROWS=_ROWS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["most"])  # type: ignore[untyped-decorator]
def _take_lists(
    k, v, positions, lists, table, most, k_stride, v_stride,
    SHARING: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr,
    ROWS: tl.constexpr,
) -> Any:  # fmt: skip
    token, head = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.program_id(1)
    line, own = table + head // KV_HEADS * 4, head % KV_HEADS
    pointer = tl.pointer_type(k.dtype.element_ty)
    keys, values = tl.load(line).to(pointer), tl.load(line + 1).to(pointer)
    there = token < tl.load(line + 3)
    source = tl.load(lists + (head // SHARING).to(tl.int64) * most + token, mask=there, other=0)
    keys, values, go = tl.multiple_of(keys, 16), tl.multiple_of(values, 16), (token * KV_HEADS + own) * DIM
    _copy(k + head * DIM, v + head * DIM, source, k_stride, v_stride, keys, values, go, there, DIM, WIDTH)
    places, place = tl.load(line + 2).to(tl.pointer_type(tl.int64)), tl.load(positions + source, mask=there, other=0)
    if OWN:
        tl.store(places + token * KV_HEADS + own, place, mask=there)
    else:
        tl.store(places + token, place, mask=there & (own == 0))
