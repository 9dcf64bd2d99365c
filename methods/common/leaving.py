"""Layers whose keys and values leave for host memory while the prefill that makes them goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.engine.cache import LayerCache
from methods.common.host_store import HostStore


class Leaving:
    """Copies caches out layer by layer, and gives back the device's memory behind the copies."""

    def __init__(self, stores: Mapping[int, HostStore]) -> None:
        """
        Args:
            stores: of the layers that leave.
        """
        self._stores = stores
        self._on_the_way: list[int] = []

    def begin(self) -> None:
        """Ends the last request; its host memory is kept for the next one."""
        self._on_the_way.clear()
        for store in self._stores.values():
            store.forget()

    def send(self, layer: int, cache: LayerCache) -> None:
        """Begins to copy what the layer holds, with as much room behind it as the cache has; some layers stay."""
        if layer in self._stores:
            self._stores[layer].copy_out(cache, cache.room)
            self._on_the_way.append(layer)

    def settle(self, caches: Sequence[LayerCache], but: int) -> None:
        """Caches lie on the host from now on, except those of the last `but` layers that were sent.

        Those are still being copied beside the prefill, which waits for the older ones on the device alone.
        """
        while len(self._on_the_way) > but:
            layer = self._on_the_way.pop(0)
            store = self._stores[layer]
            store.wait()
            caches[layer].move(store.keys, store.values)
