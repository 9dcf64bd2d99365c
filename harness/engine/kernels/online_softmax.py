"""Attention of a tile of queries in pieces: what a piece leaves behind, and how pieces are joined.

The state of a piece is, for every query, the highest logit so far (base 2), the sum of the weights relative to it, and
the sum of the weighted values (online softmax: Milakov and Gimelshein, arXiv 1805.02867). Programs that share a list of
tokens each leave a state in device memory, and the last of them joins all (flash-decoding: Dao et al., 2023).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# Rows of the smallest tile of queries: the least that tensor cores multiply.
ROWS = tl.constexpr(16)
# Tokens that a share is a multiple of.
STEP = tl.constexpr(16)
# Logit of nothing: finite, so that nothing minus nothing is 0 and not NaN.
NOTHING = tl.constexpr(-1.0e30)


def check_shape(heads: int, kv_heads: int, head_dim: int) -> None:
    """
    Raises:
        ValueError: the query heads of a KV head do not fit into a tile, or their channels are no power of two.
    """
    if heads % kv_heads or heads // kv_heads > ROWS.value:
        raise ValueError(f"{heads} query heads over {kv_heads} KV heads: want 1 to {ROWS.value} each")
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise ValueError(f"head_dim must be a power of two and at least 16, not {head_dim}")


@triton.jit
def share_of(tokens, SPLITS: tl.constexpr, least=0) -> Any:
    """Tokens a share, at `least` so many, and shares that have any; the first always counts, as it has new tokens."""
    share = tl.maximum(tl.cdiv(tl.maximum(tl.cdiv(tokens, SPLITS), least), STEP), 1) * STEP
    return share, tl.maximum(tl.cdiv(tokens, share), 1)


@triton.jit
def begin(QUERIES: tl.constexpr, DIM: tl.constexpr) -> Any:
    """The state before the first token."""
    nothing = tl.full((QUERIES,), NOTHING, tl.float32)
    return nothing, tl.zeros((QUERIES,), tl.float32), tl.zeros((QUERIES, DIM), tl.float32)


@triton.jit
def take_in_tile(
    query, keys, values, offset, inside, seen, top, total, acc, DIM: tl.constexpr, SCALE: tl.constexpr
) -> Any:
    """Attends to a tile of tokens: those at `offset` elements from `keys` and `values` that are `inside`.

    Of them a query attends to those that it has `seen`: [1, tokens], or [queries, tokens] where queries differ.

    Returns:
        The state, and the tile's logits, base 2.
    """
    at = tl.arange(0, DIM)
    key = tl.load(keys + offset[None, :] + at[:, None], mask=inside[None, :], other=0.0)
    value = tl.load(values + offset[:, None] + at[None, :], mask=inside[:, None], other=0.0)
    logit = tl.dot(query, key, input_precision="ieee") * SCALE
    logit = tl.where(seen, logit, float("-inf"))
    higher = tl.maximum(top, tl.max(logit, 1))
    weight = tl.exp2(logit - higher[:, None])
    shrink = tl.exp2(top - higher)
    acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return higher, total * shrink + tl.sum(weight, 1), acc, logit


@triton.jit
def weigh(query, key, value, top, total, acc, seen, MASKED: tl.constexpr, SCALE: tl.constexpr) -> Any:
    """Attends to a tile of keys that is at hand, [d, tokens], where MASKED to those that a query has `seen`."""
    # Scaled late, a logit costs one instruction in the exponent, and none of its own.
    logit = tl.dot(query, key, input_precision="ieee")
    if MASKED:
        logit = tl.where(seen, logit, float("-inf"))
    higher = tl.maximum(top, tl.max(logit, 1) * SCALE)
    weight, shrink = tl.exp2(logit * SCALE - higher[:, None]), tl.exp2(top - higher)
    acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return higher, total * shrink + tl.sum(weight, 1), acc


@triton.jit
def take_in_new(query, key, value, attended, top, total, acc, SCALE: tl.constexpr) -> Any:
    """Attends to one token whose key and value are at hand, if `attended`; returns as `take_in_tile`."""
    logit = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], 1) * SCALE
    logit = tl.where(attended, logit, NOTHING)
    higher = tl.maximum(top, logit)
    weight, shrink = tl.exp2(logit - higher), tl.exp2(top - higher)
    acc = acc * shrink[:, None] + weight[:, None] * value.to(tl.float32)[None, :]
    return higher, total * shrink + weight, acc, logit


@triton.jit
def leave(sums, tops, totals, place, top, total, acc, mine, DIM: tl.constexpr) -> Any:
    """Stores the state of the rows that are `mine`, each at its `place`."""
    at = tl.arange(0, DIM)
    tl.store(sums + place[:, None] * DIM + at[None, :], acc, mask=mine[:, None])
    tl.store(tops + place, top, mask=mine)
    tl.store(totals + place, total, mask=mine)


@triton.jit
def is_last(counter, programs) -> Any:
    """Whether this program is the last of so many to come here. It sees what the others stored before."""
    # All threads have stored before one of them counts.
    tl.debug_barrier()
    done = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if done == programs - 1:
        tl.store(counter, 0)
    return done == programs - 1


@triton.jit
def _states(
    sums, tops, this, first, used, mine,
    COUNT: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, DIM: tl.constexpr,
) -> Any:  # fmt: skip
    """Highest logits, [CHUNK, COUNT], and weighted sums, [CHUNK, COUNT, DIM], of shares from the `first` on."""
    split, row, at = first + tl.arange(0, CHUNK), tl.arange(0, COUNT), tl.arange(0, DIM)
    place = (this * SPLITS + split)[:, None] * GROUP + row[None, :]
    there = (split < used)[:, None] & mine[None, :]
    top = tl.load(tops + place, mask=there, other=NOTHING, cache_modifier=".cg")
    part = sums + place[:, :, None] * DIM + at[None, None, :]
    return top, tl.load(part, mask=there[:, :, None], other=0.0, cache_modifier=".cg")


@triton.jit
def join(
    sums, tops, totals, out, norms, this, used, mine, place_out,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, DIM: tl.constexpr,
) -> Any:  # fmt: skip
    """Joins `used` states of COUNT queries, GROUP apart, and stores the results of those that are `mine`.

    A query's result goes to its `place_out` in `out`, and the log of its softmax's denominator, base 2, in `norms`.
    """
    row, at = tl.arange(0, COUNT), tl.arange(0, DIM)
    every = tl.arange(0, WIDTH)
    at_all = (this * SPLITS + every)[:, None] * GROUP + row[None, :]
    used_all = (every < used)[:, None] & mine[None, :]
    # Other multiprocessors wrote these: past the first level of cache.
    tops_all = tl.load(tops + at_all, mask=used_all, other=NOTHING, cache_modifier=".cg")
    totals_all = tl.load(totals + at_all, mask=used_all, other=0.0, cache_modifier=".cg")
    # Asked for before the first of these is awaited.
    top, acc = _states(sums, tops, this, 0, used, mine, COUNT, CHUNK, GROUP, SPLITS, DIM)
    best = tl.max(tops_all, 0)
    total = tl.sum(tl.exp2(tops_all - best[None, :]) * totals_all, 0)
    acc *= tl.exp2(top - best[None, :])[:, :, None]
    for first in tl.range(CHUNK, used, CHUNK, num_stages=1):
        top, part = _states(sums, tops, this, first, used, mine, COUNT, CHUNK, GROUP, SPLITS, DIM)
        acc += tl.exp2(top - best[None, :])[:, :, None] * part
    total = tl.where(mine, total, 1.0)
    tl.store(norms + place_out, best + tl.log2(total), mask=mine)
    tl.store(out + place_out[:, None] * DIM + at[None, :], tl.sum(acc, 0) / total[:, None], mask=mine[:, None])
