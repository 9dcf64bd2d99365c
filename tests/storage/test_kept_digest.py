from __future__ import annotations

from itertools import groupby
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from harness.storage.kept_digest import first_layer, kept_digest

LAYERS = st.lists(st.sampled_from([[[0, 9]], [[0, 4], [6, 9]], [[2, 9]], []]), min_size=1, max_size=12)


def digest(layers: list[Any]) -> str:
    found = kept_digest({"kept_spans": layers})
    assert found is not None
    return found


def test_one_entry_where_the_set_changes() -> None:
    text = digest([[[0, 9]], None, None, [[0, 4]], None])
    assert [entry.partition(":")[0] for entry in text.split()] == ["0", "3"] and len(text) == 17


def test_repeated_layers_may_be_written_out() -> None:
    assert digest([[[0, 9]], [[0, 9]], [[1, 2]]]) == digest([[[0, 9]], None, [[1, 2]]])


def test_what_is_not_recorded_has_no_digest() -> None:
    assert kept_digest({}) is kept_digest({"kept_spans": None}) is None


@given(LAYERS, LAYERS)
def test_the_first_layer_that_differs_is_found(one: list[Any], other: list[Any]) -> None:
    other = (other * len(one))[: len(one)]
    expected = next((layer for layer, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)
    assert first_layer(digest(one), digest(other)) == expected
    assert len(digest(one).split()) == len(list(groupby(one)))
