"""Bounds on the keys of consecutive tokens, page by page (Quest, arXiv 2406.10774, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor


class PageBounds:
    """Channel-wise minimum and maximum of the keys of each page of one layer.

    Attributes:
        count: pages there are, the last possibly partial.
    """

    def __init__(self, size: int, tokens: int) -> None:
        """
        Args:
            size: tokens a page.
            tokens: most tokens the layer will hold.
        """
        self._size, self._room = size, -(-tokens // size)
        self.count = 0
        self._seen = 0
        self._low = self._high = torch.empty(0)

    def update(self, keys: Tensor) -> None:
        """Takes in the tokens that came since the last call.

        Args:
            keys: all keys of the layer, [n, kv_heads, d]; those seen before have not changed.
        """
        if self.count == 0:
            self._low = keys.new_empty((self._room, *keys.shape[1:]))
            self._high = torch.empty_like(self._low)
        first, whole = self._seen // self._size, len(keys) // self._size
        if whole > first:
            pages = keys[first * self._size : whole * self._size].view(-1, self._size, *keys.shape[1:])
            self._low[first:whole], self._high[first:whole] = pages.amin(1), pages.amax(1)
        if len(keys) % self._size:
            rest = keys[whole * self._size :]
            self._low[whole], self._high[whole] = rest.amin(0), rest.amax(0)
        self._seen, self.count = len(keys), -(-len(keys) // self._size)

    def scores(self, groups: Tensor) -> Tensor:
        """Upper bound on q . k for every page: queries [kv_heads, group, d] -> [kv_heads, group, count].

        max(q m, q M) is q M where q is positive and q m where it is negative, hence two matrix products.
        """
        low, high = (bound[: self.count].permute(1, 2, 0) for bound in (self._low, self._high))
        return groups.clamp(min=0) @ high + groups.clamp(max=0) @ low

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the bounds."""
        return self._low.nbytes + self._high.nbytes

    @property
    def used_nbytes(self) -> int:
        """Bytes of the bounds that a score reads."""
        return self._low[: self.count].nbytes + self._high[: self.count].nbytes
