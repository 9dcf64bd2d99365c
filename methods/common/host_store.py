"""Where the keys and values of one layer wait for decode: in pinned host memory, beside the prefill that made them.

They are copied out once, whole, on a stream of their own. The device reads pinned memory through its own address space
(`harness.engine.kernels.fetch`), so nothing is ever sent back on the host's initiative.

On a CPU "host" and "device" are the same memory; what is counted as host memory is what a GPU would not hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from harness.engine.cache import LayerCache
from harness.errors import InputError
from methods.common.capacity import capacity

Offload = Literal["async", "sync", "none"]


class HostStore:
    """Keys and values of one layer. Serves requests one after the other; host memory is kept as `capacity` says.

    PyTorch rounds pinned memory up to a power of two and keeps what it gets back for whoever asks next, so a process
    holds more of it than its stores do. Memory of the device ("none") is given back after every request.

    Attributes:
        keys, values: of the current request, [n + spare, kv_heads, head_dim]; empty before its `copy_out`. The host may
            read them when the stream that has waited for the copy is through with it.
        addresses: of all keys and of all values, [2] int64 on the cache's device. It remains the same tensor, so a
            recorded decode step finds the memory that the store holds now; empty before the first `copy_out`.
    """

    def __init__(self, offload: Offload, *, heads_apart: bool = False) -> None:
        """
        Args:
            offload: "async" copies beside what follows in the prefill, "sync" ahead of it; "none" copies as "sync"
                does, but to memory of the device.
            heads_apart: the tokens of one KV head lie together, which is how the host reads all of them at its best;
                kernels cannot read that.
        """
        self._offload, self._heads_apart = offload, heads_apart
        self._drop()
        self.addresses = torch.empty(0, dtype=torch.int64)
        self._side: Any = None
        self._copied: Any = None
        self._source: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the current request's keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def held_nbytes(self) -> int:
        """Bytes of the memory that is kept, room for longer requests included."""
        return self._memory.nbytes

    @property
    def spare_nbytes(self) -> int:
        """Bytes of the cache's device that are held beyond the request's own: none on a GPU, room to grow on a CPU."""
        return self.held_nbytes - self.nbytes if self._memory.device == self.addresses.device else 0

    def copy_out(self, cache: LayerCache, spare: int = 0, *, ahead: Callable[[], None] | None = None) -> None:
        """Begins to copy all keys and values that the cache holds now. They must not be overwritten before `wait`.

        Freeing them is safe at any time: they are held until then.

        Args:
            cache: with n tokens.
            spare: tokens to have room for behind them.
            ahead: work that may run where the copy does, ahead of it: it is done when `wait` is.

        Raises:
            InputError: the host has no memory for them.
        """
        self.wait()
        self._make_room(cache.keys, cache.length + spare)
        self._serve(cache.length + spare)
        if cache.keys.is_cuda:
            self._copy_on(self._stream(), cache, ahead or _nothing)
        else:
            (ahead or _nothing)()
            self._copy(cache)

    def wait(self) -> None:
        """Lets the current stream wait for the copy, if there is one that it has not waited for."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied, self._source = None, ()

    def forget(self) -> None:
        """Ends the request; host memory is kept for the next one."""
        self.wait()
        self._serve(0)
        if self._offload == "none":
            self._drop()

    def release(self) -> None:
        """Ends the request and gives the memory back; no recorded step may have known its address."""
        self.forget()
        self._drop()
        self.addresses = self.addresses[:0].clone()

    def _drop(self) -> None:
        self._memory = torch.empty(2, 0)
        self._serve(0)

    def _serve(self, tokens: int) -> None:
        self.keys: Tensor = self._half(0)[:tokens]
        self.values: Tensor = self._half(1)[:tokens]

    def _half(self, which: int) -> Tensor:
        """Room for keys, or for values, [room, kv_heads, head_dim]; [0] where there is no memory."""
        half = self._memory[which]
        return half.transpose(0, 1) if self._heads_apart and half.dim() > 1 else half

    def _make_room(self, like: Tensor, needed: int) -> None:
        held = len(self._half(0))
        room = needed if self._offload == "none" else capacity(needed, held)
        if room == held:
            return
        # The old memory goes first: the host may not have room for both.
        self._drop()
        kv_heads, dim = like.shape[1:]
        self._memory = self._empty((2, kv_heads, room, dim) if self._heads_apart else (2, room, kv_heads, dim), like)
        if not len(self.addresses):
            self.addresses = torch.empty(2, dtype=torch.int64, device=like.device)
        self.addresses.copy_(torch.tensor([half.data_ptr() for half in self._memory]))

    def _empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if self._offload == "none":
            return like.new_empty(shape)
        try:
            return torch.empty(shape, dtype=like.dtype, pin_memory=like.is_cuda)
        except RuntimeError:
            needed = f"{like.element_size() * math.prod(shape) / 2**30:.2f} GiB of host memory"
            raise InputError(f"no {needed} for parked tokens; offload=none keeps them on the device") from None

    def _stream(self) -> Any:
        cuda: Any = torch.cuda
        if self._offload != "async":
            return cuda.current_stream()
        self._side = self._side or cuda.Stream()
        return self._side

    def _copy_on(self, stream: Any, cache: LayerCache, ahead: Callable[[], None]) -> None:
        # Behind what computed the keys, and behind the last request's steps, which may still read this memory.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            ahead()
            self._copy(cache)
            self._copied = stream.record_event()
        # Not `record_stream`: the allocator would not serve others from what is freed until the host has seen the copy
        # end, and the host runs a whole prefill ahead.
        self._source = cache.keys, cache.values

    def _copy(self, cache: LayerCache) -> None:
        for store, now in ((self.keys[: cache.length], cache.keys), (self.values[: cache.length], cache.values)):
            # What is copied at a time has to be in one piece where it goes, or the host waits.
            pieces = zip(store.unbind(1), now.unbind(1), strict=True) if self._heads_apart else [(store, now)]
            for into, piece in pieces:
                into.copy_(piece, non_blocking=True)


def _nothing() -> None:
    pass
