"""Attention of one new token a request over cached prompts, bound by reading keys and values once.

The cached tokens are divided among programs and their shares are joined afterwards
(`harness.engine.kernels.online_softmax`). All query heads that read the same keys are handled by one program, padded to
the rows of a tensor core tile.

Where a layer's cache lies and how long it is stands in a table on the device that the kernels read, and the grid does
not depend on it, so one captured CUDA graph serves every request. Requests that are decoded together are one more axis
of the table and of the grid. A long cache is then more shares than a short one, not longer ones, so that programs have
equal work.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.engine.kernels.online_softmax import (
    ROWS,
    STEP,
    begin,
    check_shape,
    is_last,
    join,
    leave,
    share_of,
    take_in_new,
    take_in_tile,
)

# Tokens a program reads at a time, and how: the best of those tried on an H200, see docs/performance.md.
_DENSE = {"BLOCK": 64, "num_warps": 4, "num_stages": 4}
# Pages are few: more programs, with less for each.
_PAGED = {"BLOCK": 64, "num_warps": 4, "num_stages": 2}
_PAGED_SPLITS = 2
# With several requests: how full rounds of programs should be, and how many times the shares of a mean cache there are
# for a long one.
_FULL, _LONG = 0.95, 4


class DecodeAttention:
    """Attention kernels of one model shape, with the buffers they need.

    One object must not run on two streams at once: its launches share buffers.

    Attributes:
        norms: [batch * heads] float32, of the last call: the log of each softmax's denominator, base 2.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        splits: int | None = None,
        *,
        batch: int = 1,
        pdl: bool = False,
    ) -> None:
        """
        Args:
            heads: query heads, a multiple of kv_heads; at most 16 of them share a KV head.
            head_dim: a power of two, at least 16.
            splits: shares that the tokens of a KV head are divided into, in the mean over requests; by default as many
                as fill the multiprocessors, one program each.
            batch: requests at once.
            pdl: launch what reads pages with programmatic dependent launch (CUDA only).
        """
        check_shape(heads, kv_heads, head_dim)
        self.heads, self.kv_heads, self.head_dim, self.batch = heads, kv_heads, head_dim, batch
        self.splits = splits or even_splits(multiprocessors(device), kv_heads, batch)
        self._most = self.splits * min(batch, _LONG)
        self._pdl = pdl
        shares = batch * heads * max(self._most, self.splits * _PAGED_SPLITS)
        self._sums = torch.empty((shares, head_dim), dtype=torch.float32, device=device)
        self._tops, self._totals = torch.empty((2, shares), dtype=torch.float32, device=device)
        self._counters = torch.zeros(batch * heads, dtype=torch.int32, device=device)
        self.norms = torch.empty(batch * heads, dtype=torch.float32, device=device)

    def dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor,
        layer: int,
        out: Tensor | None = None,
        logits: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attends to all cached tokens and the new one, and stores the new one behind them, for each request.

        Args:
            q: the new tokens' queries, [batch, heads, head_dim], or of a single one [heads, head_dim], rotated; heads
                may lie apart, channels may not.
            k, v: their keys, rotated, and values, [batch, kv_heads, head_dim] or [kv_heads, head_dim], likewise.
            table: [batch * layers, 3] int64 contiguous, request by request: addresses of its keys and values of a
                layer ([capacity, kv_heads, head_dim] contiguous, at multiples of 16 bytes) and the tokens there, the
                new one not counted. Slot `length` must be within capacity; the kernel does not change the table.
            layer: whose row of the table, of each request.
            out: where the result goes, [batch, heads * head_dim] contiguous; allocated if not given.
            logits: what else is to be left, [batch, layers, heads, room] and [batch, layers, heads] float32
                contiguous: q k / sqrt(d) of the token in each slot, the new one included, and `norms`, of which it uses
                this layer's part; both base 2. So a token's weight is 2 ** (logit - norm).

        Returns:
            [batch, heads * head_dim].
        """
        # Without dependent launch: what comes next would start beside it, and keep working with the little cache that
        # its shared memory leaves on a multiprocessor (docs/performance.md).
        launch = {"RAGGED": False, "PDL": False, **_DENSE}
        return self._run(q, k, v, table, layer, None, 0, self.kv_heads, self._most, out, logits, **launch)

    def ragged(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, layer: int, out: Tensor | None = None) -> Tensor:
        """The same as `dense` where every KV head has memory of its own and its own number of tokens.

        Args:
            q, k, v, layer, out: as in `dense`.
            table: [batch * layers, kv_heads, 3] int64 contiguous: for each KV head addresses of its keys and values
                ([capacity, head_dim] contiguous, at multiples of 16 bytes) and the tokens there.
        """
        launch = {"RAGGED": True, "PDL": False, **_DENSE}
        return self._run(q, k, v, table, layer, None, 0, self.kv_heads, self._most, out, None, **launch)

    def paged(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor,
        layer: int,
        pages: Tensor,
        page_size: int,
        out: Tensor | None = None,
    ) -> Tensor:
        """The same, attending to the listed pages only and reading nothing else.

        Args:
            q, k, v, table, layer, out: as in `dense`.
            pages: [batch, lists, m] int32 contiguous, or of a single request [lists, m], numbers of different pages in
                any order; lists is kv_heads, or heads where every query head has its own. The new token's page must be
                listed: that token is attended to in any case. Pages behind it count for nothing.
            page_size: tokens a page.
        """
        lists, listed = pages.shape[-2:]
        # As many programs for every number of lists, but no more than there is work for.
        most = max(1, _PAGED_SPLITS * self.splits * self.kv_heads // lists)
        splits = min(most, -(-listed * page_size // STEP.value))
        # `launch_pdl` is an option of the CUDA back end alone.
        option = {"launch_pdl": True} if self._pdl else {}
        launch = {"RAGGED": False, "PDL": self._pdl, **option, **_PAGED}
        return self._run(q, k, v, table, layer, pages, page_size, lists, splits, out, None, **launch)

    def _run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor,
        layer: int,
        pages: Tensor | None,
        page_size: int,
        lists: int,
        splits: int,
        out: Tensor | None,
        logits: tuple[Tensor, Tensor] | None,
        **launch: Any,
    ) -> Tensor:
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "channels of a head must be contiguous"
        out = q.new_empty((self.batch, self.heads * self.head_dim)) if out is None else out
        group = self.heads // lists
        into, norms = (self.norms, self.norms) if logits is None else logits
        # How far requests are apart counts for the second one on.
        apart = (stride for x in (q, k, v) for stride in (x.stride(0), x.stride(-2)))
        _attend[(lists, self.batch, splits)](
            q, k, v, table, table if pages is None else pages, self._sums, self._tops, self._totals, self._counters,
            out, norms, into, into.shape[-1], layer, len(table) // self.batch,
            0 if pages is None else pages.shape[-1], *apart,
            GROUP=group, PADDED=triton.next_power_of_2(group), KV_HEADS=self.kv_heads, SHARING=lists // self.kv_heads,
            DIM=self.head_dim, PAGE=page_size, SPLITS=splits, WIDTH=triton.next_power_of_2(splits),
            SCALE=self.head_dim**-0.5 * math.log2(math.e), LOGITS=logits is not None, BATCH=self.batch,
            MEAN=self.splits,
            ALL=triton.next_power_of_2(self.batch * (self.kv_heads if launch["RAGGED"] else 1)), **launch,
        )  # fmt: skip
        return out


def even_splits(programs: int, kv_heads: int, batch: int) -> int:
    """Shares of each KV head's tokens: the fewest with which rounds of programs are full, the last one too.

    Args:
        programs: that run side by side.
        kv_heads, batch: lists of tokens are so many times so many.
    """
    lists = kv_heads * batch
    if batch == 1:
        return max(1, programs // lists)

    def full(splits: int) -> float:
        return lists * splits / (-(-lists * splits // programs) * programs)

    choices = range(1, max(1, programs // lists) + 8)
    return next((splits for splits in choices if full(splits) >= _FULL), max(choices, key=full))


def multiprocessors(device: torch.device | str) -> int:
    """How many programs run side by side; a few where there is no GPU, and each is interpreted."""
    if torch.device(device).type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["room", "layer", "layers", "listed"])  # type: ignore[untyped-decorator]
def _attend(
    q, k, v, table, pages, sums, tops, totals, counters, out, norms, logits, room, layer, layers, listed,
    q_apart, q_stride, k_apart, k_stride, v_apart, v_stride,
    GROUP: tl.constexpr, PADDED: tl.constexpr, KV_HEADS: tl.constexpr, SHARING: tl.constexpr, DIM: tl.constexpr,
    PAGE: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr, RAGGED: tl.constexpr, LOGITS: tl.constexpr,
    BATCH: tl.constexpr, MEAN: tl.constexpr, ALL: tl.constexpr,
) -> Any:  # fmt: skip
    """One share of one list of pages (or of all that a KV head holds), for all query heads that read it."""
    head, request, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    this = request * (KV_HEADS * SHARING) + head
    kv_head, first = head // SHARING, split == 0
    row, at = tl.arange(0, ROWS), tl.arange(0, DIM)
    mine = row < GROUP
    # Heads lie side by side in a token, or each in memory of its own.
    entry, begins, apart = request * layers + layer, kv_head * DIM, KV_HEADS * DIM
    if RAGGED:
        entry, begins, apart = entry * KV_HEADS + kv_head, 0, DIM
    # Nothing that may still run writes the table; all that does not depend on it is asked for together with it.
    length = tl.load(table + entry * 3 + 2).to(tl.int32)
    keys, values = tl.load(table + entry * 3), tl.load(table + entry * 3 + 1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    queries = q + request * q_apart + (head * GROUP + row)[:, None] * q_stride
    query = tl.load(queries + at[None, :], mask=mine[:, None], other=0.0)
    new_key = tl.load(k + request * k_apart + kv_head * k_stride + at, mask=first & (at < DIM), other=0.0)
    new_value = tl.load(v + request * v_apart + kv_head * v_stride + at, mask=first & (at < DIM), other=0.0)
    slots, least = length, 0
    if PAGE:
        slots = listed * PAGE
    elif BATCH > 1:
        least = tl.cdiv(_mean_length(table, layer, layers, BATCH, KV_HEADS if RAGGED else 1, ALL), MEAN)
    share, used = share_of(slots, SPLITS, least)
    if split >= used:
        return
    pointer = tl.pointer_type(k.dtype.element_ty)
    keys = tl.multiple_of(keys.to(pointer), 16) + begins
    values = tl.multiple_of(values.to(pointer), 16) + begins

    if LOGITS:
        lists = (request * (layers - 1) + layer) * tl.num_programs(0)
        norms += lists * GROUP
        logits += ((lists + this) * GROUP + row).to(tl.int64)[:, None] * room

    top, total, acc = begin(ROWS, DIM)
    end = tl.minimum(split * share + share, slots)
    for start in tl.range(split * share, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < end
        if PAGE:
            page = tl.load(pages + this * listed + token // PAGE, mask=inside, other=0)
            token = page * PAGE + token % PAGE
            inside = inside & (token < length)
        offset = token.to(tl.int64) * apart
        seen = inside[None, :]
        top, total, acc, logit = take_in_tile(query, keys, values, offset, inside, seen, top, total, acc, DIM, SCALE)
        if LOGITS:
            tl.store(logits + token[None, :], logit, mask=mine[:, None] & inside[None, :])

    # The first share takes in the new token, from the inputs: nobody reads the slot that it is written to.
    top, total, acc, its = take_in_new(query, new_key, new_value, first, top, total, acc, SCALE)
    if LOGITS:
        tl.store(logits + length, its[:, None], mask=(mine & first)[:, None])
    stored = first & (head % SHARING == 0) & (at < DIM)
    slot = length.to(tl.int64) * apart
    tl.store(keys + slot + at, new_key, mask=stored)
    tl.store(values + slot + at, new_value, mask=stored)

    leave(sums, tops, totals, (this * SPLITS + split) * GROUP + row, top, total, acc, mine, DIM)
    if is_last(counters + this, used):
        each = tl.arange(0, PADDED)
        join(
            sums, tops, totals, out, norms, this, used, each < GROUP, this * GROUP + each,
            PADDED, WIDTH, min(WIDTH, max(1, 128 // PADDED)), GROUP, SPLITS, DIM,
        )  # fmt: skip


@triton.jit
def _mean_length(table, layer, layers, BATCH: tl.constexpr, EACH: tl.constexpr, ALL: tl.constexpr) -> Any:
    """Tokens of a layer's lists, of which each request has so many, in the mean, rounded up."""
    at = tl.arange(0, ALL)
    place = (at // EACH * layers + layer) * EACH + at % EACH
    lengths = tl.load(table + place * 3 + 2, mask=at < BATCH * EACH, other=0)
    return tl.cdiv(tl.sum(lengths).to(tl.int32), BATCH * EACH)
