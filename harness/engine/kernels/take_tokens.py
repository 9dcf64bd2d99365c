"""Chosen tokens go into a layer's cache, of every KV head its own: keys, values and positions in one launch."""

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
    at = tl.arange(0, WIDTH)[None, :]
    there = token < count
    inside = there[:, None] & (at < DIM)
    source = tl.load(index + token * index_stride + head * index_head, mask=there, other=0)
    here, go = head * DIM + at, (token[:, None] * KV_HEADS + head) * DIM + at
    tl.store(keys + go, tl.load(k + source[:, None] * k_stride + here, mask=inside, other=0.0), mask=inside)
    tl.store(values + go, tl.load(v + source[:, None] * v_stride + here, mask=inside, other=0.0), mask=inside)
    place = tl.load(positions + source, mask=there, other=0)
    if OWN:
        tl.store(places + token * KV_HEADS + head, place, mask=there)
    else:
        tl.store(places + token, place, mask=there & (head == 0))
