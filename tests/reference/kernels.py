"""A kernel that both take, and one that only the interpreter does."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def plain(x, n, BLOCK: tl.constexpr) -> Any:
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def type_in_a_tuple(x, n, BLOCK: tl.constexpr) -> Any:
    at, pointer = tl.arange(0, BLOCK), tl.pointer_type(tl.int64)
    tl.store(x.to(pointer) + at, 0, mask=at < n)
