"""Keys, values and positions of a layer's rows go to where its cache lies, as a table on the device tells.

In a recorded prefill neither the caches' addresses nor how many of the rows are a prompt's may be an argument: both
change from request to request.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_ROWS = 8
COLUMNS = tl.constexpr(4)
"""Of the table: addresses of keys, of values and of positions, and how many rows are stored."""


def store_rows(k: Tensor, v: Tensor, positions: Tensor, table: Tensor, layer: int) -> None:
    """Copies the first rows into a cache; those behind them are padding.

    Args:
        k, v: [n, kv_heads, d], the heads of a row contiguous.
        positions: [n] int64.
        table: [layers, 4] int64; see `COLUMNS`. Caches are contiguous and have room for the rows.
        layer: whose line of the table counts.
    """
    n, width = len(k), k.shape[1] * k.shape[2]
    assert k.stride()[1:] == v.stride()[1:] == (k.shape[2], 1)
    grid = (triton.cdiv(n, _ROWS), triton.cdiv(width, block := min(1024, triton.next_power_of_2(width))))
    _store[grid](k, v, positions, table, layer, n, k.stride(0), v.stride(0), width, BLOCK=block, ROWS=_ROWS)


@triton.jit(do_not_specialize=["layer", "n"])  # type: ignore[untyped-decorator]
def _store(k, v, positions, table, layer, n, k_stride, v_stride, width, BLOCK: tl.constexpr, ROWS: tl.constexpr) -> Any:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    line = table + layer * COLUMNS
    pointer = tl.pointer_type(k.dtype.element_ty)
    there = row < tl.minimum(tl.load(line + 3), n)
    inside, long = there[:, None] & (at < width), row.to(tl.int64)[:, None]
    keys = tl.multiple_of(tl.load(line).to(pointer), 16)
    values = tl.multiple_of(tl.load(line + 1).to(pointer), 16)
    tl.store(keys + long * width + at, tl.load(k + long * k_stride + at, mask=inside, other=0.0), mask=inside)
    tl.store(values + long * width + at, tl.load(v + long * v_stride + at, mask=inside, other=0.0), mask=inside)
    if tl.program_id(1) == 0:
        places = tl.load(line + 2).to(tl.pointer_type(tl.int64))
        tl.store(places + row, tl.load(positions + row, mask=there, other=0), mask=there)
