"""Attention of one new token in which each KV head reads everything or a list, and lists chosen from what it paid.

What LycheeDecode's decode needs (Lin et al., arXiv 2602.04541): a retrieval head reads all keys once, and the logits
that it meets on the way stay behind, so that choosing from them reads no key again. As in `decode_attention`, lengths
come from a table on the device and grids are fixed, so one captured CUDA graph serves every request.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.engine.kernels.decode_attention import multiprocessors
from harness.engine.kernels.online_softmax import (
    ROWS,
    begin,
    check_shape,
    is_last,
    join,
    leave,
    share_of,
    take_in_new,
    take_in_tile,
)
from harness.engine.kernels.token_select import best_tokens

_BLOCK = 64
"""Tokens a program reads at a time."""
_RATED = 256
"""Tokens a program rates."""


class ListedAttention:
    """The kernels for one model shape, with the lists and the buffers they need.

    One object must not run on two streams at once: its launches share buffers.

    Attributes:
        tokens: the lists, [kv_heads, count] int64: slots in the cache, without the new token's.
        nbytes: bytes of the lists and the buffers.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        room: int,
        count: int,
        device: torch.device | str,
        splits: int | None = None,
    ) -> None:
        """
        Args:
            heads: query heads, a multiple of kv_heads; at most 16 of them share a KV head.
            head_dim: a power of two, at least 16.
            room: tokens that a cache can hold, at most.
            count: tokens a list, up to room; a cache that holds fewer is listed whole.
            splits: shares that the tokens of a KV head are divided into; by default one program a multiprocessor.
        """
        check_shape(heads, kv_heads, head_dim)
        self.heads, self.kv_heads, self.head_dim, self.count = heads, kv_heads, head_dim, count
        self._splits = splits or max(1, multiprocessors(device) // kv_heads)
        shares = heads * self._splits
        self._sums = torch.empty((shares, head_dim), dtype=torch.float32, device=device)
        self._tops, self._totals = torch.empty((2, shares), dtype=torch.float32, device=device)
        self._counters = torch.zeros(kv_heads, dtype=torch.int32, device=device)
        self._norms = torch.empty(heads, dtype=torch.float32, device=device)
        self._logits = torch.empty((heads, room), dtype=torch.float32, device=device)
        self._scores = torch.empty((kv_heads, room), dtype=torch.float32, device=device)
        self.tokens = torch.zeros((kv_heads, count), dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """As above."""
        parts = (
            self._sums, self._tops, self._totals, self._counters, self._norms, self._logits, self._scores, self.tokens
        )  # fmt: skip
        return sum(part.nbytes for part in parts)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, whole: Tensor, table: Tensor, layer: int) -> Tensor:
        """Attends to the cached tokens, or to those that are listed, and to the new one, which is stored behind them.

        Args:
            q: the new token's queries, [heads, head_dim], rotated; heads may lie apart, channels may not.
            k, v: its key, rotated, and value, [kv_heads, head_dim], likewise.
            whole: [kv_heads] bool, heads that attend to everything.
            table: [layers, 3] int64 contiguous: addresses of a layer's keys and values, and tokens there, see
                `DecodeAttention.dense`.
            layer: row of the table.

        Returns:
            [1, heads * head_dim].
        """
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "channels of a head must be contiguous"
        out, group = q.new_empty((1, self.heads * self.head_dim)), self.heads // self.kv_heads
        _attend[(self.kv_heads, self._splits)](
            q, k, v, whole, self.tokens, table, self._sums, self._tops, self._totals, self._counters, out, self._norms,
            self._logits, layer, self.count, self._logits.shape[1], q.stride(0), k.stride(0), v.stride(0),
            GROUP=group, PADDED=triton.next_power_of_2(group), KV_HEADS=self.kv_heads, DIM=self.head_dim,
            SPLITS=self._splits, WIDTH=triton.next_power_of_2(self._splits),
            SCALE=self.head_dim**-0.5 * math.log2(math.e), BLOCK=_BLOCK, num_warps=4, num_stages=3,
        )  # fmt: skip
        return out

    def choose(self, choosers: Tensor, table: Tensor, layer: int, vote: Literal["mean", "max"]) -> None:
        """Lists the cached tokens that heads have just paid most to, of equal ones the first.

        Args:
            choosers: KV heads, [m] int64, that have attended to everything.
            table: as in `attend`, not yet advanced.
            layer: row of it.
            vote: mean or greatest of the query heads of a KV head.
        """
        lists, room = len(choosers), self._logits.shape[1]
        scores = self._scores[:lists]
        _rate[(lists, triton.cdiv(room, _RATED))](
            choosers, self._logits, self._norms, table, scores, layer, room,
            GROUP=self.heads // self.kv_heads, MEAN=vote == "mean", BLOCK=_RATED, num_warps=4,
        )  # fmt: skip
        counts = table[layer, 2].clamp(max=self.count).expand(lists).contiguous()
        self.tokens.index_copy_(0, choosers, best_tokens(scores, counts, self.count))


@triton.jit(do_not_specialize=["layer", "count", "room"])  # type: ignore[untyped-decorator]
def _attend(
    q, k, v, whole, tokens, table, sums, tops, totals, counters, out, norms, logits, layer, count, room,
    q_stride, k_stride, v_stride,
    GROUP: tl.constexpr, PADDED: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr,
    WIDTH: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """One share of what a KV head reads, for all query heads of its group."""
    kv_head, split = tl.program_id(0), tl.program_id(1)
    length = tl.load(table + layer * 3 + 2).to(tl.int32)
    all_read = tl.load(whole + kv_head).to(tl.int1)
    read = tl.where(all_read, length, tl.minimum(count, length))
    share, used = share_of(read, SPLITS)
    if split >= used:
        return
    row, at = tl.arange(0, ROWS), tl.arange(0, DIM)
    mine, head = row < GROUP, kv_head * GROUP + row
    query = tl.load(q + head[:, None] * q_stride + at[None, :], mask=mine[:, None], other=0.0)
    pointer = tl.pointer_type(k.dtype.element_ty)
    keys = tl.multiple_of(tl.load(table + layer * 3).to(pointer), 16) + kv_head * DIM
    values = tl.multiple_of(tl.load(table + layer * 3 + 1).to(pointer), 16) + kv_head * DIM

    top, total, acc = begin(ROWS, DIM)
    end = tl.minimum(split * share + share, read)
    for start in tl.range(split * share, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < end
        listed = tl.load(tokens + kv_head * count + place, mask=inside & (all_read == 0), other=0)
        offset = tl.where(all_read, place.to(tl.int64), listed) * (KV_HEADS * DIM)
        seen = inside[None, :]
        top, total, acc, logit = take_in_tile(query, keys, values, offset, inside, seen, top, total, acc, DIM, SCALE)
        left = logits + head[:, None].to(tl.int64) * room + place[None, :]
        tl.store(left, logit, mask=mine[:, None] & seen & all_read)

    # The first share takes in the new token, from the inputs: nobody reads the slot that it is written to.
    first = split == 0
    new_key = tl.load(k + kv_head * k_stride + at, mask=first & (at < DIM), other=0.0)
    new_value = tl.load(v + kv_head * v_stride + at, mask=first & (at < DIM), other=0.0)
    top, total, acc, _ = take_in_new(query, new_key, new_value, first, top, total, acc, SCALE)
    slot = length.to(tl.int64) * (KV_HEADS * DIM)
    tl.store(keys + slot + at, new_key, mask=first & (at < DIM))
    tl.store(values + slot + at, new_value, mask=first & (at < DIM))

    leave(sums, tops, totals, (kv_head * SPLITS + split) * GROUP + row, top, total, acc, mine, DIM)
    if is_last(counters + kv_head, used):
        group = tl.arange(0, PADDED)
        join(
            sums, tops, totals, out, norms, kv_head, used, group < GROUP, kv_head * GROUP + group,
            PADDED, WIDTH, min(WIDTH, max(1, 128 // PADDED)), GROUP, SPLITS, DIM,
        )  # fmt: skip


@triton.jit(do_not_specialize=["layer", "room"])  # type: ignore[untyped-decorator]
def _rate(
    choosers, logits, norms, table, scores, layer, room,
    GROUP: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """What the query heads of a chooser paid to a block of tokens; minus infinity where there are none."""
    length = tl.load(table + layer * 3 + 2).to(tl.int32)
    kv_head, token = tl.load(choosers + tl.program_id(0)), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    score = tl.zeros((BLOCK,), tl.float32)
    for row in tl.static_range(GROUP):
        head = kv_head * GROUP + row
        logit = tl.load(logits + head * room + token, mask=token < length, other=float("-inf"))
        paid = tl.exp2(logit - tl.load(norms + head))
        score = score + paid if MEAN else tl.maximum(score, paid)
    score = tl.where(token < length, score, float("-inf"))
    tl.store(scores + tl.program_id(0).to(tl.int64) * room + token, score, mask=token < room)
