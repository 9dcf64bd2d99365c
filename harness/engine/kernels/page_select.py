"""Which pages of the KV cache a new token attends to (Quest, Tang et al., arXiv 2406.10774, section 3), on the device.

A page has the channel-wise minimum m and maximum M of its rotated keys. Its score for a query q,

    sum over channels c of max(q_c m_c, q_c M_c) = relu(q) . M + min(q, 0) . m,

bounds q . k of its keys from above. Two kernels a layer: one brings the bounds up to the new token and rates all pages,
the other picks the best. As in `decode_attention`, lengths come from a table on the device and grids are fixed, so one
captured CUDA graph serves every request.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.engine.kernels.online_softmax import check_shape
from harness.engine.kernels.radix import GREATEST, LEAST, digit_counts, first_shift, next_digit, sortable, store_chosen


class PageSelect:
    """Rates and picks pages for one model shape.

    What its methods return lies in buffers of the object and holds until the next call; not for two streams at once.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        room: int,
        page_size: int,
        per: Literal["kv_head", "query_head"],
        device: torch.device | str,
        *,
        batch: int = 1,
        pdl: bool = False,
        block: int = 64,
        warps: int = 8,
        best_warps: int | None = None,
    ) -> None:
        """
        Args:
            heads: query heads, a multiple of kv_heads; at most 16 of them share a KV head.
            head_dim: a power of two, at least 16.
            room: pages that the bounds have room for; at most 32768.
            page_size: tokens a page.
            per: who chooses: with kv_head the query heads of a KV head share pages, rated by the best of them.
            batch: requests at once, at most.
            pdl: launch with programmatic dependent launch (CUDA only).
            block: pages a program rates. warps: of the rating; best_warps: of the picking, by default by the room.
        """
        check_shape(heads, kv_heads, head_dim)
        if not 1 <= room <= 32768:
            raise ValueError(f"room for {room} pages: want 1 to 32768")
        self.heads, self.kv_heads, self.page_size, self.room = heads, kv_heads, page_size, room
        self.lists = kv_heads if per == "kv_head" else heads
        self._sizes = {"KV_HEADS": kv_heads, "DIM": head_dim, "PAGE": page_size, "PDL": pdl}
        self._rating = {"GROUP": heads // kv_heads, "JOINT": per == "kv_head", "BLOCK": block, "num_warps": warps}
        self._best_warps = best_warps or min(16, max(4, triton.next_power_of_2(room) // 256))
        # `launch_pdl` is an option of the CUDA back end alone.
        self._pdl = {"launch_pdl": True} if pdl else {}
        self._scores = torch.empty((batch * self.lists, room), dtype=torch.float32, device=device)
        self._pages = torch.empty(batch * self.lists * room, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the object's buffers."""
        return self._scores.nbytes + self._pages.nbytes

    def page_scores(self, q: Tensor, k: Tensor, bounds: Tensor, table: Tensor, layer: int) -> Tensor:
        """Takes each new token's key into its page's bounds, which its first token begins, and rates all pages.

        Sums are float32, in which products of half precision are exact.

        Args:
            q: the queries of each request's new token, [requests, heads, head_dim], rotated; heads may lie apart,
                channels may not.
            k: their keys, [requests, kv_heads, head_dim], likewise.
            bounds: [requests * layers, 2] int64 contiguous, request by request: addresses of the minima and the maxima
                of a layer's pages, each [pages, kv_heads, head_dim] contiguous, of the dtype of k, with the new token's
                page; pages within room.
            table: [requests * layers, 3] int64, likewise; its third column says how many tokens a layer has, the new
                one not counted. It and `bounds` are read before the kernel waits for the one ahead, which must not
                change them.
            layer: row of both, of each request.

        Returns:
            [requests, lists, room] float32, lists being kv_heads or heads: inf for the new token's page, -inf for those
            behind.
        """
        assert q.stride(-1) == k.stride(-1) == 1, "channels of a head must be contiguous"
        requests = len(q)
        grid = (self.kv_heads, triton.cdiv(self.room, self._rating["BLOCK"]), requests)
        # How far requests are apart counts for the second one on.
        _rate[grid](
            q, k, bounds, table, self._scores, layer, len(table) // requests, q.stride(0), q.stride(1), k.stride(0),
            k.stride(1), self.room, **self._sizes, **self._rating, **self._pdl,
        )  # fmt: skip
        return self._scores[: requests * self.lists].view(requests, self.lists, self.room)

    def best_pages(self, scores: Tensor, count: int) -> Tensor:
        """The `count` best pages of every list, of equal ones the first.

        Args:
            scores: [..., room] float32 contiguous, without NaN.
            count: 1 to room.

        Returns:
            [..., count] int32, ascending.
        """
        *lists, room = scores.shape
        assert 1 <= count <= room and scores.is_contiguous()
        pages = self._pages[: math.prod(lists) * count].view(*lists, count)
        # Tensors have powers of two elements, and a cache mostly some pages more than that: a main part and the rest.
        threads = 32 * self._best_warps
        main = max(threads, triton.next_power_of_2(room // 2 + 1))
        rest = max(threads, triton.next_power_of_2(max(1, room - main)))
        _best[(math.prod(lists),)](
            scores, pages, room, count,
            MAIN=main, REST=rest, PDL=self._sizes["PDL"], num_warps=self._best_warps, **self._pdl,
        )  # fmt: skip
        return pages


@triton.jit  # type: ignore[untyped-decorator]
def _take_in(
    k, low, high, length, kv_head, k_stride, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr
) -> Any:
    at = tl.arange(0, DIM)
    key = tl.load(k + kv_head * k_stride + at)
    place = ((length // PAGE).to(tl.int64) * KV_HEADS + kv_head) * DIM + at
    begun = (length % PAGE > 0) & (at < DIM)
    lowest = tl.load(low + place, mask=begun, other=float("inf")).to(tl.float32)
    highest = tl.load(high + place, mask=begun, other=float("-inf")).to(tl.float32)
    tl.store(low + place, tl.minimum(lowest, key.to(tl.float32)))
    tl.store(high + place, tl.maximum(highest, key.to(tl.float32)))


@triton.jit(do_not_specialize=["layer", "layers"])  # type: ignore[untyped-decorator]
def _rate(
    q, k, bounds, table, scores, layer, layers, q_apart, q_stride, k_apart, k_stride, room,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, JOINT: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
) -> Any:  # fmt: skip
    """Scores of a block of pages for the query heads of one KV head."""
    kv_head, block, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    entry = request * layers + layer
    q += request * q_apart
    k += request * k_apart
    scores += request * (KV_HEADS if JOINT else KV_HEADS * GROUP) * room
    at, page = tl.arange(0, DIM), block * BLOCK + tl.arange(0, BLOCK)
    # What earlier steps left is on its way while the product that makes the query still runs. They have ended: between
    # two steps there are launches that wait for all before them.
    length = tl.load(table + entry * 3 + 2).to(tl.int32)
    pointer = tl.pointer_type(k.dtype.element_ty)
    low = tl.multiple_of(tl.load(bounds + entry * 2).to(pointer), 16)
    high = tl.multiple_of(tl.load(bounds + entry * 2 + 1).to(pointer), 16)
    last = length // PAGE
    # The last page's score is infinite, so its bounds may change while others are read.
    whole = page < last
    place = (page.to(tl.int64)[:, None] * KV_HEADS + kv_head) * DIM + at[None, :]
    highest = tl.load(high + place, mask=whole[:, None], other=0.0)
    lowest = tl.load(low + place, mask=whole[:, None], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    beyond = tl.where(page == last, float("inf"), float("-inf"))
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for row in tl.static_range(GROUP):
        head = kv_head * GROUP + row
        query = tl.load(q + head * q_stride + at).to(tl.float32)[None, :]
        up, down = tl.maximum(query, 0.0), tl.minimum(query, 0.0)
        score = tl.sum(up * highest.to(tl.float32) + down * lowest.to(tl.float32), 1)
        best = tl.maximum(best, score)
        if not JOINT:
            tl.store(scores + head * room + page, tl.where(whole, score, beyond), mask=page < room)
    if JOINT:
        tl.store(scores + kv_head * room + page, tl.where(whole, best, beyond), mask=page < room)
    if last // BLOCK == block:
        _take_in(k, low, high, length, kv_head, k_stride, KV_HEADS, DIM, PAGE)


@triton.jit  # type: ignore[untyped-decorator]
def _merged(least, most, counts, other_least, other_most, other_counts) -> Any:
    return tl.minimum(least, other_least), tl.maximum(most, other_most), counts + other_counts


@triton.jit  # type: ignore[untyped-decorator]
def _range(key) -> Any:
    """The least and the greatest finite key, how many there are, and, in the upper 16 bits, how many are +inf."""
    finite = (key > LEAST) & (key < GREATEST)
    counts = finite.to(tl.int32) + ((key == GREATEST).to(tl.int32) << 16)
    return tl.reduce((tl.where(finite, key, GREATEST), tl.where(finite, key, LEAST), counts), 0, _merged)


@triton.jit  # type: ignore[untyped-decorator]
def _candidates(key, key_rest, count) -> Any:
    """Where the search begins: the keys from `low` to `low + span`, and how many of them to take.

    Those are the finite scores if the last one that is chosen is among them: mostly they differ in their lower bits
    alone, and each digit costs a microsecond.
    """
    least, most, counts = _range(key)
    least_rest, most_rest, counts_rest = _range(key_rest)
    least, most, counts = _merged(least, most, counts, least_rest, most_rest, counts_rest)
    infinite, finite = counts >> 16, counts & 0xFFFF
    within = (infinite < count) & (count <= infinite + finite)
    low = tl.where(within, least, 0).to(tl.uint32)
    span = tl.where(within, most - least, 0xFFFFFFFF).to(tl.uint32)
    return low, span, tl.where(within, count - infinite, count)


@triton.jit  # type: ignore[untyped-decorator]
def _best(scores, pages, room, count, MAIN: tl.constexpr, REST: tl.constexpr, PDL: tl.constexpr) -> Any:
    """Radix search for the key of the last page that is chosen, from the highest bits down."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    scores += tl.program_id(0) * room
    pages += tl.program_id(0) * count
    page, page_rest = tl.arange(0, MAIN), MAIN + tl.arange(0, REST)
    key, key_rest = sortable(scores, page, room), sortable(scores, page_rest, room)
    low, span, need = _candidates(key, key_rest, count)
    shift = first_shift(span)
    searching = count > 0
    while searching:
        counts = digit_counts(key, low, span, shift) + digit_counts(key_rest, low, span, shift)
        low, span, need, _, searching, shift = next_digit(counts, low, span, need, shift)
    above, equal = store_chosen(pages, page, key, low, span, need, 0, 0)
    store_chosen(pages, page_rest, key_rest, low, span, need, above, equal)
