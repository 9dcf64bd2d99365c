"""Chosen tokens of a prefill go into caches, and no others ever were there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.engine.cache import LayerCache, expect_each, gather
from harness.engine.hardware import kernels_run
from harness.engine.step import Heads


def take(cache: LayerCache, keys: Tensor, values: Tensor, positions: Tensor, index: Tensor) -> None:
    """Adds chosen tokens, as the first that are there; one launch where kernels run.

    Args:
        cache: of the layer, empty.
        keys, values: [n, kv_heads, head_dim], the heads of a token contiguous.
        positions: [n] int64.
        index: of those that are added, [m] int64, or [m, kv_heads] for each KV head its own.
    """
    if not kernels_run(keys.device):
        cache.append(gather(keys, index), gather(values, index), positions[index])
        return
    from harness.engine.kernels.take_tokens import take_tokens

    cache.expect(len(index), keys[:0], index.shape[1] if index.dim() == 2 else 1)
    places = cache.token_positions.unsqueeze(1) if cache.alike else cache.positions
    take_tokens(keys, values, positions, index, cache.keys, cache.values, places)


def take_each(caches: Sequence[LayerCache], heads: Heads, lists: Tensor, counts: Sequence[int]) -> None:
    """The same for several caches, of layers or of single heads; one launch for all of them.

    Args:
        caches: each of as many KV heads, empty.
        heads: the keys and values of all these heads side by side, [n, heads, head_dim].
        lists: of tokens, [heads, m] int64, or [caches, m] where the heads of a cache take the same.
        counts: how many of its lists each cache takes.
    """
    width = heads.k.shape[1] // len(caches)
    columns = len(lists) // len(caches)
    if not kernels_run(heads.k.device):
        parts = (heads.k.chunk(len(caches), 1), heads.v.chunk(len(caches), 1), lists.chunk(len(caches)))
        each = zip(caches, *parts, counts, strict=True)
        for cache, keys, values, own, count in each:
            take(cache, keys, values, heads.positions, own[:, :count].T if width == columns else own[0, :count])
        return
    from harness.engine.kernels.take_tokens import take_lists

    like = heads.k[:0, :width]
    places = expect_each(caches, counts, like, columns)
    table = [[*place, count] for place, count in zip(places, counts, strict=True)]
    there = torch.tensor(table).to(heads.k.device, non_blocking=True)
    take_lists(heads.k, heads.v, heads.positions, lists.contiguous(), there, own=columns == width)
