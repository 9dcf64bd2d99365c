"""Quest's page choice against loops over pages; interpreted where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import decode
from tests.reference.interpreter import DEVICE, kernels

PageSelect = kernels("page_select").PageSelect

SHAPES = [
    # kv_heads, group, d, page, length
    (1, 1, 16, 16, 0),
    (2, 4, 64, 16, 15),
    (2, 4, 16, 16, 16),
    (8, 4, 128, 16, 65),
    (2, 3, 32, 5, 63),
    (1, 8, 64, 16, 1100),
    (2, 16, 16, 7, 500),
]


def addresses(low: Tensor, high: Tensor) -> Tensor:
    """Of the second of two layers."""
    return torch.tensor([[0, 0], [low.data_ptr(), high.data_ptr()]], device=DEVICE)


class Layer:
    """The keys of a layer, the last of them new, and bounds that know all but that one."""

    def __init__(
        self,
        kv_heads: int,
        group: int,
        d: int,
        page: int,
        length: int,
        dtype: torch.dtype = torch.float32,
        spare: int = 3,
    ) -> None:
        torch.manual_seed(length)
        self.q = torch.randn(kv_heads * group, 2 * d).to(DEVICE, dtype)[:, :d]
        self.keys = torch.randn(length + 1, kv_heads, d).to(DEVICE, dtype)
        self.k = torch.stack([self.keys[-1], self.keys[-1]], 1)[:, 0]
        self.page, self.length, self.room = page, length, length // page + 1 + spare
        self.low, self.high = torch.full((2, self.room, kv_heads, d), torch.nan, device=DEVICE, dtype=dtype)
        if length:
            low, high = decode.bounds(self.keys[:-1], page)
            self.low[: len(low)], self.high[: len(high)] = low, high
        self.table = torch.tensor([[0, 0, 10**6], [0, 0, length]], device=DEVICE)
        self.bounds = addresses(self.low, self.high)

    def select(self, per: str = "kv_head") -> Any:
        heads, d = self.q.shape
        select = PageSelect(heads, self.keys.shape[1], d, self.room, self.page, per, DEVICE, block=16)
        select._scores.fill_(torch.nan)
        return select

    def check_bounds(self) -> None:
        low, high = decode.bounds(self.keys, self.page)
        assert torch.equal(self.low[: len(low)], low) and torch.equal(self.high[: len(high)], high)
        assert self.low[len(low) :].isnan().all() and self.high[len(high) :].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_scores_and_bounds(shape: tuple[int, int, int, int, int], per: str) -> None:
    layer = Layer(*shape)
    scores = layer.select(per).page_scores(layer.q[None], layer.k[None], layer.bounds, layer.table, 1)[0]
    expected = decode.scores(layer.q.cpu(), layer.keys.cpu(), layer.page, per)
    pages = expected.shape[1]
    assert scores.shape == (expected.shape[0], layer.room) and scores.dtype == torch.float32
    torch.testing.assert_close(scores[:, :pages].cpu().double(), expected, atol=1e-4, rtol=1e-5)
    assert (scores[:, pages:] == -torch.inf).all()
    layer.check_bounds()


def test_half_precision_scores_are_those_of_its_values() -> None:
    layer = Layer(2, 4, 64, 16, 200, dtype=torch.float16)
    scores = layer.select().page_scores(layer.q[None], layer.k[None], layer.bounds, layer.table, 1)[0]
    expected = decode.scores(layer.q.cpu(), layer.keys.cpu(), 16, "kv_head")
    torch.testing.assert_close(scores[:, : expected.shape[1]].cpu().double(), expected, atol=1e-4, rtol=1e-5)
    layer.check_bounds()


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
@pytest.mark.parametrize("length", [0, 31, 160, 333])
def test_room_for_a_longer_cache_changes_no_choice(length: int, per: str) -> None:
    pages, chosen = length // 16 + 1, []
    for spare in (0, 3 * pages):
        layer = Layer(2, 4, 16, 16, length, spare=spare)
        select = layer.select(per)
        scores = select.page_scores(layer.q[None], layer.k[None], layer.bounds, layer.table, 1)[0]
        chosen.append([select.best_pages(scores, count).tolist() for count in {1, (pages + 1) // 2, pages}])
    assert chosen[0] == chosen[1]
    # More than there are: every one, and some that hold nothing.
    more = select.best_pages(scores, pages + 2)
    assert (more[:, :pages].cpu() == torch.arange(pages)).all() and (more[:, pages:] >= pages).all()


def rows(kind: str, pages: int) -> Tensor:
    torch.manual_seed(pages)
    if kind == "ties":
        return torch.randint(-2, 3, (3, pages)).float()
    if kind == "equal":
        return torch.full((2, pages), -1.5)
    if kind == "tiny":
        return torch.randn(2, pages) * 1e-42
    if kind == "zeros":
        return torch.where(torch.rand(2, pages) < 0.5, 0.0, -0.0)
    if kind == "infinite":
        return torch.tensor([-torch.inf, torch.inf, 1.0, 2.0])[torch.randint(4, (2, pages))]
    if kind == "close":
        return torch.nextafter(torch.full((2, pages), 20.0), torch.randn(2, pages) * 100)
    return torch.randn(2, pages) * 5 + 3


@pytest.mark.parametrize("kind", ["ties", "equal", "tiny", "zeros", "infinite", "close", "plain"])
@pytest.mark.parametrize("pages", [1, 33, 2100])
def test_best_pages(kind: str, pages: int) -> None:
    scores = rows(kind, pages)
    select = PageSelect(3, 3, 16, pages, 16, "kv_head", DEVICE)
    for count in sorted({1, pages // 16 + 1, pages}):
        select._pages.fill_(-1)
        chosen = select.best_pages(scores.to(DEVICE), count)
        assert chosen.shape == (len(scores), count) and chosen.dtype == torch.int32
        assert chosen.tolist() == [decode.best(row, count) for row in scores.tolist()]


def test_best_pages_are_a_topk() -> None:
    scores = torch.randn(8, 2048)
    chosen = PageSelect(8, 8, 16, 2048, 16, "kv_head", DEVICE).best_pages(scores.to(DEVICE), 128)
    assert torch.equal(chosen.cpu().long(), scores.topk(128).indices.sort().values)


def test_a_decode_that_grows_page_by_page() -> None:
    room, page, per = 3, 3, "query_head"
    select = PageSelect(4, 2, 16, room, page, per, DEVICE, block=16)
    low, high = torch.full((2, room, 2, 16), torch.nan, device=DEVICE)
    q, keys = torch.randn(4, 16).to(DEVICE), torch.randn(room * page, 2, 16).to(DEVICE)
    table = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    for length in range(room * page):
        table[1, 2] = length
        scores = select.page_scores(q[None], keys[length][None], addresses(low, high), table, 1)[0]
        expected = decode.scores(q.cpu(), keys[: length + 1].cpu(), page, per)
        torch.testing.assert_close(scores[:, : expected.shape[1]].cpu().double(), expected, atol=1e-4, rtol=1e-5)
        chosen = select.best_pages(scores, 2)
        if expected.shape[1] >= 2:
            assert chosen.tolist() == [decode.best(row, 2) for row in expected.tolist()]


@pytest.mark.parametrize(
    "heads, kv_heads, d, room", [(3, 2, 16, 4), (34, 2, 16, 4), (4, 2, 48, 4), (4, 2, 16, 0), (4, 2, 16, 10**5)]
)
def test_shapes_it_cannot_do(heads: int, kv_heads: int, d: int, room: int) -> None:
    with pytest.raises(ValueError):
        PageSelect(heads, kv_heads, d, room, 16, "kv_head", DEVICE)
