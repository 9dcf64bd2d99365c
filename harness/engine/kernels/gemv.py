"""One token's matrix products, bound by reading the weights once.

y = W x with what surrounds it in a decoder layer fused in, so that a layer's decode step is five launches: the RMS norm
before it (the factor 1/rms is applied to the sum, so one pass over x is enough), bias, rotary positions, SwiGLU or the
residual after it. Each program owns a few rows of W and walks along them; sums are float32. How many rows, and how much
of them is on its way at once, depends on the shape of W (`_TILINGS`).

With programmatic dependent launch a kernel starts while the one before it still runs: its weights depend on nobody,
so their first tiles are on their way when x is ready.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiling(NamedTuple):
    """How a product is cut.

    Where tiles have 256 elements a warp or more, the order of a row's sums depends on `block` and `warps` alone.
    """

    rows: int
    """Of the weight, that a program owns; a power of two, at least 2 where rows come in pairs."""
    block: int
    """Columns of a tile, a power of two."""
    ahead: int = 1
    """Tiles that are on their way to a program at once."""
    warps: int = 4
    """Of a program; with more than a 256th of `block`, x passes through shared memory."""


# By product, the tiling of weights of at most so many rows and columns; the first that fits counts. The best of those
# tried on an H200, see docs/performance.md: weights of few or short rows need more programs, or more under way.
_ANY = 1 << 62
_TILINGS: dict[str, tuple[tuple[int, int, Tiling], ...]] = {
    "norm": ((_ANY, 2048, Tiling(4, 512, 3, 2)), (_ANY, _ANY, Tiling(4, 1024, 2))),
    "add": ((2048, 2048, Tiling(2, 1024)), (2048, _ANY, Tiling(2, 1024, 4)), (_ANY, _ANY, Tiling(4, 1024))),
    "swiglu": ((_ANY, 2048, Tiling(4, 512, 3, 2)), (_ANY, _ANY, Tiling(4, 1024, 2))),
    "qkv": ((_ANY, 2048, Tiling(8, 512, 3, 2)), (_ANY, _ANY, Tiling(16, 512))),
}


def tiling(product: str, n: int, k: int) -> Tiling:
    """Of a weight of [n, k]."""
    return next(each for rows, columns, each in _TILINGS[product] if n <= rows and k <= columns)


def norm_gemv(x: Tensor, gain: Tensor, eps: float, weight: Tensor, *, pdl: bool = False) -> Tensor:
    """W norm(x): [1, k] -> [1, n].

    Args:
        x: [1, k]. gain: the norm's weight, [k]. eps: its epsilon.
        weight: [n, k] contiguous.
    """
    out = x.new_empty((1, weight.shape[0]))
    _launch("norm", _plain, x, weight, gain, out, out, eps, pdl, NORM=True, ADD=False)
    return out


def add_gemv(residual: Tensor, x: Tensor, weight: Tensor, *, pdl: bool = False) -> Tensor:
    """residual + W x: [1, n], [1, k] -> [1, n].

    Args:
        residual: [1, n]. x: [1, k]. weight: [n, k] contiguous.
    """
    out = torch.empty_like(residual)
    _launch("add", _plain, x, weight, x, residual, out, 0.0, pdl, NORM=False, ADD=True)
    return out


def swiglu_gemv(x: Tensor, gain: Tensor, eps: float, weight: Tensor, *, pdl: bool = False) -> Tensor:
    """silu(G norm(x)) * (U norm(x)): [1, k] -> [1, n].

    Args:
        x: [1, k]. gain: the norm's weight, [k]. eps: its epsilon.
        weight: G above U, [2 n, k] contiguous.
    """
    out = x.new_empty((1, weight.shape[0] // 2))
    _launch("swiglu", _swiglu, x, weight, gain, out, eps, pdl)
    return out


def qkv_gemv(
    x: Tensor,
    gain: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    angles: tuple[Tensor, Tensor] | None,
    head_dim: int,
    rotated: int,
    *,
    pdl: bool = False,
) -> Tensor:
    """Queries, keys and values of one token, rotary positions applied: [1, k] -> [1, n].

    Args:
        x: [1, k]. gain: the norm's weight, [k]. eps: its epsilon.
        weight: [n, k] contiguous, n a multiple of head_dim. bias: [n].
        angles: cos and sin, each [1, head_dim]; None leaves everything without rotation.
        rotated: how many of the first rows are rotated (those of queries and keys).
    """
    out = x.new_empty((1, weight.shape[0]))
    cos, sin = angles if angles is not None else (gain, gain)
    rotated = rotated if angles is not None else 0
    _launch(
        "qkv", _qkv, x, weight, gain, weight if bias is None else bias, cos, sin, out, eps, pdl,
        rotated=rotated, HALF=head_dim // 2, BIAS=bias is not None,
    )  # fmt: skip
    return out


def _launch(product: str, kernel: Any, x: Tensor, weight: Tensor, *args: Any, **constants: Any) -> None:
    *tensors, eps, pdl = args
    n, k = weight.shape
    cut = tiling(product, n, k)
    constants |= {"ROWS": cut.rows, "BLOCK": cut.block, "AHEAD": cut.ahead, "PDL": pdl}
    # `launch_pdl` is an option of the CUDA back end alone.
    extra = {"launch_pdl": True} if pdl else {}
    kernel[(triton.cdiv(n, cut.rows),)](x, weight, *tensors, eps, n, k, **constants, num_warps=cut.warps, **extra)


@triton.jit
def _tile(start, columns, inside, k: tl.constexpr) -> Any:
    """Those columns of the rows that begin at `start`: [rows, columns]. No line of a weight is read twice."""
    mask = inside[:, None] & (columns < k)[None, :]
    return tl.load(start + columns[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _sums(
    x, weight, gain, rows, inside, k: tl.constexpr, eps, NORM: tl.constexpr, PDL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
) -> Any:  # fmt: skip
    """Products of the given rows of the weight with x, or with norm(x): [rows]."""
    at = tl.arange(0, BLOCK)
    start = weight + rows.to(tl.int64)[:, None] * k
    tiles = ()
    for i in tl.static_range(AHEAD):
        tiles += (_tile(start, i * BLOCK + at, inside, k),)  # type: ignore[assignment]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, k, AHEAD * BLOCK):
        # A tile comes into the registers of the one that was used up: to move one would be to wait for it.
        following = ()
        for i in tl.static_range(AHEAD):
            here = first + i * BLOCK + at
            value = tl.load(x + here, mask=here < k, other=0.0).to(tl.float32)
            if NORM:
                squares += value * value
                value *= tl.load(gain + here, mask=here < k, other=0.0).to(tl.float32)
            acc += tiles[i].to(tl.float32) * value[None, :]
            following += (_tile(start, here + AHEAD * BLOCK, inside, k),)
        tiles = following
    total = tl.sum(acc, 1)
    if NORM:
        total *= tl.rsqrt(tl.sum(squares) / k + eps)
    return total


@triton.jit
def _plain(
    x, weight, gain, residual, out, eps, n, k: tl.constexpr,
    NORM: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
) -> Any:  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    total = _sums(x, weight, gain, rows, inside, k, eps, NORM, PDL, ROWS, BLOCK, AHEAD)
    if ADD:
        total += tl.load(residual + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows, total, mask=inside)


@triton.jit
def _swiglu(
    x, weight, gain, out, eps, n, k: tl.constexpr, PDL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
) -> Any:  # fmt: skip
    # Gate and up rows alternate within a tile, so that a pair ends up in one place.
    lane = tl.arange(0, ROWS)
    pair = tl.program_id(0) * (ROWS // 2) + lane // 2
    inside = pair < n // 2
    total = _sums(x, weight, gain, pair + (lane % 2) * (n // 2), inside, k, eps, True, PDL, ROWS, BLOCK, AHEAD)
    gate, up = tl.split(tl.reshape(total, (ROWS // 2, 2)))
    at = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    tl.store(out + at, gate * tl.sigmoid(gate) * up, mask=at < n // 2)


@triton.jit
def _qkv(
    x, weight, gain, bias, cos, sin, out, eps, n, k: tl.constexpr, rotated,
    HALF: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
) -> Any:  # fmt: skip
    # Channel i of a head and its partner i + HALF alternate within a tile.
    lane = tl.arange(0, ROWS)
    pair = tl.program_id(0) * (ROWS // 2) + lane // 2
    rows = (pair // HALF) * 2 * HALF + pair % HALF + (lane % 2) * HALF
    inside = pair < n // 2
    total = _sums(x, weight, gain, rows, inside, k, eps, True, PDL, ROWS, BLOCK, AHEAD)
    if BIAS:
        total += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    a, b = tl.split(tl.reshape(total, (ROWS // 2, 2)))
    pair = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    first = (pair // HALF) * 2 * HALF + pair % HALF
    turns = first < rotated
    c = tl.load(cos + pair % HALF, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + pair % HALF, mask=turns, other=0.0).to(tl.float32)
    tl.store(out + first, a * c - b * s, mask=pair < n // 2)
    tl.store(out + first + HALF, b * c + a * s, mask=pair < n // 2)
