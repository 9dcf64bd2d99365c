"""Pages of consecutive tokens: bounds on their keys, and attention to a few of them (Quest, arXiv 2406.10774)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class PageBounds:
    """Channel-wise minimum and maximum of the keys of each page of one layer.

    Attributes:
        low, high: the bounds, [room, kv_heads, head_dim]; empty before the first keys, afterwards at the same
            addresses, so that kernels may write to them. What stands behind the layer's keys is noise.
    """

    def __init__(self, size: int, room: int) -> None:
        """
        Args:
            size: tokens a page.
            room: pages to have memory for; the layer may hold fewer.
        """
        self._size, self._room, self._seen = size, room, 0
        self.low = self.high = torch.empty(0)

    def update(self, keys: Tensor) -> None:
        """Takes in the tokens that came since the last call.

        Args:
            keys: all keys of the layer, [n, kv_heads, d]; those seen before have not changed.
        """
        if not self.low.numel():
            self.low = keys.new_empty((self._room, *keys.shape[1:]))
            self.high = torch.empty_like(self.low)
        first, whole = self._seen // self._size, len(keys) // self._size
        if whole > first:
            pages = keys[first * self._size : whole * self._size].view(-1, self._size, *keys.shape[1:])
            self.low[first:whole], self.high[first:whole] = pages.amin(1), pages.amax(1)
        if len(keys) % self._size:
            rest = keys[whole * self._size :]
            self.low[whole], self.high[whole] = rest.amin(0), rest.amax(0)
        self._seen = len(keys)

    def scores(self, groups: Tensor) -> Tensor:
        """Upper bound on q . k for every page: queries [kv_heads, group, d] -> [kv_heads, group, pages].

        max(q m, q M) is q M where q is positive and q m where it is negative, hence two matrix products.
        """
        low, high = (bound[: self._pages(self._seen)].permute(1, 2, 0) for bound in (self.low, self.high))
        return groups.clamp(min=0) @ high + groups.clamp(max=0) @ low

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the bounds."""
        return self.low.nbytes + self.high.nbytes

    def read_bytes(self, tokens: int) -> int:
        """Bytes of the bounds that a score reads while the layer holds `tokens`."""
        return 2 * self.low[: self._pages(tokens)].nbytes

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._size)


def best_pages(scores: Tensor, count: int) -> Tensor:
    """The last page and the best others: [kv_heads, choosers, pages] -> [kv_heads, choosers, count] ascending."""
    scores = scores.clone()
    scores[..., -1] = torch.inf
    return scores.topk(count).indices.sort().values


def attend_pages(groups: Tensor, keys: Tensor, values: Tensor, pages: Tensor, size: int) -> Tensor:
    """Exact attention of one token over chosen pages, reading nothing else.

    Args:
        groups: queries, [kv_heads, group, d].
        keys, values: [n, kv_heads, d], on the host perhaps.
        pages: [kv_heads, choosers, m], choosers being 1 (the group shares its pages) or group.
        size: tokens a page.

    Returns:
        [1, heads * d].
    """
    kv_heads, group, d = groups.shape
    choosers = pages.shape[1]
    tokens = (pages.unsqueeze(-1) * size + torch.arange(size, device=pages.device)).flatten(2)
    beyond = (tokens >= keys.shape[0]).unsqueeze(2)
    read_keys, read_values = (_gather(store, tokens.clamp(max=keys.shape[0] - 1)) for store in (keys, values))
    queries = groups.reshape(kv_heads, choosers, group // choosers, d)
    logits = (queries @ read_keys.transpose(-1, -2)).float() / math.sqrt(d)
    weights = logits.masked_fill(beyond, -torch.inf).softmax(-1).to(values.dtype)
    return (weights @ read_values).reshape(1, -1)


def _gather(store: Tensor, tokens: Tensor) -> Tensor:
    """Rows of each KV head, gathered where they lie and brought to where the numbers of the tokens are.

    Args:
        store: [n, kv_heads, d].
        tokens: [kv_heads, choosers, m].

    Returns:
        [kv_heads, choosers, m, d].
    """
    head = torch.arange(store.shape[1], device=store.device).view(-1, 1, 1)
    return store[tokens.to(store.device), head].to(tokens.device)
