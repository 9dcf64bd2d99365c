"""The twins of sparse prefill choose what can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.reference import sparse
from tests.reference.sparse import FlexOptions, XOptions

LOUD = 1000.0


def seen(mask: Tensor, row: int, head: int = 0) -> list[int]:
    return mask[head, row].nonzero().flatten().tolist()


def silent(n: int, heads: int = 1, kv_heads: int = 1) -> tuple[Tensor, Tensor]:
    """Queries and keys under which all rows look at all tokens alike, [n, heads, 1] and [n, kv_heads, 1]."""
    return torch.zeros(n, heads, 1), torch.zeros(n, kv_heads, 1)


def looking(n: int, rows: slice, column: int) -> tuple[Tensor, Tensor]:
    """The same, but those rows look at that column alone."""
    q, k = silent(n)
    q[rows], k[column] = LOUD, 1
    return q, k


def block_pairs(mask: Tensor, block: int, head: int = 0) -> set[tuple[int, int]]:
    """Row and column of the blocks with any pair, all of which must be there."""
    n, pairs = mask.shape[1], set()
    for row in range(math.ceil(n / block)):
        for column in range(row + 1):
            here = slice(row * block, row * block + block), slice(column * block, column * block + block)
            if mask[head][here].any():
                assert torch.equal(mask[head][here], sparse.causal(n)[here])
                pairs.add((row, column))
    return pairs


def test_an_a_has_sinks_and_a_window_with_the_row_itself() -> None:
    mask = sparse.ashape(*silent(6, heads=2), sinks=1, window=2)
    assert mask.shape == (2, 6, 6)
    assert [seen(mask, row, head=1) for row in range(6)] == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5]]


def test_a_triangle_has_dense_last_rows() -> None:
    mask = sparse.trishape(*silent(6), sinks=1, window=1, last=2)
    assert [seen(mask, row) for row in (3, 4, 5)] == [[0, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]


def test_density_is_a_share_of_the_causal_pairs() -> None:
    mask = torch.stack((sparse.causal(3), torch.eye(3, dtype=torch.bool)))
    assert sparse.density(mask) == [1, 0.5]


def test_attention_stays_under_the_mask() -> None:
    q, k = silent(3, heads=2)
    v = torch.tensor([1.0, 2.0, 6.0])[:, None, None]
    mask = torch.stack((sparse.causal(3), torch.eye(3, dtype=torch.bool)))
    assert sparse.attend(q, k, v, mask).tolist() == [[1, 1], [1.5, 2], [3, 6]]


def test_last_rows_look_back_from_where_they_stand() -> None:
    q = torch.tensor([[0.0] * 4] * 2 + [[2.0, 0, 0, 0]])
    k = torch.tensor([[math.log(3.0), 0, 0, 0], [0.0] * 4, [0.0] * 4])
    weights = sparse.last_rows(q, k, 2)
    assert torch.allclose(weights, torch.tensor([[0.5, 0.5, 0], [0.6, 0.2, 0.2]]).double())
    assert sparse.by_offset(weights) == pytest.approx([0.7, 0.7, 0.6])


@pytest.mark.parametrize(
    ("offsets", "end", "ranges"),
    [
        ({0}, 64, [[0, 64]]),
        ({60}, 64, [[0, 64]]),
        ({0, 64, 400}, 64, [[0, 64]]),
        ({0, 10, 200}, 256, [[0, 64], [182, 310]]),
        ({128, 192}, 256, [[0, 128]]),
        ({127, 192}, 256, [[0, 64], [65, 129]]),
        (set(range(100)), 448, [[285, 477]]),
    ],
)
def test_a_slash_opens_whole_blocks_which_merge(offsets: set[int], end: int, ranges: list[list[int]]) -> None:
    assert sparse.slash_ranges(offsets, end) == ranges


def test_minference_forces_columns_and_offsets_and_adds_the_best_column() -> None:
    mask = sparse.minference(*looking(400, slice(336, None), 150), vertical=31, slash=100)
    columns = [*range(30), 150]
    assert seen(mask, 390) == [*columns, *range(285, 391)]
    assert seen(mask, 340) == [*columns, *range(221, 341)]
    assert seen(mask, 140) == [*range(141)]


def test_minference_adds_the_best_offset() -> None:
    mask = sparse.minference(*looking(300, slice(260, 261), 40), vertical=1, slash=101)
    assert seen(mask, 260) == [*range(30), *range(36, 100), *range(157, 261)]
    assert seen(mask, 255) == [*range(64), *range(93, 256)]


def test_minference_has_least_columns_and_offsets_of_which_the_nearest_go_first() -> None:
    mask = sparse.minference(*looking(400, slice(336, None), 150), vertical=1, slash=1)
    assert seen(mask, 340) == [*range(30), *range(271, 341)]


def test_minference_looks_at_64_rows() -> None:
    early = sparse.minference(*looking(400, slice(300, 336), 150), vertical=31, slash=100)
    late = sparse.minference(*looking(400, slice(336, 337), 150), vertical=31, slash=100)
    assert 150 not in seen(early, 390) and 150 in seen(late, 390)


def test_query_heads_look_at_the_keys_of_their_group() -> None:
    q, k = silent(400, heads=4, kv_heads=2)
    q[336:], k[150, 1] = LOUD, 1
    mask = sparse.minference(q, k, vertical=31, slash=100)
    assert [150 in seen(mask, 390, head) for head in range(4)] == [False, False, True, True]


@pytest.mark.parametrize(("n", "least", "dense"), [(8, 1, True), (9, 1, False), (12, 11, True), (13, 11, False)])
def test_flexprefill_is_dense_up_to_two_blocks_and_its_least_budget(n: int, least: int, dense: bool) -> None:
    options = FlexOptions(tau=0, min_budget=least, max_budget=4, block=4)
    assert (sparse.density(sparse.flexprefill(*silent(n), options)) == [1]) == dense


def test_flexprefill_takes_the_best_columns_and_diagonals_of_blocks() -> None:
    """Rows 14 to 17 look at column 9: 5 to 8 back, which are entries 12 to 9 of diagonals counted from the farthest."""
    mask = sparse.flexprefill(*looking(18, slice(14, None), 9), FlexOptions(tau=0, min_budget=8, block=4))
    assert block_pairs(mask, 4) == {
        *[(0, 0), (1, 0), (1, 1), (2, 0), (2, 2)],
        *[(3, 0), (3, 1), (3, 2), (3, 3), (4, 0), (4, 2), (4, 4)],
    }


def test_flexprefill_counts_tokens_up_to_gamma_and_one_more() -> None:
    shares = [0.125, 0.5, 0.25, 0.125]
    assert [sparse.tokens_for(shares, gamma) for gamma in (0.4, 0.5, 0.74, 0.75, 1)] == [1, 2, 2, 3, 5]


@pytest.mark.parametrize(
    ("gamma", "max_budget", "columns"), [(0.503, None, 2), (0.3, None, 1), (0.503, 16, 1), (0.503, 17, 2)]
)
def test_flexprefill_takes_a_block_for_every_128_tokens(gamma: float, max_budget: int | None, columns: int) -> None:
    """All rows look at all of 400 tokens alike, so that 202 of them are needed for 0.503, and 121 for 0.3."""
    options = FlexOptions(gamma, tau=0, min_budget=1, max_budget=max_budget, block=16)
    pairs = block_pairs(sparse.flexprefill(*silent(400), options), 16)
    assert ((20, 1) in pairs) == (columns > 1)


def test_flexprefill_measures_the_distance_in_nats() -> None:
    even, skewed = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.9, 0.1]).double()
    assert sparse.divergence(even, skewed) == pytest.approx(0.31898, abs=1e-5)
    assert math.isnan(sparse.divergence(even, torch.tensor([1.0, 0.0]).double()))


def test_flexprefill_estimates_by_mean_queries_and_keys() -> None:
    """Only the last two rows count, wherever the blocks begin."""
    q = torch.tensor([[9.0], [9.0], [9.0], [1.0], [3.0]])
    k = torch.log(torch.tensor([[1.0], [4.0], [1.0], [1.0], [3.0]]))
    assert torch.allclose(sparse.estimated(q, k, 2), torch.tensor([4.0, 1.0, 9.0]).double() / 14)


def test_flexprefill_trusts_estimates_under_one_threshold() -> None:
    """Row r of blocks has r + 1 equal shares; 1 + 2/2 + 3/3 + 2/4 are within 0.72 of 5."""
    options = FlexOptions(gamma=0.72, tau=0.5, min_budget=4, block=4)
    ends = {(row, column) for row in range(5) for column in (0, row)}
    aware = block_pairs(sparse.flexprefill(*silent(20), options), 4)
    assert aware == ends | {(2, 1), (3, 1)}
    assert block_pairs(sparse.flexprefill(*silent(20), FlexOptions(0.72, 0.0, 4, block=4)), 4) == ends


def test_xattention_sums_antidiagonals() -> None:
    q, k = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([[1.0], [0.0], [0.0], [1.0]])
    share = 1 / (1 + math.exp(-0.5))
    expected = torch.tensor([[1, 0], [share, 1 - share]]).double()
    assert torch.allclose(sparse.block_mass(q, k, stride=2, block=2), expected)
    assert torch.allclose(sparse.block_mass(q, k, stride=2, block=4), torch.tensor([[2.0]]).double())


def test_xattention_has_no_groups_of_padding() -> None:
    q, k = torch.zeros(5, 1), torch.zeros(5, 1)
    expected = torch.tensor([[2.0, 0], [2 / 3, 1 / 3]]).double()
    assert torch.allclose(sparse.block_mass(q, k, stride=2, block=4), expected)


@pytest.mark.parametrize(
    ("tau", "fewest", "lagging"),
    [
        (0.3, {0, 4}, {0, 2, 4}),
        (0.5, {0, 2, 4}, {0, 1, 2, 4}),
        (0.7, {0, 2, 4}, {0, 1, 2, 4}),
        (0.76, {0, 1, 2, 4}, {0, 1, 2, 4}),
        (0.9, {0, 1, 2, 4}, {0, 1, 2, 3, 4}),
    ],
)
def test_xattention_reaches_tau_of_a_row(tau: float, fewest: set[int], lagging: set[int]) -> None:
    mass = [share * 8 for share in (0.1, 0.2, 0.3, 0.05, 0.35)]
    assert sparse.choose_fewest(mass, 4, tau) == fewest
    assert sparse.choose_lagging(mass, 4, tau) == lagging
    assert sparse.choose_fewest([1.0], 0, tau) == sparse.choose_lagging([1.0], 0, tau) == {0}


@pytest.mark.parametrize(("first_chunk", "last"), [(0, {0, 1, 3}), (12, {0, 1, 3}), (13, {0, 1, 2, 3})])
def test_xattention_is_upstreams_in_its_first_chunk_alone(first_chunk: int, last: set[int]) -> None:
    """All look at all alike: of 2, the last row of blocks pays 15/28 to each but its own, which gets 11/28."""
    options = XOptions(stride=2, tau=0.7, block=4, first_chunk=first_chunk)
    pairs = block_pairs(sparse.xattention(*silent(16), options), 4)
    assert {column for row, column in pairs if row == 3} == last
