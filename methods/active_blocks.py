"""A layer's active set on the device, the rest of its prompt in host memory: SlimInfer's KV cache manager.

All keys and values of the layer are copied out once, while the prefill goes on, and stay where they are; after that
blocks only ever come in, over blocks that are no longer wanted. Which ones is decided on the device, after a step's
attention, for the steps that follow: the transfer has the rest of the step to hide behind. A slot keeps its block until
another one is wanted there, so a swap moves what is missing and nothing else.

On a CPU "host" and "device" are the same memory; what is counted as host memory is what a GPU would not hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from harness.cache import LayerCache
from harness.errors import InputError
from methods.relevance import block_maxima, unit_attention_from_means, unit_means

if TYPE_CHECKING:
    from harness.resident import ResidentCaches

Offload = Literal["async", "sync", "none"]


class ActiveBlocks:
    """The active set of one layer. Serves requests of one shape, one after the other, in the same memory.

    Attributes:
        rows: prompt tokens that entered the layer. slots: blocks that are active at once.
        identity: of this object's memory; unlike an address it never comes back.
        moved, swaps: blocks that came in, and steps in which some did, of this request; [1] int64 each.
    """

    def __init__(self, cache: LayerCache, slots: int, block: int, unit: int, offload: Offload) -> None:
        """
        Args:
            cache: of the layer, holding all prompt tokens that entered it and nothing else.
            slots: blocks in the active set.
            block, unit: tokens of each.
            offload: "async" copies out beside the prefill and swaps beside the rest of a step; "sync" waits for both;
                "none" keeps everything on the device and swaps from there.

        Raises:
            InputError: the host has no memory for what is to wait there.
        """
        self.rows, self.slots, self._block, self._unit, self._offload = cache.length, slots, block, unit, offload
        self.identity, device = object(), cache.keys.device
        self._units = cache.keys.new_empty((-(-self.rows // unit), *cache.keys.shape[1:]))
        self._active = torch.empty(slots, dtype=torch.int64, device=device)
        self._addresses = torch.empty(2, dtype=torch.int64, device=device)
        self.moved, self.swaps = torch.zeros((2, 1), dtype=torch.int64, device=device)
        self._all = [self._like(part) for part in (cache.keys, cache.values)]
        self._copied: Any = None
        self.forget()

    def _like(self, part: Tensor) -> Tensor:
        if self._offload == "none":
            return torch.empty_like(part)
        try:
            return torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
        except RuntimeError:
            needed = f"{part.nbytes / 2**30:.2f} GiB of host memory"
            raise InputError(f"no {needed} for parked blocks; offload=none keeps them on the device") from None

    def copy_out(self, cache: LayerCache) -> None:
        """Begins to copy all keys and values to where they wait, in the prefill, behind the layer's attention."""
        self._finish_copy()
        self._cache, self._origin = cache, cache.positions
        self.moved.zero_()
        self.swaps.zero_()
        self._addresses.copy_(torch.tensor([part.data_ptr() for part in self._all]))
        self._units.copy_(unit_means(cache.keys, self._unit))
        if not cache.keys.is_cuda:
            self._copy()
            return
        cuda: Any = torch.cuda
        stream = cuda.Stream() if self._offload == "async" else cuda.current_stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            self._copy()
            self._copied = stream.record_event()

    def _copy(self) -> None:
        for everything, part in zip(self._all, (self._cache.keys, self._cache.values), strict=True):
            everything.copy_(part, non_blocking=True)

    def forget(self) -> None:
        """Lets go of the request's cache."""
        self._finish_copy()
        self._cache, self._origin = LayerCache(0), torch.empty(0)

    def _finish_copy(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def park(self, active: Tensor) -> None:
        """Leaves in the cache only the active blocks, before the first decode step.

        Args:
            active: numbers of the blocks, [slots] ascending, the last block among them.
        """
        self._finish_copy()
        cache, index = self._cache, block_rows(active, self._block, self.rows)
        keys, values, positions = cache.keys[index], cache.values[index], cache.positions[index]
        self._active.copy_(active)
        cache.reset()
        cache.append(keys, values, positions)

    def reselect(self, q: Tensor, choose: Callable[[Tensor], Tensor], gamma: float) -> Tensor:
        """Decides what the next steps attend to; the caller brings it in.

        Args:
            q: queries of the step's last row, [1, heads, head_dim].
            choose: (scores of all blocks) -> the wanted blocks, [slots] ascending, the last block among them.
            gamma: least share of the wanted blocks that must be active for the set to stay.

        Returns:
            The block that comes into each slot, [slots] int64; -1 where none does.
        """
        scores = block_maxima(unit_attention_from_means(q, self._units), self._block // self._unit)
        wanted = choose(scores)
        same = wanted.unsqueeze(1) == self._active
        fresh, leaving = ~same.any(1), ~same.any(0)
        swap = (~fresh).float().mean() < gamma
        # The n-th fresh block goes where the n-th leaving one was; there are as many of the one as of the other.
        arrivals = torch.zeros_like(wanted).scatter_add_(0, _rank(fresh), wanted * fresh)
        source = torch.where(leaving & swap, arrivals[_rank(leaving)], -1)
        self._active.copy_(torch.where(source < 0, self._active, source))
        self.moved += (source >= 0).sum()
        self.swaps += swap
        return source

    def back_to(self, active: Tensor) -> Tensor:
        """Forgets what was reselected since `park`, whose blocks these were; returns what `reselect` does."""
        source = torch.where(self._active == active, -1, active)
        self._active.copy_(active)
        self.moved.zero_()
        self.swaps.zero_()
        return source

    def bring_in(self, source: Tensor, layer: int, resident: ResidentCaches | None) -> None:
        """Copies the blocks that `reselect` named into their slots."""
        if resident is not None:
            resident.fetch(layer, source, self._addresses, self._units, self._block)
            return
        slots = (source >= 0).nonzero().squeeze(1)
        into, come = (_tokens(blocks, self._block) for blocks in (slots, source[slots]))
        for store, everything in zip((self._cache.keys, self._cache.values), self._all, strict=True):
            store[into] = everything[come.to(everything.device)].to(store.device)
        self.settle()

    def settle(self) -> None:
        """Brings the cache's original positions up to date with its slots."""
        index = block_rows(self._active, self._block, self.rows)
        self._cache.positions[: len(index)] = self._origin[index]

    @property
    def waiting_bytes(self) -> int:
        """Bytes of all keys and values of the layer's prompt, wherever they wait."""
        return sum(part.nbytes for part in self._all)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's keys and values."""
        return self.waiting_bytes // self.rows * self._block

    @property
    def unit_bytes(self) -> int:
        """Bytes of the units' mean keys."""
        return self._units.nbytes


def _rank(mask: Tensor) -> Tensor:
    """How many are true before each one that is: [n] bool -> [n] int64."""
    return (mask.cumsum(0) - 1).clamp(min=0)


def block_rows(blocks: Tensor, block: int, rows: int) -> Tensor:
    """Tokens of the given blocks of `rows` tokens, in the order of the blocks.

    Args:
        blocks: [m], the last block in the last place, so that only that one can be short and the number of tokens is
            known without asking the device; ascending where the tokens are to be.
        block: tokens a block.
        rows: tokens of all blocks.
    """
    index = _tokens(blocks, block)
    return index[: index.shape[0] - (-rows % block)]


def _tokens(blocks: Tensor, block: int) -> Tensor:
    return (blocks.unsqueeze(1) * block + torch.arange(block, device=blocks.device)).flatten()
