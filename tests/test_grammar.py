from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import InputError
from harness.grammar import Item, parse_item, parse_items, without_paths

NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789_-.", min_size=1)
ITEMS = st.builds(Item, NAMES, st.none() | NAMES, st.dictionaries(NAMES, NAMES, max_size=3))


@given(ITEMS)
def test_an_item_reads_back_as_written(item: Item) -> None:
    assert parse_item(str(item)) == item


def test_commas_separate_and_slashes_group() -> None:
    first, second = parse_items("slim:budgets=0.5/0.25:score=softmax, longbench/trec_e")
    assert first == Item("slim", None, {"budgets": "0.5/0.25", "score": "softmax"})
    assert second == Item("longbench", "trec_e", {})


@pytest.mark.parametrize(
    "text", ["", ",", "slim,", "slim:", "slim:w", "slim:w=", "slim:=4", "/x", "x/", "a:k=1:k=2", "a,a"]
)
def test_malformed_text_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError) as error:
        parse_items(text)
    assert "\n" not in str(error.value)


def test_absolute_paths_are_not_for_records() -> None:
    text = "jsonl:file=/home/someone/a.jsonl:metric=contains,needle:depths=0.1/0.5,jsonl:file=data/b.jsonl"
    assert without_paths(text) == "jsonl:file=a.jsonl:metric=contains,needle:depths=0.1/0.5,jsonl:file=data/b.jsonl"
