"""What blocks of rows with a common window lack of a band: the far edge of each row's own window, and the sinks."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from harness.engine.kernels.online_softmax import weigh

_ROWS = 64
"""Rows a program: several of them wait for memory at a time on each multiprocessor."""


def join_edges(
    done: Tensor, norms: Tensor, q: Tensor, q_sink: Tensor, k: Tensor, v: Tensor, sinks: int, window: int, out: Tensor
) -> None:
    """Joins attention to a band's edges with attention to what lies between them.

    The last rows of the text are in blocks: row i of a block that ends with row e has attended to the keys j <= i with
    j > e - window. It lacks those with i - window < j <= e - window, and the sinks j <= i - window.

    Args:
        done: [blocks, rows, heads, d] contiguous, rows and d powers of two and at least 16.
        norms: the logs of its softmaxes' denominators, [blocks, rows, heads] float32.
        q, q_sink, k, v, sinks, window: as in `band.banded`, of the whole text; rows <= window. Tokens may lie
            apart, heads and channels may not.
        out: [blocks * rows, heads * d] contiguous, receives the result.
    """
    (blocks, rows, heads, dim), sinks = done.shape, min(sinks, len(k))
    assert done.is_contiguous() and out.is_contiguous()
    assert all(x.stride()[1:] == (dim, 1) for x in (q, q_sink, k, v))
    part = min(rows, _ROWS)
    _join[(heads, blocks * (rows // part))](
        done, norms, q, q_sink, k, v, out, len(q) - blocks * rows, sinks, window,
        *norms.stride(), q.stride(0), q_sink.stride(0), k.stride(0), v.stride(0),
        GROUP=heads // k.shape[1], DIM=dim, ROWS=rows, PART=part,
        TILE=min(part, max(16, triton.next_power_of_2(sinks))),
        SCALE=dim**-0.5 * math.log2(math.e), LOG2E=math.log2(math.e), num_warps=max(1, part // 16), num_stages=1,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _take_in(
    query, k, v, first, step, there, seen, k_stride, v_stride, top, total, acc, DIM: tl.constexpr, SCALE: tl.constexpr
) -> Any:
    """Attends to those of the tokens from the `first` on that are `there` and `seen`."""
    at = tl.arange(0, DIM)
    k += first * k_stride
    v += first * v_stride
    key = tl.load(k + step[None, :] * k_stride + at[:, None], mask=there[None, :], other=0.0)
    value = tl.load(v + step[:, None] * v_stride + at[None, :], mask=there[:, None], other=0.0)
    return weigh(query, key, value, top, total, acc, there[None, :] & seen, True, SCALE)


@triton.jit(do_not_specialize=["rest", "sinks", "window", "norm_block", "norm_row", "norm_head"])  # type: ignore[untyped-decorator]
def _join(
    done, norms, q, q_sink, k, v, out, rest, sinks, window, norm_block, norm_row, norm_head,
    q_stride, q_sink_stride, k_stride, v_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr,
    SCALE: tl.constexpr, LOG2E: tl.constexpr,
) -> Any:  # fmt: skip
    """A part of a block of rows, of one head; `rest` rows of the text come before the first block."""
    PARTS: tl.constexpr = ROWS // PART
    head, block = tl.program_id(0), (tl.program_id(1) // PARTS).to(tl.int64)
    begin = tl.program_id(1) % PARTS * PART
    at, step, wide = tl.arange(0, DIM), tl.arange(0, PART), tl.num_programs(0) * DIM
    k += head // GROUP * DIM
    v += head // GROUP * DIM
    first = rest + block * ROWS + begin
    place = (block * ROWS + begin) * wide + head * DIM + (step[:, None] * wide + at[None, :])
    query = tl.load(q + first * q_stride + head * DIM + (step[:, None] * q_stride + at[None, :]))
    query_sink = tl.load(q_sink + first * q_sink_stride + head * DIM + (step[:, None] * q_sink_stride + at[None, :]))
    top = tl.load(norms + block * norm_block + (begin + step) * norm_row + head * norm_head) * LOG2E
    total, acc = tl.full((PART,), 1.0, tl.float32), tl.load(done + place).to(tl.float32)

    # The key behind the first row's window, the one behind the second's, ...: a row's own window begins after its own.
    behind = first - window
    for start in tl.range(0, ROWS - begin, PART):
        after = start + step
        top, total, acc = _take_in(
            query, k, v, behind, after, behind + after >= 0, after[None, :] > step[:, None],
            k_stride, v_stride, top, total, acc, DIM, SCALE,
        )  # fmt: skip
    each = tl.arange(0, TILE)
    for start in tl.range(0, sinks, TILE):
        sink = start + each
        top, total, acc = _take_in(
            query_sink, k, v, tl.cast(start, tl.int64), each, sink < sinks, sink[None, :] <= behind + step[:, None],
            k_stride, v_stride, top, total, acc, DIM, SCALE,
        )  # fmt: skip
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty))
