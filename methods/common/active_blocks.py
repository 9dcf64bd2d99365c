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
from harness.engine.hardware import kernels_take
from harness.engine.parallel import ALONE, Ranks
from methods.common.blocks import block_maxima, block_rows, block_tokens, lifted, unit_attention, unit_means
from methods.common.capacity import capacity
from methods.common.host_store import HostStore, Offload
from methods.common.take import take

NONE = torch.iinfo(torch.int64).max
"""Block in a slot that the request does not have: behind all others, in ascending order."""


_NO_CACHE = LayerCache(0)


class ActiveBlocks:
    """The active set of one layer. Serves requests one after the other; memory is kept as `capacity` says.

    A recorded decode step works on all of that memory. What tells it how much of it is this request's (scores that are
    never best, slots with no block) is on the device as well, so one recording serves prompts of all lengths that fit.

    Attributes:
        memory: identity of what a recorded step has the addresses of; unlike an address it never comes back.
        block: tokens a block.
        units: mean keys of the units, [room for units, kv_heads, head_dim].
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
        self.block, self._unit, self._ranks, self._ends = block, unit, ranks, ends
        self._store = HostStore(offload)
        self.memory = object()
        self._lift = self._unit_lift = self.units = torch.empty(0)
        self._state = self._before = torch.zeros(2, dtype=torch.int64)
        self._let_go()

    @property
    def active(self) -> Tensor:
        """The block in each slot, [room for slots] int64; `NONE` behind the request's own slots. A view."""
        return self._state[:-2]

    @property
    def moved(self) -> Tensor:
        """Blocks that came in, [1] int64. A view, as `swaps`, the steps in which some did."""
        return self._state[-2:-1]

    @property
    def swaps(self) -> Tensor:
        """Steps in which blocks came in, [1] int64. A view."""
        return self._state[-1:]

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
        held = len(self._lift), len(self.active)
        room = capacity(blocks, held[0])
        # There are never more slots than blocks to choose from.
        slot_room = capacity(slots, min(held[1], room))
        if (room, slot_room) == held:
            return
        self.memory, units = object(), room * (self.block // self._unit)
        self._lift, self._unit_lift = (like.new_empty(size, dtype=torch.float32) for size in (room, units))
        self.units = like.new_empty((units, *like.shape[1:]))
        self._state, self._before = like.new_empty((2, slot_room + 2), dtype=torch.int64)

    def forget(self) -> None:
        """Lets go of the request's cache, if it has not yet: the next request's first layer waits."""
        if self._cache is not _NO_CACHE:
            self._store.forget()
            self._let_go()

    def _let_go(self) -> None:
        self._cache, self._origin, self._chosen, self._index = _NO_CACHE, *(torch.empty(0) for _ in range(3))

    def _prepare(self) -> None:
        keys, block, unit = self._cache.keys, self.block, self._unit
        own = self.units, self._unit_lift, self._lift, self._state, self._before
        if kernels_take(keys):
            from harness.engine.kernels.active_set import prepare

            prepare(keys, self._chosen, *own, unit=unit, block=block, ends=self._ends)
            return
        means = unit_means(keys, unit)
        _overwrite(self.units, means, 0)
        _overwrite(self._unit_lift, self._unit_lift.new_zeros(len(means)), -torch.inf)
        blocks = self._lift.new_zeros(-(-len(keys) // block))
        _overwrite(self._lift, lifted(blocks, *self._ends), -torch.inf)
        self._state.zero_()
        _overwrite(self.active, self._chosen, NONE)
        self._before.copy_(self._state)

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
            gamma: least share of the blocks that this query wants that must be active for the set to stay.

        Returns:
            As `reselect` does.
        """
        if not kernels_take(q):
            return self.reselect(self.wanted(q), gamma)
        from harness.engine.kernels import active_set

        relevance = self._ranks.mean(active_set.rate(q, self.units, self._unit_lift))
        return active_set.reselect(relevance, self._lift, self._state, self._before, gamma)

    def wanted(self, q: Tensor) -> Tensor:
        """The best blocks for a step, as many as the request has slots, ascending, then `NONE`: [room for slots] int64.

        Relevance of a unit is the softmax over units of the query against their mean keys, mean over heads.

        Args:
            q: the step's query, [1, heads, head_dim].
        """
        units = self._ranks.mean(unit_attention(q, self.units, self._unit_lift))
        scores = block_maxima(units, self.block // self._unit) + self._lift
        best = scores.topk(len(self.active)).indices
        return best.masked_fill(self.active == NONE, NONE).sort().values

    def reselect(self, wanted: Tensor, gamma: float) -> Tensor:
        """Decides what the next steps attend to; the caller brings it in.

        Args:
            wanted: as `wanted` returns it; the last block is among them.
            gamma: least share of the wanted blocks that must be active for the set to stay.

        Returns:
            The block that comes into each slot, [room for slots] int64; -1 where none does.
        """
        self._before.copy_(self._state)
        return swapped(self._state, wanted, gamma)

    def take_back(self) -> Tensor:
        """Undoes the last `reselect`, unless its step ran for good; returns what that does."""
        now = self.active.clone()
        self._state.copy_(self._before)
        return torch.where(now == self.active, -1, self.active)

    @property
    def ranks(self) -> Ranks:
        """Those that choose together."""
        return self._ranks

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All that steps know of the request, and change: of its blocks and units, of its slots, where it waits."""
        return self._lift, self._unit_lift, self.units, self._state, self._before, self.addresses

    @property
    def addresses(self) -> Tensor:
        """Where all keys and all values wait, see `HostStore`."""
        return self._store.addresses

    def bring_in(self, source: Tensor) -> None:
        """Copies the blocks that `reselect` named into their slots."""
        slots = (source >= 0).nonzero().squeeze(1)
        into, come = (block_tokens(blocks, self.block) for blocks in (slots, source[slots]))
        for here, there in ((self._cache.keys, self._store.keys), (self._cache.values, self._store.values)):
            here[into] = there[come.to(there.device)].to(here.device)
        self.settle()
        # Only a step that is recorded may have run for nothing.
        self._before.copy_(self._state)

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
        return int(self.moved) * self.block * 2 * self.units[:1].nbytes

    @property
    def extra_bytes(self) -> int:
        """Bytes held on the device beside keys and values, room for longer requests included."""
        own = (self.units, self._unit_lift, self._lift, self._state, self._before)
        return self._store.spare_nbytes + sum(tensor.nbytes for tensor in own)


def swapped(state: Tensor, wanted: Tensor, gamma: float) -> Tensor:
    """Blocks that are wanted take the slots of others, if too few of them are active.

    Args:
        state: [..., slots + 2] int64, the block in each slot, blocks that came in so far, and steps in which some did;
            is changed.
        wanted: [..., slots], as `ActiveBlocks.wanted` returns it.
        gamma: see `ActiveBlocks.reselect`.

    Returns:
        [..., slots] int64, as `ActiveBlocks.reselect`.
    """
    active = state[..., :-2]
    same = wanted.unsqueeze(-1) == active.unsqueeze(-2)
    fresh, leaving = ~same.any(-1), ~same.any(-2)
    slots = (active != NONE).sum(-1, keepdim=True)
    swap = (slots - fresh.sum(-1, keepdim=True)) / slots < gamma
    # The n-th fresh block goes where the n-th leaving one was; there are as many of the one as of the other.
    arrivals = torch.zeros_like(wanted).scatter_add_(-1, _rank(fresh), wanted * fresh)
    source = torch.where(leaving & swap, arrivals.gather(-1, _rank(leaving)), -1)
    active.copy_(torch.where(source < 0, active, source))
    state[..., -2:-1] += (source >= 0).sum(-1, keepdim=True)
    state[..., -1:] += swap
    return source


def _overwrite(memory: Tensor, content: Tensor, beyond: float) -> None:
    """Puts `content` at the beginning and fills what lies beyond it."""
    memory[: len(content)] = content
    memory[len(content) :] = beyond


def _rank(mask: Tensor) -> Tensor:
    """How many are true before each one that is: [..., n] bool -> [..., n] int64."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
