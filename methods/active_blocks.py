"""Which prompt blocks of a layer decode attends to, and where the others wait (SlimInfer's KV cache manager).

On a CPU "host" and "device" are the same memory; what is counted as parked is what a GPU would not hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.cache import LayerCache
from methods.relevance import unit_attention_from_means, unit_means


class ActiveBlocks:
    """The active set of one layer: its cache holds the active blocks in front of the generated tokens.

    Attributes:
        rows: prompt tokens that entered the layer.
        units: mean key of each unit of those tokens, [units, kv_heads, head_dim].
        parked_bytes: bytes of all those tokens' keys and values, which stay parked when a block becomes active.
    """

    def __init__(self, cache: LayerCache, active: Tensor, block: int, unit: int) -> None:
        """Parks everything but the active blocks.

        Args:
            cache: of the layer, holding all prompt tokens that entered it and nothing else.
            active: numbers of the first active blocks, [m] ascending, the last block among them.
            block, unit: tokens of each.
        """
        self.rows, self._block, self._cache = cache.length, block, cache
        self._all = tuple(store.to("cpu", copy=True) for store in (cache.keys, cache.values, cache.positions))
        self.units = unit_means(cache.keys, unit)
        self._active = active
        index = block_rows(active, block, self.rows)
        self._count = index.shape[0]
        keys, values, positions = cache.keys[index], cache.values[index], cache.positions[index]
        cache.reset()
        cache.append(keys, values, positions)
        self.parked_bytes = sum(store.nbytes for store in self._all[:2])

    def unit_scores(self, q: Tensor) -> Tensor:
        """Relevance of each unit to the last queries, [units]; q: [w, heads, head_dim]."""
        return unit_attention_from_means(q, self.units)

    def overlap(self, wanted: Tensor) -> float:
        """Share of the wanted blocks that are active."""
        return float(torch.isin(wanted, self._active).float().mean())

    def replace(self, wanted: Tensor) -> None:
        """Makes the wanted blocks, [m] ascending, the last block among them, the active ones."""
        index = block_rows(wanted, self._block, self.rows).cpu()
        stores = (self._cache.keys, self._cache.values, self._cache.positions)
        for store, everything in zip(stores, self._all, strict=True):
            store[: self._count] = everything[index]
        self._active = wanted


def block_rows(blocks: Tensor, block: int, rows: int) -> Tensor:
    """Tokens of the given blocks of `rows` tokens, ascending.

    Args:
        blocks: [m] ascending, the last block among them, so that only the last one can be short and the number of
            tokens is known without asking the device.
        block: tokens a block.
        rows: tokens of all blocks.
    """
    index = (blocks.unsqueeze(1) * block + torch.arange(block, device=blocks.device)).flatten()
    return index[: index.shape[0] - (-rows % block)]
