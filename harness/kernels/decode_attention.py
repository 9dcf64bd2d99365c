"""Attention of one new token over a cached prompt, bound by reading keys and values once.

Flash-decoding (Dao et al., 2023): the cached tokens are divided among programs, each keeps an online softmax over its
share, and the shares are joined afterwards. All query heads that read the same keys are handled by one program, padded
to the 16 rows of a tensor core tile.

Where a layer's cache lies and how long it is stands in a table on the device that the kernels read, and the grid does
not depend on it, so one captured CUDA graph serves every request.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a tile of queries: the least that tensor cores multiply.
ROWS = tl.constexpr(16)
# Tokens that a share of the cache is a multiple of.
STEP = tl.constexpr(16)
# Logit of nothing: finite, so that nothing minus nothing is 0 and not NaN.
NOTHING = tl.constexpr(-1.0e30)


class DecodeAttention:
    """Attention kernels of one model shape, with the buffers they need.

    One object must not run on two streams at once: its launches share buffers.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        splits: int | None = None,
        *,
        fused: bool = True,
        pdl: bool = False,
        block: int = 64,
        warps: int = 4,
        stages: int = 3,
    ) -> None:
        """
        Args:
            heads: query heads, a multiple of kv_heads; at most 16 of them share a KV head.
            head_dim: a power of two, at least 16.
            dtype: of queries, keys, values and result; sums are float32.
            splits: shares that the tokens of a KV head are divided into; by default 2 programs a multiprocessor.
            fused: the last program of a KV head to finish joins the shares; otherwise a second kernel does.
            pdl: launch with programmatic dependent launch (CUDA only).
            block: tokens a program reads at a time. warps, stages: Triton's launch options.
        """
        if heads % kv_heads or heads // kv_heads > ROWS.value:
            raise ValueError(f"{heads} query heads over {kv_heads} KV heads: want 1 to {ROWS.value} each")
        if head_dim < 16 or head_dim & (head_dim - 1):
            raise ValueError(f"head_dim must be a power of two and at least 16, not {head_dim}")
        self.heads, self.kv_heads, self.head_dim, self.dtype = heads, kv_heads, head_dim, dtype
        self.splits = splits or max(1, 2 * _multiprocessors(device) // kv_heads)
        self.fused = fused
        self._constants: dict[str, Any] = {
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "DIM": head_dim,
            "SCALE": head_dim**-0.5 * math.log2(math.e),
            "PDL": pdl,
        }
        # `launch_pdl` is an option of the CUDA back end alone.
        self._pdl = {"launch_pdl": True} if pdl else {}
        self._launch = {"BLOCK": block, "num_warps": warps, "num_stages": stages}
        shares = heads * self.splits
        self._sums = torch.empty((shares, head_dim), dtype=torch.float32, device=device)
        self._tops, self._totals = torch.empty((2, shares), dtype=torch.float32, device=device)
        self._counters = torch.zeros(heads, dtype=torch.int32, device=device)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, layer: int, out: Tensor | None = None) -> Tensor:
        """Attends to all cached tokens and the new one, and stores the new one behind them.

        Args:
            q: the new token's queries, [heads, head_dim], rotated; heads may lie apart, channels may not.
            k, v: its key, rotated, and value, [kv_heads, head_dim], likewise.
            table: [layers, 3] int64 contiguous: addresses of a layer's keys and values ([capacity, kv_heads, head_dim]
                contiguous, at multiples of 16 bytes) and the tokens there, the new one not counted. Slot `length` must
                be within capacity; the kernel does not change the table.
            layer: row of the table.
            out: where the result goes, [1, heads * head_dim] contiguous; allocated if not given.

        Returns:
            [1, heads * head_dim].
        """
        return self._run(q, k, v, table, layer, None, 0, out)

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
            pages: [lists, m] int32 contiguous, numbers of different pages in any order; lists is kv_heads, or heads
                where every query head has its own. The new token's page must be listed: that token is attended to in
                any case. Pages behind it count for nothing.
            page_size: tokens a page.
        """
        return self._run(q, k, v, table, layer, pages, page_size, out)

    def _run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor,
        layer: int,
        pages: Tensor | None,
        page_size: int,
        out: Tensor | None,
    ) -> Tensor:
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "channels of a head must be contiguous"
        out = q.new_empty((1, self.heads * self.head_dim)) if out is None else out
        lists, listed = (self.kv_heads, 0) if pages is None else pages.shape
        splits = self._splits(lists, listed * page_size if pages is not None else None)
        shares = self._sums, self._tops, self._totals
        sizes = {"LISTS": lists, "PAGE": page_size, "SPLITS": splits, "WIDTH": triton.next_power_of_2(splits)}
        _attend[(lists, splits)](
            q, k, v, table, table if pages is None else pages, *shares, self._counters, out,
            layer, listed, q.stride(0), k.stride(0), v.stride(0),
            PADDED=triton.next_power_of_2(self.heads // lists), FUSED=self.fused, **sizes, **self._constants,
            **self._launch, **self._pdl,
        )  # fmt: skip
        if not self.fused:
            _join[(lists, self.heads // lists)](
                table, *shares, out, layer, listed, **sizes, **self._constants, num_warps=4, **self._pdl
            )
        return out

    def _splits(self, lists: int, tokens: int | None) -> int:
        """As many programs for every number of lists, but no more than there is work for."""
        splits = max(1, self.splits * self.kv_heads // lists)
        return splits if tokens is None else min(splits, -(-tokens // STEP.value))


def _multiprocessors(device: torch.device | str) -> int:
    if torch.device(device).type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit  # type: ignore[untyped-decorator]
def _share(length, listed, PAGE: tl.constexpr, SPLITS: tl.constexpr) -> Any:
    """Slots to divide, slots a share, shares that have any; the first counts always, since it has the new token."""
    slots = length
    if PAGE:
        slots = listed * PAGE
    share = tl.maximum(tl.cdiv(tl.cdiv(slots, SPLITS), STEP), 1) * STEP
    return slots, share, tl.maximum(tl.cdiv(slots, share), 1)


@triton.jit  # type: ignore[untyped-decorator]
def _joined(
    sums, tops, totals, out, this, start, used,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, DIM: tl.constexpr,
) -> Any:  # fmt: skip
    """Joins the shares of COUNT query heads, from head `start` of the group on, and stores their result."""
    row, at = start + tl.arange(0, COUNT), tl.arange(0, DIM)
    mine = row < GROUP
    every = tl.arange(0, WIDTH)
    at_all = (this * SPLITS + every)[:, None] * GROUP + row[None, :]
    used_all = (every < used)[:, None] & mine[None, :]
    # Other multiprocessors wrote these: past the first level of cache.
    tops_all = tl.load(tops + at_all, mask=used_all, other=NOTHING, cache_modifier=".cg")
    totals_all = tl.load(totals + at_all, mask=used_all, other=0.0, cache_modifier=".cg")
    best = tl.max(tops_all, 0)
    total = tl.sum(tl.exp2(tops_all - best[None, :]) * totals_all, 0)
    acc = tl.zeros((CHUNK, COUNT, DIM), tl.float32)
    for begin in tl.range(0, used, CHUNK, num_stages=1):
        split = begin + tl.arange(0, CHUNK)
        place = (this * SPLITS + split)[:, None] * GROUP + row[None, :]
        there = (split < used)[:, None] & mine[None, :]
        weight = tl.exp2(tl.load(tops + place, mask=there, other=NOTHING, cache_modifier=".cg") - best[None, :])
        part = sums + place[:, :, None] * DIM + at[None, None, :]
        acc += weight[:, :, None] * tl.load(part, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
    head = this * GROUP + row
    result = tl.sum(acc, 0) / tl.where(mine, total, 1.0)[:, None]
    tl.store(out + head[:, None] * DIM + at[None, :], result, mask=mine[:, None])


@triton.jit(do_not_specialize=["layer", "listed"])  # type: ignore[untyped-decorator]
def _join(
    table, sums, tops, totals, out, layer, listed,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, LISTS: tl.constexpr, PAGE: tl.constexpr,
    SPLITS: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, PDL: tl.constexpr,
) -> Any:  # fmt: skip
    """The second kernel where shares are not joined by the first: a program for every query head."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    _, _, used = _share(tl.load(table + layer * 3 + 2).to(tl.int32), listed, PAGE, SPLITS)
    _joined(
        sums, tops, totals, out, tl.program_id(0), tl.program_id(1), used,
        1, WIDTH, min(WIDTH, 32), HEADS // LISTS, SPLITS, DIM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["layer", "listed"])  # type: ignore[untyped-decorator]
def _attend(
    q, k, v, table, pages, sums, tops, totals, counters, out, layer, listed, q_stride, k_stride, v_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, LISTS: tl.constexpr, PAGE: tl.constexpr,
    SPLITS: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    FUSED: tl.constexpr, PDL: tl.constexpr,
) -> Any:  # fmt: skip
    """One share of one list of pages (or of all that a KV head holds), for all query heads that read it."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    GROUP: tl.constexpr = HEADS // LISTS
    this, split = tl.program_id(0), tl.program_id(1)
    kv_head, first = this // (LISTS // KV_HEADS), split == 0
    row, at = tl.arange(0, ROWS), tl.arange(0, DIM)
    mine = row < GROUP
    # All that does not depend on the table is asked for together with it.
    length = tl.load(table + layer * 3 + 2).to(tl.int32)
    keys, values = tl.load(table + layer * 3), tl.load(table + layer * 3 + 1)
    query = tl.load(q + (this * GROUP + row)[:, None] * q_stride + at[None, :], mask=mine[:, None], other=0.0)
    new_key = tl.load(k + kv_head * k_stride + at, mask=first & (at < DIM), other=0.0)
    new_value = tl.load(v + kv_head * v_stride + at, mask=first & (at < DIM), other=0.0)
    slots, share, used = _share(length, listed, PAGE, SPLITS)
    if split >= used:
        return
    pointer = tl.pointer_type(k.dtype.element_ty)
    keys = tl.multiple_of(keys.to(pointer), 16) + kv_head * DIM
    values = tl.multiple_of(values.to(pointer), 16) + kv_head * DIM

    top = tl.full((ROWS,), NOTHING, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    end = tl.minimum(split * share + share, slots)
    for start in tl.range(split * share, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < end
        if PAGE:
            page = tl.load(pages + this * listed + token // PAGE, mask=inside, other=0)
            token = page * PAGE + token % PAGE
            inside = inside & (token < length)
        offset = token.to(tl.int64) * (KV_HEADS * DIM)
        key = tl.load(keys + offset[None, :] + at[:, None], mask=inside[None, :], other=0.0)
        logit = tl.dot(query, key, input_precision="ieee") * SCALE
        logit = tl.where(inside[None, :], logit, float("-inf"))
        higher = tl.maximum(top, tl.max(logit, 1))
        weight = tl.exp2(logit - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weight, 1)
        value = tl.load(values + offset[:, None] + at[None, :], mask=inside[:, None], other=0.0)
        acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        top = higher

    # The first share takes in the new token, from the inputs: nobody reads the slot that it is written to.
    logit_new = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * SCALE
    logit_new = tl.where(first, logit_new, NOTHING)
    higher_new = tl.maximum(top, logit_new)
    weight_new, shrink_new = tl.exp2(logit_new - higher_new), tl.exp2(top - higher_new)
    total = total * shrink_new + weight_new
    acc = acc * shrink_new[:, None] + weight_new[:, None] * new_value.to(tl.float32)[None, :]
    stored = first & (this % (LISTS // KV_HEADS) == 0) & (at < DIM)
    slot = length.to(tl.int64) * (KV_HEADS * DIM)
    tl.store(keys + slot + at, new_key, mask=stored)
    tl.store(values + slot + at, new_value, mask=stored)

    place = (this * SPLITS + split) * GROUP + row
    tl.store(sums + place[:, None] * DIM + at[None, :], acc, mask=mine[:, None])
    tl.store(tops + place, higher_new, mask=mine)
    tl.store(totals + place, total, mask=mine)
    if FUSED:
        # All threads have stored before one of them counts the share as done; who counts last sees all shares.
        tl.debug_barrier()
        done = tl.atomic_add(counters + this, 1, sem="acq_rel", scope="gpu")
        if done == used - 1:
            tl.store(counters + this, 0)
            _joined(
                sums, tops, totals, out, this, 0, used,
                PADDED, WIDTH, min(WIDTH, max(1, 64 // PADDED)), GROUP, SPLITS, DIM,
            )  # fmt: skip
