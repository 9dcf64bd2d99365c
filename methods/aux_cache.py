"""LazyLLM's Aux Cache: hidden states of tokens that were dropped at one pruning point."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.rows import Rows


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
        wanted = selected[self._rows.positions]
        index = wanted.nonzero().squeeze(1)
        if not len(index):
            return None
        taken = self._rows.select(index)
        self._rows = self._rows.select((~wanted).nonzero().squeeze(1))
        return taken

    @property
    def positions(self) -> Tensor:
        """Original positions of the tokens on hold, ascending."""
        return torch.empty(0, dtype=torch.int64) if self._rows is None else self._rows.positions

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states."""
        return 0 if self._rows is None else self._rows.hidden.nbytes
