"""Brings blocks of keys and values into a layer's cache from where all of them lie, host memory included.

The device reads pinned host memory through its own address space, so which blocks are to come may be decided on the
device: no list goes to the host and back, and a captured CUDA graph can contain the transfer.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# 128 KiB under way at once: enough for the host link. More of it holds up the rest of the step, which then waits behind
# it for memory; docs/performance.md has the readings.
_PROGRAMS, _CHUNK = 16, 2048
# Of each of several caches: they look at their slots one after the other.
_FEWEST = 2


def fetch_blocks(
    source: Tensor, addresses: Tensor, like: Tensor, table: Tensor, layer: int, block: int,
    count: int = 1, apart: int = 1,
) -> None:  # fmt: skip
    """Copies whole blocks into the first slots of a cache.

    Args:
        source: [slots] int64, or [count, slots], the block that comes into each slot; negative where nothing comes.
        addresses: [2] int64, or [count, 2], of all keys and of all values, each [tokens, kv_heads, head_dim]
            contiguous.
        like: a tensor of their dtype with [kv_heads, head_dim] as its last dimensions.
        table, layer: the cache, see `harness.engine.kernels.decode_attention`.
        block: tokens a block, and a slot.
        count: caches that this is done for, from the one in row `layer` of the table on.
        apart: rows from one of them to the next.
    """
    size = block * like.shape[-2] * like.shape[-1]
    programs = max(_FEWEST, _PROGRAMS // count)
    _fetch[(programs, count)](source, addresses, like, table, layer, apart, source.shape[-1], size, programs, _CHUNK)


@triton.jit(do_not_specialize=["layer", "apart", "slots"])
def _fetch(
    source, addresses, like, table, layer, apart, slots,
    size: tl.constexpr, PROGRAMS: tl.constexpr, CHUNK: tl.constexpr,
) -> Any:  # fmt: skip
    row = tl.program_id(1)
    source += row * slots
    addresses += row * 2
    table += (layer + row * apart) * 3
    pointer = tl.pointer_type(like.dtype.element_ty)
    all_keys = tl.multiple_of(tl.load(addresses).to(pointer), 16)
    all_values = tl.multiple_of(tl.load(addresses + 1).to(pointer), 16)
    keys = tl.multiple_of(tl.load(table).to(pointer), 16)
    values = tl.multiple_of(tl.load(table + 1).to(pointer), 16)
    chunks: tl.constexpr = (size + CHUNK - 1) // CHUNK
    for item in range(0, (slots * chunks + PROGRAMS - 1) // PROGRAMS):
        this = item * PROGRAMS + tl.program_id(0)
        slot, chunk = this // chunks, this % chunks
        block = tl.load(source + slot, mask=slot < slots, other=-1)
        if block >= 0:
            at = chunk * CHUNK + tl.arange(0, CHUNK)
            inside = at < size
            come, go = block * size + at, slot.to(tl.int64) * size + at
            key = tl.load(all_keys + come, mask=inside)
            value = tl.load(all_values + come, mask=inside)
            tl.store(keys + go, key, mask=inside)
            tl.store(values + go, value, mask=inside)
