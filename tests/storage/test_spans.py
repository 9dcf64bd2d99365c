from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.engine.request import Request
from harness.measuring.clock import measure
from harness.storage.kept_digest import first_layer, kept_digest
from harness.storage.spans import BINS, every_layer, ranges, survivors
from tests.tiny import build, random_ids, tiny_engine


@given(st.sets(st.integers(0, 60)))
def test_ranges_hold_just_the_positions(positions: set[int]) -> None:
    found = ranges(np.array(sorted(positions), dtype=np.int64))
    assert {number for start, end in found for number in range(start, end)} == positions
    assert all(before[1] < after[0] for before, after in zip(found, found[1:], strict=False))


def test_a_layer_like_the_one_before_is_not_written_again() -> None:
    whole, half = torch.arange(10), torch.arange(5)
    spans = survivors([[whole], [whole], [half]], 8)["kept_spans"]
    assert spans == [[[0, 8]], None, [[0, 5]]]
    assert every_layer(spans) == [[[0, 8]], [[0, 8]], [[0, 5]]]


def test_shares_stand_in_for_too_many_ranges() -> None:
    found = survivors([[torch.arange(0, 20_000, 2)]] * 2, 20_000)
    assert found["kept_spans"] is None and found["kept_shares"][1] is None
    assert len(found["kept_shares"][0]) == BINS and set(found["kept_shares"][0]) <= {0.498, 0.5, 0.502}


def test_heads_that_hold_different_tokens_are_told_by_shares_and_a_digest() -> None:
    one, other = torch.tensor([0, 1, 2, 9]), torch.tensor([1, 0])
    found = survivors([[one, other], [other, one], [other, one]], 4)
    assert found["kept_spans"] is None and found["kept_shares"] == [[1.0, 1.0, 0.5, 0.0], None, None]
    assert [entry.partition(":")[0] for entry in found["kept_digest"].split()] == ["0", "1"]
    assert kept_digest(found) == found["kept_digest"]
    moved = survivors([[one, other], [other, one], [other, torch.tensor([0, 1, 3])]], 4)
    assert first_layer(found["kept_digest"], moved["kept_digest"]) == 2
    longer = survivors([[torch.tensor([0, 1]), torch.tensor([2])]], 4)["kept_digest"]
    assert longer != survivors([[torch.tensor([0]), torch.tensor([1, 2])]], 4)["kept_digest"]


def test_a_measured_request_knows_what_was_kept() -> None:
    engine = tiny_engine()
    measured = measure(engine, build("slim:reselect=A", engine), Request(random_ids(333), 2))
    sizes = [sum(end - start for start, end in layer) for layer in every_layer(measured.survivors["kept_spans"])]
    assert sizes == measured.kept


def test_a_measured_request_knows_how_many_heads_kept_a_token() -> None:
    engine = tiny_engine()
    measured = measure(engine, build("adakv:budget=64", engine), Request(random_ids(320), 2))
    shares = every_layer(measured.survivors["kept_shares"])
    assert [sum(layer) * 320 / BINS for layer in shares] == pytest.approx(measured.kept, abs=0.2)
    assert kept_digest(measured.survivors) is not None
