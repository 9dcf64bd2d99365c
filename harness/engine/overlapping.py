"""Attention of a band by a kernel that knows causal attention alone: over overlapping views of the keys.

The rows are cut into blocks, and with each go the keys of the window of its last row. That is causal attention of
fewer queries than keys, one call for all blocks; windows overlap, so their keys and values are views and no copies.
What a row lacks is the far edge of its own window, fewer keys than a block has rows, and the sinks: one more kernel,
`harness.engine.kernels.band_edges`, adds both.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

ROWS = 128
"""Rows a block: as many as FlashAttention 3 has in a tile."""

Normalised = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def overlapping(
    normalised: Normalised, q: Tensor, q_sink: Tensor, k: Tensor, v: Tensor, sinks: int, window: int
) -> Tensor:
    """As `Attention.banded`, with a window of `ROWS` at least.

    Args:
        normalised: causal attention as `Attention.normalised` has it; of n queries and m >= n keys it takes the queries
            for the last n.
        q, q_sink, k, v, sinks, window: as in `Attention.banded`; d a power of two and at least 16. Tokens may lie
            apart, heads and channels may not.
    """
    n, heads, dim = q.shape
    blocks = -(-(n - window) // ROWS)
    if blocks <= 0:
        return normalised(*(x.unsqueeze(0) for x in (q, k, v)))[0][0].flatten(1)
    from harness.engine.kernels.band_edges import join_edges

    first = n - blocks * ROWS
    out = q.new_empty((n, heads * dim))
    out[:first] = normalised(*(x[:first].unsqueeze(0) for x in (q, k, v)))[0][0].flatten(1)
    last = (_windows(x[first + ROWS - window :], blocks, window) for x in (k, v))
    done, norms = normalised(q[first:].view(blocks, ROWS, heads, dim), *last)
    join_edges(done, norms, q, q_sink, k, v, sinks, window, out[first:])
    return out


def _windows(x: Tensor, blocks: int, window: int) -> Tensor:
    """[n, kv_heads, d] -> [blocks, window, kv_heads, d], each `ROWS` further on; a view."""
    return x.as_strided((blocks, window, *x.shape[1:]), (ROWS * x.stride(0), *x.stride()), x.storage_offset())
