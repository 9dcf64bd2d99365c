"""One decode step's attention and page choice, token by token, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(q: Tensor, keys: Tensor, values: Tensor, seen: list[list[int]]) -> Tensor:
    """Head h attends to the tokens `seen[h]`: [heads, d], [n, kv_heads, d] twice -> [1, heads * d] float64."""
    group, out = q.shape[0] // keys.shape[1], []
    for head, tokens in enumerate(seen):
        k, v = keys[tokens, head // group].double(), values[tokens, head // group].double()
        weights = (k @ q[head].double() / q.shape[1] ** 0.5).softmax(0)
        out.append(weights @ v)
    return torch.cat(out).unsqueeze(0)


def tokens_in(pages: list[int], size: int, count: int) -> list[int]:
    """Tokens of those pages of a cache of `count` tokens."""
    return [token for page in pages for token in range(page * size, min(page * size + size, count))]


def bounds(keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Channel-wise least and greatest key of each page: [n, kv_heads, d] -> [pages, kv_heads, d] twice."""
    pages = [keys[start : start + size] for start in range(0, len(keys), size)]
    return torch.stack([page.min(0).values for page in pages]), torch.stack([page.max(0).values for page in pages])


def scores(q: Tensor, keys: Tensor, size: int, per: str) -> Tensor:
    """Quest's bound for every page but the last, which is infinite: [lists, pages] float64."""
    low, high = (bound.double() for bound in bounds(keys, size))
    group = q.shape[0] // keys.shape[1]
    rows = []
    for head, query in enumerate(q.double()):
        m, high_m = low[:, head // group], high[:, head // group]
        rows.append(torch.maximum(query * m, query * high_m).sum(1))
    table = torch.stack(rows)
    if per == "kv_head":
        table = table.view(-1, group, table.shape[1]).max(1).values
    table[:, -1] = torch.inf
    return table


def best(row: list[float], count: int) -> list[int]:
    """Indices of the greatest, of equal ones the first, ascending."""
    return sorted(sorted(range(len(row)), key=lambda index: (-row[index], index))[:count])
