"""Attention of blocks of rows to blocks of keys, by a kernel that reads keys in pages.

Each head's block of rows is a text of its own, whose pages are the blocks that it has chosen, its own last: so it is
causal. Pages are views: one begins at every head of every token, each a head's channels further on in memory, and no
key is moved. Rows are: a text's have to lie beside each other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from harness.engine.attention import Attention

SIZE = 128
"""Keys a page and rows a text: FlashAttention 3's tile."""
_FEWEST = 16384
"""Rows; of fewer, the kernel for blocks is faster (measured: docs/performance-methods.md)."""


def serves(attention: Attention, q: Tensor, rows: int, width: int) -> bool:
    """Whether the kernel reads such pages, and soon enough: a text costs it more than a program of our own."""
    return attention.takes_pages and rows == width == SIZE == q.shape[2] and len(q) >= _FEWEST


def attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, counts: Tensor) -> Tensor:
    """Row i attends to those keys j <= i that its block of rows has listed.

    Args:
        attention: whose `paged` is called.
        q: [n, heads, d]. k, v: [n, kv_heads, d].
        blocks: [heads, ceil(n / SIZE), most] int32, the first key of each block, multiples of `SIZE`, its own the last.
        counts: [heads, ceil(n / SIZE)] int32, how many blocks count.

    Returns:
        [n, heads * d].
    """
    n, heads, dim = q.shape
    texts = q.new_empty((heads, blocks.shape[1] * SIZE, dim))
    texts[:, :n] = q.transpose(0, 1)
    k, v = (_whole_pages(x) for x in (k, v))
    kv_head = torch.arange(heads, dtype=torch.int32, device=q.device) // (heads // k.shape[1])
    pages = blocks * k.shape[1] + kv_head.view(-1, 1, 1)
    parts = texts.view(-1, SIZE, 1, dim), _pages(k), _pages(v), pages.flatten(0, 1), counts.flatten()
    out = attention.paged(*parts)
    return out.view(heads, -1, dim)[:, :n].transpose(0, 1).reshape(n, heads * dim)


def _whole_pages(x: Tensor) -> Tensor:
    """Contiguous, with zeros behind the last token where a page ends behind it."""
    return pad(x, (0, 0, 0, 0, 0, -len(x) % SIZE)).contiguous()


def _pages(x: Tensor) -> Tensor:
    """[n, kv_heads, d] -> [starts, SIZE, 1, d], one page from each head of each token; a view."""
    n, kv_heads, dim = x.shape
    return x.as_strided(((n - SIZE + 1) * kv_heads, SIZE, 1, dim), (dim, kv_heads * dim, dim, 1))
