"""Methods of which some layers' keys and values move to pinned host memory during the prefill, and stay there.

What reads them reads them where they lie: kernels over the bus, where they store new tokens as well. Without kernels
the host gathers what is read, and sends that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor

from harness.engine.method import Method, ModelContext
from harness.engine.step import Heads, Rows, Step
from harness.options import OptionSet
from methods.common.host_store import HostStore


class Offloading(Method):
    """Full attention; each layer's copies go out beside the prefill, so the device never holds more than two.

    Attributes:
        heads_apart: how keys and values lie on the host, see `HostStore`.
    """

    heads_apart: ClassVar[bool] = False

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        super().__init__(options, model)
        self.stores = {layer: HostStore("async", heads_apart=self.heads_apart) for layer in self.host_layers()}
        self._leaving: list[int] = []

    def host_layers(self) -> Iterable[int]:
        """The layers to move, by the options."""
        raise NotImplementedError

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Forgets the last request; its host memory is kept for the next."""
        super().begin(prompt_len, max_new_tokens)
        self._leaving.clear()
        for store in self.stores.values():
            store.forget()

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        """Full attention; behind it, in the prefill, keys and values begin to be copied out."""
        if step.phase == "decode" or layer not in self.stores:
            return super().attend(layer, heads, step)
        self._leave(but=1)
        out, cache = super().attend(layer, heads, step), self.cache[layer]
        self.stores[layer].copy_out(cache, cache.room)
        self._leaving.append(layer)
        return out

    def after_layer(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        """Changes no row; at the end of the prefill the last keys and values leave the device."""
        if step.phase == "prefill" and layer == len(self.cache) - 1:
            self._leave(but=0)
        return rows

    def _leave(self, but: int) -> None:
        """Gives back the device's copies of what went to the host, except in the last `but` layers.

        Those are still being copied beside the prefill, which waits for the older ones on the device alone.
        """
        while len(self._leaving) > but:
            layer = self._leaving.pop(0)
            store = self.stores[layer]
            store.wait()
            self.cache[layer].move(store.keys, store.values)

    def kv_bytes(self) -> int:
        """Bytes of the caches that are on the device when the prefill is over."""
        return sum(cache.nbytes for layer, cache in enumerate(self.cache) if layer not in self.stores)

    def kv_bytes_host(self) -> int:
        """Bytes of the others."""
        return sum(store.nbytes for store in self.stores.values())

    def extra_bytes(self) -> int:
        """Bytes that stores hold on the device beyond the request's: none on a GPU, room for longer ones on a CPU."""
        return sum(store.spare_nbytes for store in self.stores.values())
