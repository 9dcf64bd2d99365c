"""What SlimInfer's pruning points ask of the device, against plain formulas; interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from harness.engine.cache import LayerCache
from harness.engine.step import Rows
from methods.common import active_state as active_module
from methods.common.active_blocks import ActiveBlocks
from methods.common.active_sets import ActiveSets
from methods.common.blocks import block_maxima, block_rows, unit_attention, unit_sums
from methods.common.scores import last_attention
from tests.reference import decode
from tests.reference.interpreter import DEVICE, kernels

kernels("column_sums")
query_peaks = kernels("query_peaks").query_peaks
best_blocks = kernels("block_select").best_blocks
take_rows = kernels("take_rows").take_rows
active_set = kernels("active_set")


def strided(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random heads that lie apart, as those of a joined projection do."""
    wide = torch.randn((shape[0], shape[1] + 1, shape[2]), generator=torch.Generator().manual_seed(seed))
    return wide.to(DEVICE)[:, :-1]


@pytest.mark.parametrize(
    ("n", "w", "unit", "heads", "kv_heads"), [(70, 5, 8, 4, 2), (64, 40, 5, 3, 1), (33, 1, 1, 4, 4), (9, 9, 48, 2, 1)]
)
def test_attention_from_the_query_that_wants_a_token_most(n: int, w: int, unit: int, heads: int, kv_heads: int) -> None:
    q, k, raters = strided(w, heads, 16), strided(n, kv_heads, 16, seed=1), torch.arange(w, device=DEVICE) % 3 == 0
    paid = last_attention(q, k)
    for counted, rows in ((raters, raters), (None, torch.ones_like(raters))):
        expected = unit_sums(paid[:, rows].amax(1).mean(0), unit) / rows.sum()
        torch.testing.assert_close(query_peaks(q, k, unit, counted), expected, atol=1e-6, rtol=1e-4)


def test_norms_by_many_shares() -> None:
    q, k = strided(20, 2, 16), strided(2300, 1, 16, seed=1)
    expected = last_attention(q, k).amax(1).mean(0) / 20
    torch.testing.assert_close(query_peaks(q, k, 1), expected, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(
    ("blocks", "count", "block", "short", "sink", "tail"),
    [(9, 4, 8, 3, 1, 1), (300, 120, 4, 0, 0, 3), (1, 1, 64, 10, 1, 1), (5, 5, 3, 2, 2, 1)],
)
def test_best_blocks_and_their_rows(blocks: int, count: int, block: int, short: int, sink: int, tail: int) -> None:
    scores = torch.randint(9, (blocks,), generator=torch.Generator().manual_seed(blocks)).float()
    lifted = scores.clone()
    lifted[:sink] = lifted[-tail:] = torch.inf
    rows = blocks * block - short
    chosen, index = best_blocks(scores.to(DEVICE), count, block, rows, sink, tail)
    assert chosen.tolist() == decode.best(lifted.tolist(), count)
    assert torch.equal(index, block_rows(chosen, block, rows))


def test_blocks_are_worth_their_best_units() -> None:
    units = torch.randn(61, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    worth = block_maxima(units, 6)
    found = best_blocks(units, 5, 12, 122, 1, 1, units=6)
    for ours, theirs in zip(found, best_blocks(worth, 5, 12, 122, 1, 1), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("attended", [None, 40])
def test_rows_that_go_on(attended: int | None) -> None:
    wide = torch.randn(12, 30, device=DEVICE)
    more = None if attended is None else torch.randn(12, attended, device=DEVICE)
    rows, index = (
        Rows(wide[:, :24], torch.arange(12, device=DEVICE) * 3, more),
        torch.tensor([0, 9, 3, 9, 4, 9, 11, 9])[::2],
    )
    expected = rows.select(index.to(DEVICE))
    found = take_rows(rows.hidden, rows.positions, rows.attended, index.to(DEVICE))
    pairs = zip(found, (expected.hidden, expected.positions, expected.attended), strict=True)
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None)
        assert ours is None or theirs is None or torch.equal(ours, theirs)


@dataclass(frozen=True)
class Held:
    """Two sets of active blocks that are told alike: the one chooses by plain formulas, the other by kernels."""

    plain: ActiveBlocks
    device: ActiveBlocks
    patch: pytest.MonkeyPatch

    def each(self) -> Iterator[ActiveBlocks]:
        for ours, by_kernels in ((self.plain, False), (self.device, True)):
            self.patch.setattr(active_module, "kernels_take", partial(_answer, by_kernels))
            yield ours


def _answer(answer: bool, _: torch.Tensor) -> bool:
    return answer


def active_blocks(tokens: int, slots: int, kv_heads: int, patch: pytest.MonkeyPatch) -> Held:
    """Of one layer, in blocks of 12 tokens, three units each."""
    keys = torch.randn(tokens, kv_heads, 16, generator=torch.Generator().manual_seed(tokens)).to(DEVICE)
    chosen = torch.tensor([*range(slots - 1), -(-tokens // 12) - 1], device=DEVICE)
    plain, device = (ActiveBlocks(12, 4, "async", ends=(1, 1)) for _ in range(2))
    held = Held(plain, device, patch)
    for each in held.each():
        cache = LayerCache(4)
        cache.append(keys, keys, torch.arange(tokens, device=DEVICE))
        each.copy_out(cache, chosen, block_rows(chosen, 12, tokens))
        each.park()
    return held


@pytest.mark.parametrize(("tokens", "slots", "heads"), [(130, 5, (4, 2)), (800, 40, (3, 1)), (20, 2, (2, 2))])
def test_active_blocks_are_chosen_alike_by_kernels(
    tokens: int, slots: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = active_blocks(tokens, slots, heads[1], monkeypatch)
    assert_alike(held)
    generator = torch.Generator().manual_seed(3)
    for gamma in (1.0, 0.5, 0.9, 0.0, 1.0):
        q = 3 * torch.randn(1, heads[0], 16, generator=generator).to(DEVICE)
        assert torch.equal(*(each.rechoose(q, gamma) for each in held.each()))
        assert_alike(held)
    assert slots == 2 or held.device.swaps > 0
    assert torch.equal(held.plain.take_back(), held.device.take_back())


def assert_alike(held: Held) -> None:
    ours, theirs = held.device.state, held.plain.state
    for name in ("lift", "unit_lift", "state", "before"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    torch.testing.assert_close(ours.units, theirs.units)


@pytest.mark.parametrize("by_kernels", [False, True])
def test_requests_at_seats_choose_as_each_does_alone(by_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    held = [active_blocks(tokens, slots, 2, monkeypatch) for tokens, slots in ((800, 40), (130, 5), (20, 2))]
    alone = [one.device if by_kernels else one.plain for one in held]
    monkeypatch.setattr(active_module, "kernels_take", partial(_answer, by_kernels))
    seats = ActiveSets(alone[0], 5)
    for seat, one in enumerate((*alone, None, None)):
        seats.take(seat, one)
    generator = torch.Generator().manual_seed(3)
    for gamma in (1.0, 0.5, 0.9, 0.0, 1.0):
        q = 3 * torch.randn(5, 4, 16, generator=generator).to(DEVICE)
        # The last seat is not among those that a step of four is for.
        source = seats.rechoose(q[:4], gamma)
        for seat, one in enumerate(alone):
            expected = one.rechoose(q[seat : seat + 1], gamma)
            assert torch.equal(source[seat, : len(expected)], expected) and (source[seat, len(expected) :] == -1).all()
            slots = len(one.active)
            assert torch.equal(seats.state.active[seat, :slots], one.active)
            assert torch.equal(seats.state.state[seat, -2:], one.state.state[0, -2:])
        assert (source[3] == -1).all() and (seats.state.state[3:, -2:] == 0).all()
    assert int(alone[0].swaps) > 0 < int(alone[1].swaps)


def test_relevance_is_a_softmax_over_units() -> None:
    q, units = strided(3, 6, 16), torch.randn(3, 300, 2, 16, device=DEVICE)
    lift = torch.zeros(3, 300, device=DEVICE)
    for request, count in enumerate((210, 300, 7)):
        lift[request, count:] = -torch.inf
    torch.testing.assert_close(active_set.rate(q, units, lift), unit_attention(q, units, lift))
