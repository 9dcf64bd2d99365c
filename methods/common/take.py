"""Chosen tokens of a prefill go into a layer's cache, and no others ever were there."""

from __future__ import annotations

from torch import Tensor

from harness.engine.cache import LayerCache, gather
from harness.engine.hardware import kernels_run


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
