"""What methods that keep few keys and values ask of a prompt, against the formula; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.reference import decode
from tests.reference.interpreter import DEVICE, kernels

best_tokens = kernels("token_select").best_tokens


def scores(kind: str, tokens: int) -> Tensor:
    torch.manual_seed(tokens)
    if kind == "ties":
        return torch.randint(-2, 3, (3, tokens)).float()
    if kind == "small":
        return torch.rand(2, tokens) * 1e-5
    if kind == "zeros":
        return torch.where(torch.rand(2, tokens) < 0.5, 0.0, -0.0)
    if kind == "infinite":
        return torch.tensor([-torch.inf, torch.inf, 1.0, 2.0])[torch.randint(4, (2, tokens))]
    if kind == "close":
        return torch.nextafter(torch.full((2, tokens), 20.0), torch.randn(2, tokens) * 100)
    return torch.randn(2, tokens) * 5 + 3


@pytest.mark.parametrize("kind", ["ties", "small", "zeros", "infinite", "close", "plain"])
@pytest.mark.parametrize("tokens", [1, 33, 700])
def test_best_tokens(kind: str, tokens: int) -> None:
    rows = scores(kind, tokens)
    for count in sorted({1, tokens // 16 + 1, tokens}):
        counts = torch.full((len(rows),), count, device=DEVICE)
        chosen = best_tokens(rows.to(DEVICE), counts, count, block=256)
        assert chosen.dtype == torch.int64 and chosen.tolist() == [decode.best(row, count) for row in rows.tolist()]


def test_best_tokens_of_lists_that_keep_different_numbers() -> None:
    rows, counts = torch.randint(9, (4, 50)).float(), [0, 7, 50, 31]
    chosen = best_tokens(rows.to(DEVICE), torch.tensor(counts, device=DEVICE), 50, block=32).tolist()
    for row, count, own in zip(rows.tolist(), counts, chosen, strict=True):
        assert own[:count] == (decode.best(row, count) if count else [])
