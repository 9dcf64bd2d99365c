"""What comes between matrix products, one pass over memory each: RMS norm, rotary positions, SwiGLU, norms of heads.

At 32K rows of an 8B model one pass over the SwiGLU's input alone is 1.9 GB a layer, so every pass saved counts.
Arithmetic is in float32, rounded once at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROTATED_ROWS = 16
_SWIGLU_BLOCK = 1024
_NORMED = 32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        x: [n, width], rows contiguous.
        weight: [width].
    """
    out = torch.empty_like(x)
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    rows, warps = max(1, 2048 // block), min(16, max(4, block // 512))
    grid = (triton.cdiv(x.shape[0], rows),)
    _rms_norm[grid](x, weight, out, x.shape[0], x.stride(0), out.stride(0), eps, width, block, rows, num_warps=warps)
    return out


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x in place, halves of a head paired (Su et al., arXiv 2104.09864); returns x.

    Args:
        x: [n, heads, d], each head contiguous; may be a view into a wider buffer.
        cos, sin: [n, d], their second half repeating the first.
    """
    n, heads, d = x.shape
    grid = (triton.cdiv(n, _ROTATED_ROWS), heads)
    _rotate[grid](
        x, cos, sin, n, x.stride(0), x.stride(1), cos.stride(0), d // 2, triton.next_power_of_2(d // 2), _ROTATED_ROWS
    )
    return x


def angles(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scaled cosines and sines of positions times frequencies, each [n, d], their second half repeating the first.

    Args:
        positions: [n] int64, any distance apart.
        frequencies: [d / 2] float32.
        scale: of both.
        dtype: of the result.
    """
    n, half = len(positions), len(frequencies)
    cos, sin = torch.empty((2, n, 2 * half), dtype=dtype, device=positions.device)
    _angles[(triton.cdiv(n, _ROTATED_ROWS),)](
        positions, frequencies, cos, sin, n, positions.stride(0), scale, half, triton.next_power_of_2(half),
        _ROTATED_ROWS,
    )  # fmt: skip
    return cos, sin


def swiglu_(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, written over the gate (Shazeer, arXiv 2002.05202).

    Args:
        gate_up: [n, 2 * width] contiguous, the gate first.

    Returns:
        [n, width], a view of the first half.
    """
    n, width = gate_up.shape[0], gate_up.shape[1] // 2
    _swiglu[(n, triton.cdiv(width, _SWIGLU_BLOCK))](gate_up, gate_up.stride(0), width, _SWIGLU_BLOCK)
    return gate_up[:, :width]


def head_norms(x: Tensor) -> Tensor:
    """L2 norms of keys or values: [n, heads, d], d a power of two, channels contiguous -> [n, heads] float32."""
    n, heads, d = x.shape
    assert x.stride(2) == 1, "channels of a head must be contiguous"
    norms = torch.empty((n, heads), dtype=torch.float32, device=x.device)
    _head_norms[(triton.cdiv(n * heads, _NORMED),)](
        x, norms, n * heads, x.stride(0), x.stride(1), HEADS=heads, DIM=d, ROWS=_NORMED, num_warps=4
    )
    return norms


@triton.jit
def _rms_norm(x, weight, out, n, x_stride, out_stride, eps, width, BLOCK: tl.constexpr, ROWS: tl.constexpr) -> Any:
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = (at < width) & (row < n)
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    gain = tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + at, value * scale[:, None] * gain, mask=inside)


@triton.jit
def _head_norms(
    x, norms, count, row_stride, head_stride, HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr
) -> Any:
    each = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = (each // HEADS).to(tl.int64) * row_stride + each % HEADS * head_stride
    value = tl.load(x + place[:, None] + tl.arange(0, DIM)[None, :], mask=(each < count)[:, None], other=0.0)
    value = value.to(tl.float32)
    tl.store(norms + each, tl.sqrt_rn(tl.sum(value * value, 1)), mask=each < count)


@triton.jit
def _rotate(x, cos, sin, n, row_stride, head_stride, angle_stride, half, HALF: tl.constexpr, ROWS: tl.constexpr) -> Any:
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    at = tl.arange(0, HALF)[None, :]
    inside = (rows < n) & (at < half)
    c = tl.load(cos + rows * angle_stride + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + rows * angle_stride + at, mask=inside, other=0.0).to(tl.float32)
    first = x + rows * row_stride + tl.program_id(1) * head_stride + at
    a = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(first + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(first, a * c - b * s, mask=inside)
    tl.store(first + half, b * c + a * s, mask=inside)


@triton.jit
def _angles(positions, frequencies, cos, sin, n, stride, scale, half, HALF: tl.constexpr, ROWS: tl.constexpr) -> Any:
    rows, at = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF)
    inside = (rows < n)[:, None] & (at < half)[None, :]
    position = tl.load(positions + rows * stride, mask=rows < n, other=0).to(tl.float32)
    angle = position[:, None] * tl.load(frequencies + at, mask=at < half, other=0.0)[None, :]
    place = rows.to(tl.int64)[:, None] * 2 * half + at[None, :]
    c, s = tl.cos(angle) * scale, tl.sin(angle) * scale
    tl.store(cos + place, c, mask=inside)
    tl.store(cos + place + half, c, mask=inside)
    tl.store(sin + place, s, mask=inside)
    tl.store(sin + place + half, s, mask=inside)


@triton.jit
def _swiglu(gate_up, stride, width, BLOCK: tl.constexpr) -> Any:
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = gate_up + tl.program_id(0).to(tl.int64) * stride + at
    g = tl.load(gate, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gate + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(gate, g * tl.sigmoid(g) * u, mask=inside)
