"""LazyLLM's Aux Cache: hidden states of tokens that were dropped at one pruning point."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.engine.step import Rows


def true_at(mask: Tensor, count: int) -> Tensor:
    """Indices, ascending, of the `count` places where `mask`, [n] bool, is true; asks the device nothing."""
    return mask.nonzero_static(size=count).squeeze(1)


class AuxCache:
    """Rows on hold before one layer."""

    def __init__(self) -> None:
        self._rows: Rows | None = None

    def put(self, rows: Rows) -> None:
        """Adds rows; none of their tokens may be here already."""
        if len(rows):
            self._rows = rows if self._rows is None else self._rows.merged(rows)

    def take(self, selected: Tensor) -> Rows | None:
        """Removes and returns the rows here whose tokens are selected; None if there are none.

        Args:
            selected: [tokens] bool, by original position.
        """
        if self._rows is None:
            return None
        rows, wanted = self._rows, selected[self._rows.positions]
        count = int(wanted.sum())  # the one place where decode waits for the device
        if not count:
            return None
        self._rows = rows.select(true_at(~wanted, len(rows) - count))
        return rows.select(true_at(wanted, count))

    @property
    def rows(self) -> Rows | None:
        """The rows on hold, by ascending position; None if there are none."""
        return self._rows

    @property
    def positions(self) -> Tensor:
        """Original positions of the tokens on hold, ascending."""
        return torch.empty(0, dtype=torch.int64) if self._rows is None else self._rows.positions

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states."""
        return 0 if self._rows is None else self._rows.hidden.nbytes
