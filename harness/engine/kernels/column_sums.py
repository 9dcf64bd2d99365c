"""Sums over many rows of a function of their products with every key or value: [rows, heads, d] x [n, kv_heads, d].

No product is stored. A program owns a block of columns (tokens) of one KV head and walks over all rows of its query
heads, so sums have one order and need no atomics; the products are matrix products of half precision with float32 sums.

- `attention_sums`: the function is exp(q k / sqrt(d) - norm), of rows that may see the token: attention that it got
  (H2O, Zhang et al., arXiv 2306.14048; SnapKV, Li et al., arXiv 2404.14469).
- `absolute_sums`: the function is the absolute value (CriticalKV, Feng et al., arXiv 2502.03805).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))
# Keys that a program takes for its share of a row's norm.
_SHARE = 1024
# Rows whose shares a program joins.
_JOINED = 128


class Tile(NamedTuple):
    """How the work is cut.

    Attributes:
        columns, rows: of a tile of products.
        warps, stages: of a program.
        registers: of a thread; so few that three programs share a multiprocessor, and one multiplies while another
            takes exponentials.
    """

    columns: int = 128
    rows: int = 64
    warps: int = 4
    stages: int = 2
    registers: int = 168

    def options(self) -> dict[str, int]:
        """For a launch."""
        return {
            "COLUMNS": self.columns, "ROWS": self.rows,
            "num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers,
        }  # fmt: skip


_TILE = Tile()
# No exponentials to hide: one program with more columns reads the weights less often.
_ABSOLUTE_TILE = Tile(columns=256, warps=8, registers=128)
# Here the stages are of columns, and fewer of them fit.
_NORMS_TILE = Tile(columns=64)


def attention_sums(q: Tensor, k: Tensor, norms: Tensor, tile: Tile = _TILE, *, factor: float = 1.0) -> Tensor:
    """Attention that each token receives, summed over queries and the query heads of a KV head, times a factor.

    Args:
        q: [w, heads, d], the queries of the last w of the n tokens; each sees the tokens up to its own. Channels of a
            head are contiguous.
        k: [n, kv_heads, d], likewise.
        norms: [w, heads] float32, of every query, log of the sum of exp(q k / sqrt(d)).
        tile: how the work is cut.
        factor: of all sums.

    Returns:
        [kv_heads, n] float32.
    """
    sums = torch.empty((k.shape[1], k.shape[0]), dtype=torch.float32, device=k.device)
    _sums[_grid(k, tile)](
        q, k, norms, sums, len(q), len(k), *_strides(q, k), *norms.stride(), factor,
        SCALE=q.shape[2] ** -0.5 * LOG2_E.value, GROUP=q.shape[1] // k.shape[1], KV_HEADS=k.shape[1], DIM=q.shape[2],
        ATTENTION=True,
        **tile.options(),
    )  # fmt: skip
    return sums


def absolute_sums(each: Sequence[Tensor], v: Tensor, tile: Tile = _ABSOLUTE_TILE) -> Tensor:
    """Sums of |x v| over rows and the query heads of a KV head, for several x, each with values of its own.

    Args:
        each: x of [m, heads, d], alike but for where they lie. Channels of a head are contiguous.
        v: [n, len(each) * kv_heads, d], likewise.
        tile: how the work is cut.

    Returns:
        [len(each) * kv_heads, n] float32.
    """
    x, kv_heads = each[0], v.shape[1] // len(each)
    assert all(other.stride() == x.stride() and other.dtype == v.dtype for other in each)
    sums = torch.empty((v.shape[1], v.shape[0]), dtype=torch.float32, device=v.device)
    places = torch.tensor([x.data_ptr() for x in each]).to(v.device, non_blocking=True)
    _sums[_grid(v, tile)](
        places, v, sums, sums, len(x), len(v), *_strides(x, v), 0, 0, 1.0,
        SCALE=1.0, GROUP=x.shape[1] // kv_heads, KV_HEADS=kv_heads, DIM=x.shape[2], ATTENTION=False,
        **tile.options(),
    )  # fmt: skip
    return sums


def row_norms(q: Tensor, k: Tensor, tile: Tile = _NORMS_TILE) -> Tensor:
    """The norms that `attention_sums` asks for, [w, heads] float32, where no attention has left them: one more pass."""
    norms = share_norms(q, k, _SHARE, tile)
    if len(norms) == 1:
        return norms[0]
    whole = torch.empty_like(norms[0])
    _join[(triton.cdiv(whole.numel(), _JOINED),)](norms, whole, whole.numel(), len(norms), BLOCK=_JOINED, num_warps=4)
    return whole


def share_norms(q: Tensor, k: Tensor, share: int, tile: Tile = _NORMS_TILE) -> Tensor:
    """The same by shares of so many tokens, [shares, w, heads]; of a row that sees none, next to nothing."""
    (w, heads, d), kv_heads = q.shape, k.shape[1]
    group, shares = heads // kv_heads, triton.cdiv(len(k), share)
    norms = torch.empty((shares, w, heads), dtype=torch.float32, device=q.device)
    _norms[kv_heads, shares, triton.cdiv(w * group, tile.rows)](
        q, k, norms, w, len(k), share, *_strides(q, k),
        SCALE=d**-0.5 * LOG2_E.value, HEADS=heads, GROUP=group, DIM=d,
        **tile.options(),
    )  # fmt: skip
    return norms


def _grid(y: Tensor, tile: Tile) -> tuple[int, int]:
    # Programs start in this order: the first columns, which most rows see, of all heads first.
    return y.shape[1], triton.cdiv(y.shape[0], tile.columns)


def _strides(x: Tensor, y: Tensor) -> tuple[int, int, int, int]:
    assert x.stride(2) == y.stride(2) == 1, "channels of a head must be contiguous"
    return x.stride(0), x.stride(1), y.stride(0), y.stride(1)


@triton.jit
def _tile(
    x, first, count, kv_head, row_stride, head_stride, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr
) -> Any:
    """Rows from the `first` on, a query's heads beside each other: their indices, heads, which there are, values."""
    each = first + tl.arange(0, ROWS)
    row, head = each // GROUP, kv_head * GROUP + each % GROUP
    there = row < count
    place = row.to(tl.int64)[:, None] * row_stride + head[:, None] * head_stride + tl.arange(0, DIM)[None, :]
    return row, head, there, tl.load(x + place, mask=there[:, None], other=0.0)


@triton.jit
def _columns(y, column, n, kv_head, row_stride, head_stride, DIM: tl.constexpr) -> Any:
    """[DIM, columns]."""
    place = column.to(tl.int64)[None, :] * row_stride + kv_head * head_stride + tl.arange(0, DIM)[:, None]
    return tl.load(y + place, mask=(column < n)[None, :], other=0.0)


@triton.jit
def _walk(
    acc, x, key, norms, begin, end, past, column, count, kv_head, x_stride, x_head, norm_stride, norm_head,
    SCALE: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ATTENTION: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
) -> Any:  # fmt: skip
    """Adds what the rows from `begin` to `end` contribute, a tile at a time; sums over rows are left for the end."""
    for first in tl.range(begin, end, ROWS):
        row, head, there, tile = _tile(x, first, count, kv_head, x_stride, x_head, GROUP, DIM, ROWS)
        if ATTENTION:
            place = row.to(tl.int64) * norm_stride + head * norm_head
            norm = tl.load(norms + place, mask=there, other=float("inf")) * LOG2_E
            logit = tl.dot(tile, key, input_precision="ieee") * SCALE - norm[:, None]
            if CAUSAL:
                logit = tl.where(column[None, :] <= past + row[:, None], logit, float("-inf"))
            acc += tl.exp2(logit)
        else:
            acc += tl.abs(tl.dot(tile, key, input_precision="ieee"))
    return acc


@triton.jit(do_not_specialize=["count", "n"])  # type: ignore[untyped-decorator]
def _sums(
    x, y, norms, sums, count, n, x_stride, x_head, y_stride, y_head, norm_stride, norm_head, factor,
    SCALE: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ATTENTION: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
) -> Any:  # fmt: skip
    kv_head, block = tl.program_id(0), tl.program_id(1)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    key, own = _columns(y, column, n, kv_head, y_stride, y_head, DIM), kv_head
    if not ATTENTION:
        # Where the rows lie that go with this head.
        x, own = tl.load(x + kv_head // KV_HEADS).to(tl.pointer_type(y.dtype.element_ty)), kv_head % KV_HEADS
        x = tl.multiple_of(x, 16)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    begin, past = 0, n - count
    if ATTENTION:
        # The first row that sees a token of the block, and the first that sees all of them: between them lies the mask.
        begin = tl.maximum(block * COLUMNS - past, 0) * GROUP // ROWS * ROWS
        middle = tl.minimum(tl.maximum((block + 1) * COLUMNS - 1 - past, 0), count) * GROUP
        middle = tl.cdiv(middle, ROWS) * ROWS
        acc = _walk(
            acc, x, key, norms, begin, middle, past, column, count, own, x_stride, x_head, norm_stride, norm_head,
            SCALE, GROUP, DIM, ATTENTION, True, ROWS,
        )  # fmt: skip
        begin = middle
    acc = _walk(
        acc, x, key, norms, begin, count * GROUP, past, column, count, own, x_stride, x_head, norm_stride,
        norm_head, SCALE, GROUP, DIM, ATTENTION, False, ROWS,
    )  # fmt: skip
    tl.store(sums + kv_head.to(tl.int64) * n + column, tl.sum(acc, 0) * factor, mask=column < n)


@triton.jit(do_not_specialize=["count", "n", "size"])  # type: ignore[untyped-decorator]
def _norms(
    x, y, norms, count, n, size, x_stride, x_head, y_stride, y_head,
    SCALE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
) -> Any:  # fmt: skip
    """A tile of rows against a share of the tokens."""
    kv_head, share = tl.program_id(0), tl.program_id(1)
    row, head, there, tile = _tile(x, tl.program_id(2) * ROWS, count, kv_head, x_stride, x_head, GROUP, DIM, ROWS)
    top, total = tl.full((ROWS,), -1.0e30, tl.float32), tl.zeros((ROWS,), tl.float32)
    for first in tl.range(share * size, tl.minimum((share + 1) * size, n), COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        key = _columns(y, column, n, kv_head, y_stride, y_head, DIM)
        seen = (column < n)[None, :] & (column[None, :] <= n - count + row[:, None])
        logit = tl.where(seen, tl.dot(tile, key, input_precision="ieee") * SCALE, float("-inf"))
        higher = tl.maximum(top, tl.max(logit, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(logit - higher[:, None]), 1)
        top = higher
    place = (share * count + row).to(tl.int64) * HEADS + head
    # A share of which a row sees nothing adds nothing to its norm.
    tl.store(norms + place, (top + tl.log2(tl.maximum(total, 1.0e-30))) / LOG2_E, mask=there)


@triton.jit(do_not_specialize=["count", "shares"])  # type: ignore[untyped-decorator]
def _join(norms, whole, count, shares, BLOCK: tl.constexpr) -> Any:
    """Log of the sum of what the shares of a row are the logs of; PyTorch takes six launches for it."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = row < count
    top, total = tl.full((BLOCK,), -1.0e30, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for _ in tl.range(0, shares):
        norm = tl.load(norms + row, mask=there, other=0.0) * LOG2_E
        higher = tl.maximum(top, norm)
        total = total * tl.exp2(top - higher) + tl.exp2(norm - higher)
        top = higher
        norms += count
    tl.store(whole + row, (top + tl.log2(total)) / LOG2_E, mask=there)
