"""The active sets of one layer for several requests, each at a seat: one choice for all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from methods.common.active_blocks import NONE, ActiveBlocks, swapped


class ActiveSets:
    """What `ActiveBlocks` are to a step, with one axis more; what a request has lies with its own.

    Attributes:
        block: tokens a block.
        parts: as `ActiveBlocks.parts`, [seats, ...] each.
    """

    def __init__(self, like: ActiveBlocks, seats: int) -> None:
        """
        Args:
            like: of a request that needs as much room as any.
            seats: requests at once.
        """
        self.block, self._ranks = like.block, like.ranks
        self.parts = [own.new_zeros((seats, *own.shape)) for own in like.parts]
        self._lift, self._unit_lift, self.units, self._state, self._before, self.addresses = self.parts

    def hold(self, other: ActiveBlocks) -> bool:
        """Whether there is room for a request, whose blocks are as long, and its units."""
        ours, theirs = ([x.shape[-1] for x in (parts[0], parts[1], parts[3])] for parts in (self.parts, other.parts))
        alike = self.block == other.block and ours[0] * theirs[1] == ours[1] * theirs[0]
        return alike and all(room >= needed for room, needed in zip(ours, theirs, strict=True))

    def take(self, seat: int, other: ActiveBlocks | None) -> None:
        """A request sits down; None for nobody, for whom nothing is ever chosen."""
        lift, unit_lift, units, state, before, addresses = (x[seat] for x in self.parts)
        for lifted in (lift, unit_lift):
            lifted.fill_(-torch.inf)
        units.zero_()
        for slots in (state, before):
            slots.fill_(NONE)
            slots[-2:] = 0
        if other is not None:
            *known, theirs_state, theirs_before, waits = other.parts
            for ours, theirs in zip((lift, unit_lift, units, addresses), (*known, waits), strict=True):
                ours[: len(theirs)] = theirs
            for ours, theirs in ((state, theirs_state), (before, theirs_before)):
                ours[: len(theirs) - 2], ours[-2:] = theirs[:-2], theirs[-2:]

    def tell(self, seat: int, other: ActiveBlocks) -> None:
        """Lets a request's own object know what has become of it."""
        for ours, theirs in zip(self.parts[3:5], other.parts[3:5], strict=True):
            theirs[:-2], theirs[-2:] = ours[seat, : len(theirs) - 2], ours[seat, -2:]

    def reselect(self, q: Tensor, gamma: float) -> Tensor:
        """Decides what each request's next steps attend to, as `ActiveBlocks.wanted` and `reselect` do for one.

        Args:
            q: the queries of a step, [requests, heads, head_dim], of those on the first seats.
            gamma: as in `ActiveBlocks.reselect`.

        Returns:
            [requests, slots] int64, the block that comes into each slot; -1 where none does.
        """
        lift, unit_lift, units, state, before, _ = (x[: len(q)] for x in self.parts)
        groups = q.view(len(q), units.shape[2], -1, q.shape[2])
        logits = (groups @ units.permute(0, 2, 3, 1)).float() * (1.0 / math.sqrt(q.shape[2]))
        relevance = self._ranks.mean((logits + unit_lift.view(len(q), 1, 1, -1)).softmax(-1).mean((1, 2)))
        scores = relevance.view(*lift.shape, -1).amax(-1) + lift
        active = state[:, :-2]
        best = scores.topk(active.shape[1]).indices
        before.copy_(state)
        return swapped(state, best.masked_fill(active == NONE, NONE).sort().values, gamma)
