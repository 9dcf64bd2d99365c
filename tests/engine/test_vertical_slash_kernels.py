"""MInference's lists by kernels (interpreted where there is no GPU) against the plain ones, which twins judge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from methods.common import vertical_slash as plain
from tests.reference.interpreter import DEVICE, kernels

vertical_slash = kernels("vertical_slash")

WIDTH = plain.ROWS


@pytest.fixture(autouse=True)
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vertical_slash, "_LANES", 8)
    monkeypatch.setattr(vertical_slash, "_TILE", 32)


def lines(n: int, share: float, heads: int = 2) -> tuple[Tensor, Tensor]:
    """Columns, fewer in every other head, and for each offset the nearer one; offset 0 is chosen."""
    generator = torch.Generator().manual_seed(n)
    offsets = torch.rand(heads, n, generator=generator) < share
    offsets[:, 0] = True
    places = torch.arange(n, dtype=torch.int32)
    nearer = pad(torch.where(offsets, places, -1).cummax(1).values, (1, 0), value=-1)
    columns = torch.rand(heads, n, generator=generator).argsort(1)[:, : max(1, n // 3)].int()
    columns[1::2, 1::2] = n
    return columns.sort(1).values, nearer


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Lists as far as they count."""
    (values, counts), (others, other_counts) = (tuple(x.cpu() for x in pair) for pair in (found, expected))
    places = (head_row for head_row in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist())
    return torch.equal(counts, other_counts) and all(
        torch.equal(values[head, row, : counts[head, row]], others[head, row, : counts[head, row]])
        for head, row in places
    )


@pytest.mark.parametrize("n", [1, 64, 65, 700])
@pytest.mark.parametrize("share", [0.0, 0.004, 0.05, 1.0])
def test_blocks_and_columns(n: int, share: float) -> None:
    columns, nearer = lines(n, share)
    row_blocks = -(-n // WIDTH)
    blocks = plain._diagonal_blocks(nearer, row_blocks)
    offsets = int((nearer[:, 1:] == torch.arange(n)).sum(1).max())
    most = min(row_blocks + 1, offsets)
    assert blocks[1].max() <= most
    found = vertical_slash.diagonal_blocks(nearer.to(DEVICE), row_blocks, WIDTH, most)
    assert same(found, blocks)
    free = vertical_slash.free_columns(columns.to(DEVICE), *found, WIDTH)
    assert same(free, plain._free_columns(columns, *blocks))
