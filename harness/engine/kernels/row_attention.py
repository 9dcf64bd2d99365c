"""Attention of a few rows over chosen tokens of a cache and over each other, by their places in the text.

What LazyLLM's decode needs (Fu et al., arXiv 2407.14057): tokens that come back run beside the newest one, from
anywhere in the text, over a choice of tokens that changes with every step. Rows and chosen tokens stand on the device,
so a captured CUDA graph serves every step with as many rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.engine.kernels.decode_attention import multiprocessors
from harness.engine.kernels.online_softmax import ROWS, begin, check_shape, is_last, join, leave, share_of, take_in_tile

_TILE = 64
"""Queries a program has at most: the query heads of a KV head, of several rows."""
_BLOCK = 64
"""Tokens a program reads at a time."""


@dataclass(frozen=True)
class _Plan:
    """How so many rows are divided among programs, and what these share."""

    tile: int
    tiles: int
    splits: int
    sums: Tensor
    tops: Tensor
    totals: Tensor
    counters: Tensor
    norms: Tensor


class RowAttention:
    """The kernel for one model shape, with the buffers it needs, which depend on the number of rows.

    One object must not run on two streams at once: its launches share buffers.

    Attributes:
        norms: [rows, heads] float32, of the last call: the log of each softmax's denominator, base 2.
    """

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, device: torch.device | str, programs: int | None = None
    ) -> None:
        """
        Args:
            heads: query heads, a multiple of kv_heads; at most 16 of them share a KV head.
            head_dim: a power of two, at least 16.
            programs: how many to divide the listed tokens among, about; by default two a multiprocessor.
        """
        check_shape(heads, kv_heads, head_dim)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self._device, self._programs = device, programs or 2 * multiprocessors(device)
        self._plans: dict[int, _Plan] = {}
        self.norms = torch.empty(0)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        slots: Tensor,
        tokens: Tensor,
        seen: Tensor,
        table: Tensor,
        layer: int,
    ) -> Tensor:
        """Each row attends to listed tokens and rows at positions up to its own; the rows' keys and values are stored.

        Args:
            q: queries, [rows, heads, head_dim], rotated; rows may lie apart, heads and channels may not.
            k, v: keys, rotated, and values, [rows, kv_heads, head_dim], likewise, with the same strides.
            positions: [rows] int64, places in the text.
            slots: [rows] int32, where in the layer's cache each goes; -1 for padding: not stored, and seen by no row.
            tokens: [2, room] int32 contiguous, slots and positions of tokens in the cache, none of them the rows'.
            seen: [1] int64, how many of the tokens count.
            table: [layers, 3] int64 contiguous: addresses of a layer's keys and values, see `DecodeAttention`.
            layer: row of the table.

        Returns:
            [rows, heads * head_dim].
        """
        assert q.stride()[1:] == (self.head_dim, 1) and k.stride() == v.stride() and k.stride()[1:] == q.stride()[1:]
        rows = len(positions)
        plan = self._plans.get(rows) or self._plan(rows)
        self.norms = plan.norms
        out = q.new_empty((rows, self.heads * self.head_dim))
        own = min(_BLOCK, max(16, triton.next_power_of_2(rows)))
        _attend[(self.kv_heads * plan.tiles, plan.splits)](
            q, k, v, positions, slots, tokens, seen, table, plan.sums, plan.tops, plan.totals, plan.counters,
            out, plan.norms, layer, tokens.shape[1], q.stride(0), k.stride(0), rows,
            GROUP=self.heads // self.kv_heads, KV_HEADS=self.kv_heads, DIM=self.head_dim,
            TILE=plan.tile, USED=min(plan.tile, triton.next_power_of_2(rows * self.heads // self.kv_heads)),
            TILES=plan.tiles, SPLITS=plan.splits, WIDTH=triton.next_power_of_2(plan.splits),
            SCALE=self.head_dim**-0.5 * math.log2(math.e), BLOCK=_BLOCK, OWN=own, num_warps=4, num_stages=2,
        )  # fmt: skip
        return out

    def _plan(self, rows: int) -> _Plan:
        queries = rows * self.heads // self.kv_heads
        tile = ROWS.value if queries <= ROWS.value else _TILE
        tiles = -(-queries // tile)
        # The rows themselves are a share of their own.
        splits = 1 + max(1, self._programs // (self.kv_heads * tiles))
        states = self.kv_heads * tiles * splits * tile
        sums = torch.empty((states, self.head_dim), dtype=torch.float32, device=self._device)
        tops, totals = torch.empty((2, states), dtype=torch.float32, device=self._device)
        counters = torch.zeros(self.kv_heads * tiles, dtype=torch.int32, device=self._device)
        norms = torch.empty((rows, self.heads), dtype=torch.float32, device=self._device)
        self._plans[rows] = plan = _Plan(tile, tiles, splits, sums, tops, totals, counters, norms)
        return plan


@triton.jit  # type: ignore[untyped-decorator]
def _take_in_listed(
    query, position, keys, values, tokens, room, begin_at, end, top, total, acc,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr,
) -> Any:  # fmt: skip
    """Attends to the tokens listed from `begin_at` to `end`."""
    for start in tl.range(begin_at, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < end
        slot = tl.load(tokens + token, mask=inside, other=0)
        place = tl.load(tokens + room + token, mask=inside, other=0)
        seen = inside[None, :] & (place[None, :] <= position[:, None])
        offset = slot.to(tl.int64) * (KV_HEADS * DIM)
        top, total, acc, _ = take_in_tile(query, keys, values, offset, inside, seen, top, total, acc, DIM, SCALE)
    return top, total, acc


@triton.jit  # type: ignore[untyped-decorator]
def _take_in_rows(
    query, position, k, v, positions, slots, keys, values, stride, rows, storing, top, total, acc,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, OWN: tl.constexpr, SCALE: tl.constexpr,
) -> Any:  # fmt: skip
    """Attends to the rows themselves, and stores their keys and values in the cache, if `storing`."""
    at = tl.arange(0, DIM)
    for start in tl.range(0, rows, OWN, num_stages=1):
        other = start + tl.arange(0, OWN)
        slot = tl.load(slots + other, mask=other < rows, other=-1)
        there = slot >= 0
        seen = there[None, :] & (tl.load(positions + other, mask=there, other=0)[None, :] <= position[:, None])
        top, total, acc, _ = take_in_tile(query, k, v, other * stride, there, seen, top, total, acc, DIM, SCALE)
        source = other[:, None] * stride + at[None, :]
        into = slot.to(tl.int64)[:, None] * (KV_HEADS * DIM) + at[None, :]
        stored = there[:, None] & storing
        tl.store(keys + into, tl.load(k + source, mask=stored, other=0.0), mask=stored)
        tl.store(values + into, tl.load(v + source, mask=stored, other=0.0), mask=stored)
    return top, total, acc


@triton.jit(do_not_specialize=["layer"])  # type: ignore[untyped-decorator]
def _attend(
    q, k, v, positions, slots, tokens, seen, table, sums, tops, totals, counters,
    out, norms, layer, room, q_stride, k_stride, rows,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, USED: tl.constexpr,
    TILES: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr,
    BLOCK: tl.constexpr, OWN: tl.constexpr,
) -> Any:  # fmt: skip
    """For a tile of queries that read the same KV head: one share of the listed tokens, or the rows themselves."""
    this, split = tl.program_id(0), tl.program_id(1)
    kv_head, tile = this // TILES, this % TILES
    count = tl.load(seen).to(tl.int32)
    share, shares = share_of(count, SPLITS - 1)
    if split > shares:
        return
    flat, at = tile * TILE + tl.arange(0, TILE), tl.arange(0, DIM)
    row, head = flat // GROUP, kv_head * GROUP + flat % GROUP
    mine = row < rows
    position = tl.load(positions + row, mask=mine, other=-1)
    query = tl.load(q + (row * q_stride + head * DIM)[:, None] + at[None, :], mask=mine[:, None], other=0.0)
    pointer = tl.pointer_type(k.dtype.element_ty)
    keys = tl.multiple_of(tl.load(table + layer * 3).to(pointer), 16) + kv_head * DIM
    values = tl.multiple_of(tl.load(table + layer * 3 + 1).to(pointer), 16) + kv_head * DIM

    top, total, acc = begin(TILE, DIM)
    if split == 0:
        # From the inputs: nobody reads the slots that the rows are written to.
        top, total, acc = _take_in_rows(
            query, position, k + kv_head * DIM, v + kv_head * DIM, positions, slots, keys, values, k_stride, rows,
            tile == 0, top, total, acc, KV_HEADS, DIM, OWN, SCALE,
        )  # fmt: skip
    else:
        start = (split - 1) * share
        top, total, acc = _take_in_listed(
            query, position, keys, values, tokens, room, start, tl.minimum(start + share, count), top, total, acc,
            KV_HEADS, DIM, BLOCK, SCALE,
        )  # fmt: skip

    leave(sums, tops, totals, (this * SPLITS + split) * TILE + tl.arange(0, TILE), top, total, acc, mine, DIM)
    if is_last(counters + this, shares + 1):
        joined = tile * TILE + tl.arange(0, USED)
        place_out = joined // GROUP * (KV_HEADS * GROUP) + kv_head * GROUP + joined % GROUP
        join(
            sums, tops, totals, out, norms, this, shares + 1, joined // GROUP < rows, place_out,
            USED, WIDTH, min(WIDTH, max(1, 128 // USED)), TILE, SPLITS, DIM,
        )  # fmt: skip
