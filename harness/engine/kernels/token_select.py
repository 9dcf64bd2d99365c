"""The best tokens of every KV head, of equal ones the first, in the order of the text.

A radix search for the last one that is chosen, then one more pass that lists: neither sorts. A program has a list, so
lists of one layer run side by side, and their scores stay in the second level of cache between passes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.engine.kernels.radix import list_best


def best_tokens(scores: Tensor, counts: Tensor | None, most: int, *, block: int = 16384, warps: int = 16) -> Tensor:
    """Lists the best tokens.

    Args:
        scores: [lists, n] float32 contiguous, without NaN.
        counts: [lists] int64, how many of each list: 0 to `most`, which is at most n. None for `most` of each.
        most: how long a list is.
        block: scores that a program looks at a time. warps: of a program.

    Returns:
        [lists, most] int64: the first `counts` of each row are ascending, what is behind them means nothing.
    """
    lists, n = scores.shape
    assert scores.is_contiguous() and most <= n
    tokens = torch.empty((lists, most), dtype=torch.int64, device=scores.device)
    # No fewer than threads: what several of them hold a histogram may count more than once.
    block = max(32 * warps, min(block, triton.next_power_of_2(n)))
    _best[(lists,)](scores, counts, tokens, n, most, BLOCK=block, num_warps=warps)
    return tokens


@triton.jit(do_not_specialize=["n", "most"])  # type: ignore[untyped-decorator]
def _best(scores, counts, tokens, n, most, BLOCK: tl.constexpr) -> Any:
    scores += tl.program_id(0).to(tl.int64) * n
    tokens += tl.program_id(0).to(tl.int64) * most
    count = most
    if counts is not None:
        count = tl.load(counts + tl.program_id(0)).to(tl.int32)
    list_best(tokens, scores, n, count, BLOCK)
