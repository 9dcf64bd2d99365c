"""Rows on their way through the layers that go on, with all that they carry, in one launch."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


def take_rows(
    hidden: Tensor, positions: Tensor, attended: Tensor | None, index: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows at an index.

    Args:
        hidden: [n, width], rows contiguous. positions: [n] int64. attended: [n, another width], rows contiguous.
        index: [m] int64.

    Returns:
        The same of [m] rows.
    """
    m = len(index)
    carried = [hidden] if attended is None else [hidden, attended]
    taken, places = [x.new_empty((m, x.shape[1])) for x in carried], positions.new_empty(m)
    assert all(x.stride(1) == 1 for x in carried) and positions.is_contiguous()
    # What is not carried is not touched.
    x, out = carried[-1], taken[-1]
    _take[m, len(carried)](
        hidden, x, positions, index.contiguous(), taken[0], out, places, hidden.stride(0), x.stride(0),
        hidden.shape[1], x.shape[1], BLOCK=triton.next_power_of_2(max(hidden.shape[1], x.shape[1])), num_warps=4,
    )  # fmt: skip
    return taken[0], places, None if attended is None else out


@triton.jit  # type: ignore[untyped-decorator]
def _take(
    hidden, attended, positions, index, hidden_out, attended_out, places, hidden_stride, attended_stride,
    hidden_width, attended_width, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """One row, of one of both."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    source = tl.load(index + row)
    if tl.program_id(1) == 0:
        tl.store(places + row, tl.load(positions + source))
        state = tl.load(hidden + source * hidden_stride + at, mask=at < hidden_width)
        tl.store(hidden_out + row * hidden_width + at, state, mask=at < hidden_width)
    else:
        more = tl.load(attended + source * attended_stride + at, mask=at < attended_width)
        tl.store(attended_out + row * attended_width + at, more, mask=at < attended_width)
