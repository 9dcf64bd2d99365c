"""Keys, values and positions of a layer's rows go to where a table on the device tells, and their last queries.

In a recorded prefill neither the places' addresses nor how many of the rows are a prompt's may be an argument: both
change from request to request.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_ROWS = 8
COLUMNS = tl.constexpr(7)
"""Of the table, see `store_rows`."""


def store_rows(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor, layer: int) -> None:
    """Copies the first rows; those behind them are padding.

    Args:
        q: [n, heads, d], the heads of a row contiguous.
        k, v: [n, kv_heads, d], likewise.
        positions: [n] int64.
        table: [layers, 7] int64: addresses for keys, values, positions (0: nowhere) and queries; how many rows there
            are, and the first of them whose query is stored; elements from a row's keys to the next one's in their
            place, of which queries have as many times more as there are heads to a KV head.
        layer: whose line of the table counts.
    """
    n, width, group = len(k), k.shape[1] * k.shape[2], q.shape[1] // k.shape[1]
    assert q.stride()[1:] == k.stride()[1:] == v.stride()[1:] == (k.shape[2], 1)
    blocks = triton.cdiv(width, block := min(1024, triton.next_power_of_2(width)))
    _store[triton.cdiv(n, _ROWS), blocks * (1 + group)](
        q, k, v, positions, table, layer, n, q.stride(0), k.stride(0), v.stride(0), width, blocks,
        GROUP=group, ALIGNED=math.gcd(width, 16), BLOCK=block, ROWS=_ROWS,
    )  # fmt: skip


@triton.jit
def _copy(x, row, x_stride, place, place_row, stride, at, width, there) -> Any:
    inside = there[:, None] & (at < width)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * x_stride + at[None, :], mask=inside, other=0.0)
    place = tl.multiple_of(place.to(tl.pointer_type(x.dtype.element_ty)), 16)
    tl.store(place + place_row.to(tl.int64)[:, None] * stride + at[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["layer", "n"])  # type: ignore[untyped-decorator]
def _store(
    q, k, v, positions, table, layer, n, q_stride, k_stride, v_stride, width, blocks,
    GROUP: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
) -> Any:  # fmt: skip
    row, part = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    line = table + layer * COLUMNS
    count, stride = tl.minimum(tl.load(line + 4), n), tl.multiple_of(tl.load(line + 6), ALIGNED)
    if part < blocks:
        there, at = row < count, part * BLOCK + tl.arange(0, BLOCK)
        _copy(k, row, k_stride, tl.load(line), row, stride, at, width, there)
        _copy(v, row, v_stride, tl.load(line + 1), row, stride, at, width, there)
        places = tl.load(line + 2)
        here = tl.load(positions + row, mask=there, other=0)
        tl.store(places.to(tl.pointer_type(tl.int64)) + row, here, mask=there & (part == 0) & (places != 0))
    else:
        first, at = tl.load(line + 5), (part - blocks) * BLOCK + tl.arange(0, BLOCK)
        there = (row >= first) & (row < count)
        _copy(q, row, q_stride, tl.load(line + 3), row - first, stride * GROUP, at, width * GROUP, there)
