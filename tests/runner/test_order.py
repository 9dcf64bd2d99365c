"""The order of methods: every one in every place and behind every other equally often."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from harness.runner.order import order


def cycle(count: int) -> list[list[int]]:
    return [order(count, number) for number in range(count if count % 2 == 0 else 2 * count)]


@pytest.mark.parametrize("count", range(1, 12))
def test_every_order_has_every_method_once(count: int) -> None:
    assert all(sorted(order(count, number)) == list(range(count)) for number in range(3 * count))


@pytest.mark.parametrize("count", range(1, 12))
def test_over_a_cycle_every_method_has_every_place_equally_often(count: int) -> None:
    rows = cycle(count)
    seen = Counter((place, method) for row in rows for place, method in enumerate(row))
    assert set(seen.values()) == {len(rows) // count} and len(seen) == count * count


@pytest.mark.parametrize("count", range(2, 12))
def test_over_a_cycle_every_method_follows_every_other_equally_often(count: int) -> None:
    rows = cycle(count)
    seen = Counter(pair for row in rows for pair in pairwise(row))
    assert set(seen.values()) == {len(rows) // count} and len(seen) == count * (count - 1)


@pytest.mark.parametrize("count", range(2, 12))
def test_over_two_cycles_every_method_comes_twice_in_a_row_equally_often(count: int) -> None:
    rows = [order(count, number) for number in range(2 * count + 1)]
    seen = Counter(left[-1] for left, right in pairwise(rows) if left[-1] == right[0])
    assert len(seen) == count and len(set(seen.values())) == 1


@pytest.mark.parametrize("count", range(1, 6))
def test_a_steady_drift_falls_on_all_alike_after_every_second_sample(count: int) -> None:
    for number in range(0, 12, 2):
        clock = enumerate(order(count, number) + order(count, number + 1))
        total = Counter[int]()
        for time, method in clock:
            total[method] += time
        assert len(set(total.values())) == 1


def test_two_methods_turn_around() -> None:
    assert [order(2, number) for number in range(4)] == [[0, 1], [1, 0], [1, 0], [0, 1]]
