"""A layer's active set on the device, the rest of its prompt in host memory: SlimInfer's KV cache manager.

All keys and values of the layer are copied out once, while the prefill goes on, and stay where they are; after that
blocks only ever come in, over blocks that are no longer wanted. Which ones is decided on the device, after a step's
attention, for the steps that follow: the transfer has the rest of the step to hide behind. A slot keeps its block until
another one is wanted there, so a swap moves what is missing and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.parallel import ALONE, Ranks
from methods.common.active_state import ActiveState
from methods.common.blocks import block_rows, block_tokens
from methods.common.capacity import capacity
from methods.common.host_store import HostStore, Offload
from methods.common.take import take

_NO_CACHE = LayerCache(0)


class ActiveBlocks:
    """The active set of one layer. Serves requests one after the other; memory is kept as `capacity` says.

    A recorded decode step works on all of that memory. What tells it how much of it is this request's (scores that are
    never best, slots with no block) is on the device as well, so one recording serves prompts of all lengths that fit.

    Attributes:
        memory: identity of what a recorded step has the addresses of; unlike an address it never comes back.
        block: tokens a block.
        ranks: those that choose together.
        state: what is chosen with; a row, this request's.
    """

    def __init__(
        self, block: int, unit: int, offload: Offload, ranks: Ranks = ALONE, *, ends: tuple[int, int] = (0, 1)
    ) -> None:
        """
        Args:
            block, unit: tokens of each.
            offload: where the prompt waits, see `HostStore`.
            ranks: that choose together.
            ends: first and last blocks that are always active.
        """
        self.block, self._unit, self.ranks, self._ends = block, unit, ranks, ends
        self._store = HostStore(offload)
        self.memory = object()
        self.state = ActiveState.room(1, 0, block // unit, 0, torch.empty(0, 0, 0))
        self._let_go()

    @property
    def active(self) -> Tensor:
        """The block in each slot, [room for slots] int64; `NONE` behind the request's own slots. A view."""
        return self.state.active[0]

    @property
    def moved(self) -> Tensor:
        """Blocks that came in, [1] int64. A view, as `swaps`, the steps in which some did."""
        return self.state.state[0, -2:-1]

    @property
    def swaps(self) -> Tensor:
        """Steps in which blocks came in, [1] int64. A view."""
        return self.state.state[0, -1:]

    def copy_out(self, cache: LayerCache, chosen: Tensor, index: Tensor) -> None:
        """Begins to copy all keys and values to where they wait, in the prefill, behind the layer's attention.

        What the first decode step chooses with is made beside the prefill, too.

        Args:
            cache: of the layer, holding all prompt tokens that entered it and nothing else.
            chosen: the blocks that are active first, [slots] ascending, the last block among them.
            index: their tokens, ascending.

        Raises:
            InputError: the host has no memory for what is to wait there.
        """
        self._cache, self._origin, self._chosen, self._index = cache, cache.token_positions, chosen, index
        self._make_room(-(-cache.length // self.block), len(chosen), cache.keys)
        self._store.copy_out(cache, ahead=self._prepare)

    def _make_room(self, blocks: int, slots: int, like: Tensor) -> None:
        held, _, held_slots = self.state.sizes
        room = capacity(blocks, held)
        # There are never more slots than blocks to choose from.
        slot_room = capacity(slots, min(held_slots, room))
        if (room, slot_room) == (held, held_slots):
            return
        self.memory = object()
        self.state = ActiveState.room(1, room, self.block // self._unit, slot_room, like)

    def forget(self) -> None:
        """Lets go of the request's cache, if it has not yet: the next request's first layer waits."""
        if self._cache is not _NO_CACHE:
            self._store.forget()
            self._let_go()

    def _let_go(self) -> None:
        self._cache, self._origin, self._chosen, self._index = _NO_CACHE, *(torch.empty(0) for _ in range(3))

    def _prepare(self) -> None:
        self.state.prepare(self._cache.keys, self._chosen, unit=self._unit, block=self.block, ends=self._ends)

    def park(self) -> None:
        """Ahead of the first decode step: only the active blocks are left in the cache."""
        self._store.wait()
        cache = self._cache
        whole = cache.keys, cache.values, cache.token_positions
        cache.reset()
        take(cache, *whole, self._index)

    def rechoose(self, q: Tensor, gamma: float) -> Tensor:
        """Decides, by a step's query, what the next steps attend to; the caller brings it in.

        Args:
            q: [1, heads, head_dim].
            gamma: as in `ActiveState.rechoose`.

        Returns:
            The block that comes into each slot, [room for slots] int64; -1 where none does.
        """
        return self.state.rechoose(q, gamma, self.ranks)[0]

    def take_back(self) -> Tensor:
        """Undoes the last `rechoose`, unless its step ran for good; returns what that does."""
        return self.state.take_back()[0]

    @property
    def addresses(self) -> Tensor:
        """Where all keys and all values wait, see `HostStore`."""
        return self._store.addresses

    def bring_in(self, source: Tensor) -> None:
        """Copies the blocks that `rechoose` named into their slots."""
        slots = (source >= 0).nonzero().squeeze(1)
        into, come = (block_tokens(blocks, self.block) for blocks in (slots, source[slots]))
        for here, there in ((self._cache.keys, self._store.keys), (self._cache.values, self._store.values)):
            here[into] = there[come.to(there.device)].to(here.device)
        self.settle()
        # Only a step that is recorded may have run for nothing.
        self.state.before.copy_(self.state.state)

    def settle(self) -> None:
        """Brings the cache's original positions up to date with its slots."""
        index = block_rows(self.active[: len(self._chosen)], self.block, len(self._origin))
        self._cache.token_positions[: len(index)] = self._origin[index]

    @property
    def waiting_bytes(self) -> int:
        """Bytes of all keys and values of the layer's prompt, wherever they wait."""
        return self._store.nbytes

    @property
    def moved_bytes(self) -> int:
        """Bytes of the keys and values that came in."""
        return int(self.moved) * self.block * 2 * self.state.units[:, :1].nbytes

    @property
    def extra_bytes(self) -> int:
        """Bytes held on the device beside keys and values, room for longer requests included."""
        return self._store.spare_nbytes + sum(part.nbytes for part in self.state)
