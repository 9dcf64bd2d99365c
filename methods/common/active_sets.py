"""The active sets of one layer for several requests, each at a seat: one choice for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.common.active_blocks import ActiveBlocks
from methods.common.active_state import NONE, ActiveState


class ActiveSets:
    """What `ActiveBlocks` are to a step, of more than one request.

    Attributes:
        block: tokens a block.
        state: what is chosen with, a row a seat.
        addresses: where the keys and the values of each wait, [seats, 2], see `HostStore`.
    """

    def __init__(self, like: ActiveBlocks, seats: int) -> None:
        """
        Args:
            like: of a request that needs as much room as any.
            seats: requests at once.
        """
        self.block, self._ranks = like.block, like.ranks
        self.state = ActiveState(*(own.new_zeros((seats, *own.shape[1:])) for own in like.state))
        self.addresses = like.addresses.new_zeros((seats, 2))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All that is known of requests, [seats, ...] each; moves along with them."""
        return *self.state, self.addresses

    def hold(self, other: ActiveBlocks) -> bool:
        """Whether there is room for a request, whose blocks are as long, and its units."""
        ours, theirs = self.state.sizes, other.state.sizes
        alike = self.block == other.block and ours[0] * theirs[1] == ours[1] * theirs[0]
        return alike and all(room >= needed for room, needed in zip(ours, theirs, strict=True))

    def take(self, seat: int, other: ActiveBlocks | None) -> None:
        """A request sits down; None for nobody, for whom nothing is ever chosen."""
        *lifts, units, state, before = (part[seat] for part in self.state)
        for lift in lifts:
            lift.fill_(-torch.inf)
        units.zero_()
        for slots in (state, before):
            slots.fill_(NONE)
            slots[-2:] = 0
        if other is not None:
            *known, theirs_state, theirs_before = (part[0] for part in other.state)
            for ours, theirs in zip((*lifts, units), known, strict=True):
                ours[: len(theirs)] = theirs
            for ours, theirs in ((state, theirs_state), (before, theirs_before)):
                ours[: len(theirs) - 2], ours[-2:] = theirs[:-2], theirs[-2:]
            self.addresses[seat] = other.addresses

    def tell(self, seat: int, other: ActiveBlocks) -> None:
        """Lets a request's own object know what has become of it."""
        for ours, (theirs,) in zip(self.state[3:], other.state[3:], strict=True):
            theirs[:-2], theirs[-2:] = ours[seat, : len(theirs) - 2], ours[seat, -2:]

    def rechoose(self, q: Tensor, gamma: float) -> Tensor:
        """As `ActiveState.rechoose`, of the requests on the first seats, which have these queries."""
        return self.state.first(len(q)).rechoose(q, gamma, self._ranks)
