"""What the choice of a layer's active blocks knows, on the device, of as many requests as there are side by side.

A step's queries are compared with the mean keys of units; the best blocks of each request take over where too few of
them are active. One request alone is a row like any other. Sizes are those of the memory: what tells how much of it is
a request's (logits and scores of minus infinity, slots with no block) lies on the device as well, so that a recorded
step serves all that fit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from harness.engine.hardware import kernels_take
from harness.engine.parallel import Ranks
from methods.common.blocks import lifted, unit_attention, unit_means

NONE = torch.iinfo(torch.int64).max
"""Block in a slot that the request does not have: behind all others, in ascending order."""


class ActiveState(NamedTuple):
    """A row a request.

    Attributes:
        lift: what is added to the blocks' scores, [requests, blocks] float32: infinity for those that always stay,
            minus infinity behind the request's own.
        unit_lift: what is added to the units' logits, [requests, units] float32: 0, and minus infinity behind its own.
        units: mean keys, [requests, units, kv_heads, head_dim].
        state: [requests, slots + 2] int64: the block in each slot, `NONE` behind its own slots; then blocks that came
            in so far, and steps in which some did.
        before: the same ahead of the last choice.
    """

    lift: Tensor
    unit_lift: Tensor
    units: Tensor
    state: Tensor
    before: Tensor

    @classmethod
    def room(cls, requests: int, blocks: int, per_block: int, slots: int, like: Tensor) -> ActiveState:
        """Memory, with anything in it.

        Args:
            requests, blocks, slots: see above.
            per_block: units a block.
            like: keys, [tokens, kv_heads, head_dim].
        """
        units = blocks * per_block
        lift, unit_lift = (like.new_empty((requests, size), dtype=torch.float32) for size in (blocks, units))
        state, before = (like.new_empty((requests, slots + 2), dtype=torch.int64) for _ in range(2))
        return cls(lift, unit_lift, like.new_empty((requests, units, *like.shape[1:])), state, before)

    @property
    def active(self) -> Tensor:
        """The block in each slot, [requests, slots]. A view."""
        return self.state[:, :-2]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Blocks, units and slots that there is room for."""
        return self.lift.shape[1], self.unit_lift.shape[1], self.active.shape[1]

    def first(self, count: int) -> ActiveState:
        """Of the first so many requests. Views."""
        return ActiveState(*(part[:count] for part in self))

    def prepare(self, keys: Tensor, chosen: Tensor, *, unit: int, block: int, ends: tuple[int, int]) -> None:
        """Makes ready what the steps of a request choose with, which is the only one here.

        Args:
            keys: of its prompt, [tokens, kv_heads, head_dim].
            chosen: the blocks that are active first, [slots] ascending.
            unit, block: tokens of each.
            ends: first and last blocks that are always active.
        """
        lift, unit_lift, units, state, before = (part[0] for part in self)
        if kernels_take(keys):
            from harness.engine.kernels.active_set import prepare

            prepare(keys, chosen, units, unit_lift, lift, state, before, unit=unit, block=block, ends=ends)
            return
        means = unit_means(keys, unit)
        _overwrite(units, means, 0)
        _overwrite(unit_lift, unit_lift.new_zeros(len(means)), -torch.inf)
        _overwrite(lift, lifted(lift.new_zeros(-(-len(keys) // block)), *ends), -torch.inf)
        state.zero_()
        _overwrite(state[:-2], chosen, NONE)
        before.copy_(state)

    def rechoose(self, q: Tensor, gamma: float, ranks: Ranks) -> Tensor:
        """Decides, by each request's query in a step, what its next steps attend to; the caller brings it in.

        Relevance of a unit is the softmax over units of the query against their mean keys, mean over heads.

        Args:
            q: [requests, heads, head_dim].
            gamma: least share of the blocks that a query wants that must be active for the set to stay.
            ranks: that choose together.

        Returns:
            As `reselect` does.
        """
        if kernels_take(q):
            from harness.engine.kernels import active_set

            relevance = ranks.mean(active_set.rate(q, self.units, self.unit_lift))
            return active_set.reselect(relevance, self.lift, self.state, self.before, gamma)
        return self.reselect(self._wanted(ranks.mean(unit_attention(q, self.units, self.unit_lift))), gamma)

    def _wanted(self, relevance: Tensor) -> Tensor:
        """The best blocks by the relevance of units: as many as a request has slots, ascending, then `NONE`."""
        scores = relevance.view(*self.lift.shape, -1).amax(-1) + self.lift
        best = scores.topk(self.active.shape[1]).indices
        return best.masked_fill(self.active == NONE, NONE).sort().values

    def reselect(self, wanted: Tensor, gamma: float) -> Tensor:
        """Blocks that are wanted take the slots of others, if too few of them are active.

        Args:
            wanted: [requests, slots] ascending, as many as the request has slots, `NONE` behind them; its last block is
                among them.
            gamma: as in `rechoose`.

        Returns:
            The block that comes into each slot, [requests, slots] int64; -1 where none does.
        """
        self.before.copy_(self.state)
        active = self.active
        same = wanted.unsqueeze(-1) == active.unsqueeze(-2)
        fresh, leaving = ~same.any(-1), ~same.any(-2)
        slots = (active != NONE).sum(-1, keepdim=True)
        # Nobody has no slots, of which no share is below any other.
        swap = (slots - fresh.sum(-1, keepdim=True)) / slots < gamma
        # The n-th fresh block goes where the n-th leaving one was; there are as many of the one as of the other.
        arrivals = torch.zeros_like(wanted).scatter_add_(-1, _rank(fresh), wanted * fresh)
        source = torch.where(leaving & swap, arrivals.gather(-1, _rank(leaving)), -1)
        active.copy_(torch.where(source < 0, active, source))
        self.state[:, -2:-1] += (source >= 0).sum(-1, keepdim=True)
        self.state[:, -1:] += swap
        return source

    def take_back(self) -> Tensor:
        """Undoes the last choice, unless its step ran for good; returns what that does, as `reselect`."""
        now = self.active.clone()
        self.state.copy_(self.before)
        return torch.where(now == self.active, -1, self.active)


def _overwrite(memory: Tensor, content: Tensor, beyond: float) -> None:
    """Puts `content` at the beginning and fills what lies beyond it."""
    memory[: len(content)] = content
    memory[len(content) :] = beyond


def _rank(mask: Tensor) -> Tensor:
    """How many are true before each one that is: [..., n] bool -> [..., n] int64."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
