"""Attention of new tokens in which each KV head reads everything or a list, and lists chosen from what it paid.

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
        tokens: the lists, [batch, kv_heads, count] int64: slots in the cache, without the new token's.
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
        *,
        batch: int = 1,
    ) -> None:
        """
        Args:
            heads: query heads, a multiple of kv_heads; at most 16 of them share a KV head.
            head_dim: a power of two, at least 16.
            room: tokens that a cache can hold, at most.
            count: tokens a list, up to room; a cache that holds fewer is listed whole.
            splits: shares that the tokens of a KV head are divided into; by default one program a multiprocessor.
            batch: requests at once, at most.
        """
        check_shape(heads, kv_heads, head_dim)
        self.heads, self.kv_heads, self.head_dim, self.count, self.batch = heads, kv_heads, head_dim, count, batch
        self._programs = splits * kv_heads if splits else multiprocessors(device)
        shares = heads // kv_heads * max(self._programs, kv_heads * batch)
        self._sums = torch.empty((shares, head_dim), dtype=torch.float32, device=device)
        self._tops, self._totals = torch.empty((2, shares), dtype=torch.float32, device=device)
        self._counters = torch.zeros(batch * kv_heads, dtype=torch.int32, device=device)
        self._norms = torch.empty(batch * heads, dtype=torch.float32, device=device)
        self._logits = torch.empty((batch * heads, room), dtype=torch.float32, device=device)
        self._scores = torch.empty((batch * kv_heads, room), dtype=torch.float32, device=device)
        self.tokens = torch.zeros((batch, kv_heads, count), dtype=torch.int64, device=device)

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
            q: the queries of each request's new token, [requests, heads, head_dim], rotated; heads may lie apart,
                channels may not.
            k, v: their keys, rotated, and values, [requests, kv_heads, head_dim], likewise.
            whole: [kv_heads] bool, heads that attend to everything.
            table: [requests * layers, 3] int64 contiguous, request by request: addresses of a layer's keys and values,
                and tokens there, see `DecodeAttention.dense`.
            layer: row of the table, of each request.

        Returns:
            [requests, heads * head_dim].
        """
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "channels of a head must be contiguous"
        requests, group = len(q), self.heads // self.kv_heads
        out, splits = q.new_empty((requests, self.heads * self.head_dim)), self._splits(requests)
        # How far requests are apart counts for the second one on.
        apart = (stride for x in (q, k, v) for stride in x.stride()[:2])
        _attend[(self.kv_heads, splits, requests)](
            q, k, v, whole, self.tokens, table, self._sums, self._tops, self._totals, self._counters, out, self._norms,
            self._logits, layer, len(table) // requests, self.count, self._logits.shape[1], *apart,
            GROUP=group, PADDED=triton.next_power_of_2(group), KV_HEADS=self.kv_heads, DIM=self.head_dim,
            SPLITS=splits, WIDTH=triton.next_power_of_2(splits),
            SCALE=self.head_dim**-0.5 * math.log2(math.e), BLOCK=_BLOCK, num_warps=4, num_stages=3,
        )  # fmt: skip
        return out

    def choose(
        self, choosers: Tensor, table: Tensor, layer: int, vote: Literal["mean", "max"], requests: int = 1
    ) -> None:
        """Lists the cached tokens that heads have just paid most to, of equal ones the first.

        Args:
            choosers: KV heads, [m] int64, that have attended to everything.
            table: as in `attend`, not yet advanced.
            layer: row of it.
            vote: mean or greatest of the query heads of a KV head.
            requests: as many as attended.
        """
        lists, room, layers = len(choosers), self._logits.shape[1], len(table) // requests
        scores = self._scores[: requests * lists]
        _rate[(lists, triton.cdiv(room, _RATED), requests)](
            choosers, self._logits, self._norms, table, scores, layer, layers, room, KV_HEADS=self.kv_heads,
            GROUP=self.heads // self.kv_heads, MEAN=vote == "mean", BLOCK=_RATED, num_warps=4,
        )  # fmt: skip
        counts = table.view(requests, layers, 3)[:, layer, 2].clamp(max=self.count).repeat_interleave(lists)
        best = best_tokens(scores, counts, self.count).view(requests, lists, self.count)
        self.tokens[:requests].index_copy_(1, choosers, best)

    def _splits(self, requests: int) -> int:
        return max(1, self._programs // (self.kv_heads * requests))


@triton.jit(do_not_specialize=["layer", "layers", "count", "room"])  # type: ignore[untyped-decorator]
def _attend(
    q, k, v, whole, tokens, table, sums, tops, totals, counters, out, norms, logits, layer, layers, count,
    room, q_apart, q_stride, k_apart, k_stride, v_apart, v_stride,
    GROUP: tl.constexpr, PADDED: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr,
    WIDTH: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """One share of what a KV head reads, for all query heads of its group."""
    kv_head, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    this = request * KV_HEADS + kv_head
    table += (request * layers + layer) * 3
    q += request * q_apart
    k += request * k_apart
    v += request * v_apart
    length = tl.load(table + 2).to(tl.int32)
    all_read = tl.load(whole + kv_head).to(tl.int1)
    read = tl.where(all_read, length, tl.minimum(count, length))
    share, used = share_of(read, SPLITS)
    if split >= used:
        return
    row, at = tl.arange(0, ROWS), tl.arange(0, DIM)
    mine, head = row < GROUP, this * GROUP + row
    query = tl.load(q + (kv_head * GROUP + row)[:, None] * q_stride + at[None, :], mask=mine[:, None], other=0.0)
    pointer = tl.pointer_type(k.dtype.element_ty)
    keys = tl.multiple_of(tl.load(table).to(pointer), 16) + kv_head * DIM
    values = tl.multiple_of(tl.load(table + 1).to(pointer), 16) + kv_head * DIM

    top, total, acc = begin(ROWS, DIM)
    end = tl.minimum(split * share + share, read)
    for start in tl.range(split * share, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < end
        listed = tl.load(tokens + this * count + place, mask=inside & (all_read == 0), other=0)
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

    leave(sums, tops, totals, (this * SPLITS + split) * GROUP + row, top, total, acc, mine, DIM)
    if is_last(counters + this, used):
        group = tl.arange(0, PADDED)
        join(
            sums, tops, totals, out, norms, this, used, group < GROUP, this * GROUP + group,
            PADDED, WIDTH, min(WIDTH, max(1, 128 // PADDED)), GROUP, SPLITS, DIM,
        )  # fmt: skip


@triton.jit(do_not_specialize=["layer", "layers", "room"])  # type: ignore[untyped-decorator]
def _rate(
    choosers, logits, norms, table, scores, layer, layers, room,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """What the query heads of a chooser paid to a block of tokens; minus infinity where there are none."""
    request = tl.program_id(2)
    length = tl.load(table + (request * layers + layer) * 3 + 2).to(tl.int32)
    this = request * KV_HEADS + tl.load(choosers + tl.program_id(0))
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    score = tl.zeros((BLOCK,), tl.float32)
    for row in tl.static_range(GROUP):
        head = this * GROUP + row
        logit = tl.load(logits + head * room + token, mask=token < length, other=float("-inf"))
        paid = tl.exp2(logit - tl.load(norms + head))
        score = score + paid if MEAN else tl.maximum(score, paid)
    score = tl.where(token < length, score, float("-inf"))
    rated = request * tl.num_programs(0) + tl.program_id(0)
    tl.store(scores + rated.to(tl.int64) * room + token, score, mask=token < room)
