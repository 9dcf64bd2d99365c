"""Exact causal attention over a choice of keys: what sparse prefills share, whoever chooses.

A choice is made for each query head and each block of rows: blocks of keys, and single keys beside them. Work and
memory grow with what is chosen, and no mask of all pairs is ever built.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.engine import block_pages
from harness.engine.attention import Attention


@dataclass(frozen=True)
class Choice:
    """Which keys the rows may attend to; those behind a row never count.

    Attributes:
        rows: rows a block: 64 or 128.
        width: keys a block, a multiple of 64.
        blocks: [heads, row_blocks, most] int32, the first key of each chosen block, ascending, `width` apart at least.
        counts: [heads, row_blocks] int32, how many of those there are; each row has to see one.
        singles, single_counts: likewise single keys, none of them in a chosen block; None where there are none.
        own_last: blocks lie on a grid of `rows`, and the last of each list is that of the rows themselves.
    """

    rows: int
    width: int
    blocks: Tensor
    counts: Tensor
    singles: Tensor | None = None
    single_counts: Tensor | None = None
    own_last: bool = False

    @classmethod
    def on_grid(cls, chosen: Tensor, size: int) -> Choice:
        """From a map of square blocks, [heads, blocks, blocks] bool.

        Rows always have their own block, and those ahead of them do not count.
        """
        chosen = chosen.tril()
        chosen.diagonal(dim1=1, dim2=2).fill_(True)
        index = torch.arange(chosen.shape[2], dtype=torch.int32, device=chosen.device) * size
        return cls(size, size, *listed(index.expand(chosen.shape), chosen), own_last=True)

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Attends.

        Args:
            attention: the engine's, for what it serves.
            q: [n, heads, d]. k, v: [n, kv_heads, d].

        Returns:
            [n, heads * d], and the pairs of query and key that each block of rows has, [heads, row_blocks] int32.
        """
        if not q.is_cuda:
            return self._attend_plainly(q, k, v)
        if self.own_last and block_pages.serves(attention, q, self.rows, self.width):
            return block_pages.attend(attention, q, k, v, self.blocks, self.counts), self._pairs(len(q))
        from harness.engine.kernels.block_sparse import block_sparse_attention

        lists = (self.blocks, self.counts, self.width, self.rows, self.singles, self.single_counts)
        return block_sparse_attention(q, k, v, *lists)

    def _pairs(self, n: int) -> Tensor:
        """Where `own_last`: other blocks are seen whole, the own one up to each row."""
        rows = torch.full(self.counts.shape[1:], self.rows, dtype=torch.int32, device=self.counts.device)
        rows[-1] = n - (len(rows) - 1) * self.rows
        return (self.counts - 1) * self.width * rows + rows * (rows + 1) // 2

    def _attend_plainly(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """One block of rows after the other, all heads at once."""
        outs, pairs = [], torch.empty_like(self.counts, memory_format=torch.contiguous_format)
        kv_head = torch.arange(q.shape[1]).unsqueeze(1) // (q.shape[1] // k.shape[1])
        for block, rows in enumerate(torch.split(q, self.rows)):
            tokens = self._tokens(block)
            row = torch.arange(block * self.rows, block * self.rows + len(rows))
            seen = tokens.unsqueeze(1) <= row.unsqueeze(1)
            pairs[:, block] = seen.sum((1, 2))
            at = tokens.clamp(max=len(k) - 1), kv_head
            logits = rows.transpose(0, 1) @ k[at].transpose(1, 2) * q.shape[2] ** -0.5
            weights = logits.float().masked_fill_(~seen, -torch.inf).softmax(-1).to(v.dtype)
            outs.append((weights @ v[at]).transpose(0, 1).flatten(1))
        return torch.cat(outs), pairs

    def _tokens(self, block: int) -> Tensor:
        """Keys of a block of rows, [heads, most] int64; beyond every row where a head has fewer."""
        starts = _counted(self.blocks[:, block], self.counts[:, block])
        tokens = (starts.unsqueeze(2) + torch.arange(self.width)).flatten(1)
        if self.singles is None or self.single_counts is None:
            return tokens
        return torch.cat((tokens, _counted(self.singles[:, block], self.single_counts[:, block])), 1)


_NOWHERE = 1 << 40
"""A place behind every row."""


def _counted(values: Tensor, counts: Tensor) -> Tensor:
    """The values that count, [heads, most] int64, `_NOWHERE` in place of others."""
    values = values[:, : int(counts.max())].long()
    return values.masked_fill(torch.arange(values.shape[1]) >= counts.unsqueeze(1), _NOWHERE)


def listed(values: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen ones of each row, moved to its front, and how many those are; without waiting for the device.

    Args:
        values: [..., m] int32. chosen: [..., m] bool.

    Returns:
        [..., m] int32, whatever behind those that count, and [...] int32.
    """
    place = chosen.cumsum(-1, dtype=torch.int32)
    counts = place[..., -1].contiguous()
    into = torch.where(chosen, place - 1, values.shape[-1]).long()
    out = values.new_zeros((*values.shape[:-1], values.shape[-1] + 1)).scatter_(-1, into, values)
    return out[..., :-1], counts
