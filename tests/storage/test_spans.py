from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.engine.request import Request
from harness.measuring.clock import measure
from harness.storage.spans import every_layer, kept_spans, ranges
from tests.tiny import build, random_ids, tiny_engine


@given(st.sets(st.integers(0, 60)))
def test_ranges_hold_just_the_positions(positions: set[int]) -> None:
    found = ranges(torch.tensor(sorted(positions), dtype=torch.int64))
    assert {number for start, end in found for number in range(start, end)} == positions
    assert all(before[1] < after[0] for before, after in zip(found, found[1:], strict=False))


def test_a_layer_like_the_one_before_is_not_written_again() -> None:
    whole, half = torch.arange(10), torch.arange(5)
    spans = kept_spans([[whole], [whole], [half]], 8)
    assert spans == [[[0, 8]], None, [[0, 5]]]
    assert every_layer(spans) == [[[0, 8]], [[0, 8]], [[0, 5]]]


def test_too_many_ranges_are_not_recorded() -> None:
    assert kept_spans([[torch.arange(0, 20_000, 2)]], 20_000) is None


def test_a_measured_request_knows_what_was_kept() -> None:
    engine = tiny_engine()
    measured = measure(engine, build("slim:reselect=A", engine), Request(random_ids(333), 2))
    assert measured.spans is not None
    sizes = [sum(end - start for start, end in layer) for layer in every_layer(measured.spans)]
    assert sizes == measured.kept
