"""What hooks return: what fits comes through as it is, what does not is told with what was expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.engine import promises
from harness.engine.promises import BrokenPromise
from harness.engine.replay.replay import Replay
from harness.engine.step import Rows


def some_rows(count: int, attended: bool = True) -> Rows:
    return Rows(torch.zeros(count, 8), torch.arange(count), torch.zeros(count, 16) if attended else None)


def test_what_fits_comes_through() -> None:
    before, fewer, replay = some_rows(4), some_rows(2), Replay()
    assert promises.rows("after_layer", before, 0, before) is before
    assert promises.rows("after_attention", fewer, 0, before) is fewer
    assert promises.replay(replay) is replay and promises.replay(None) is None
    assert promises.by_layer("tokens_kept", (1, 2.5), 2) == [1, 2.5] and promises.count("kv_bytes", 0) == 0
    assert promises.late_tokens(3, 4) == 3 and promises.notes({"a": [1, None]}) == {"a": [1, None]}


@pytest.mark.parametrize(
    "out",
    [
        None,
        some_rows(0),
        some_rows(2, attended=False),
        Rows(torch.zeros(3, 8), torch.arange(2), torch.zeros(2, 16)),
        Rows(torch.zeros(2, 7), torch.arange(2), torch.zeros(2, 16)),
        Rows(torch.zeros(2, 8), torch.arange(2).float(), torch.zeros(2, 16)),
        Rows(torch.zeros(2, 8).half(), torch.arange(2), torch.zeros(2, 16)),
    ],
)
def test_rows_that_do_not_belong_together_are_told(out: Any) -> None:
    with pytest.raises(BrokenPromise, match="as many positions as hidden states and attended") as caught:
        promises.rows("after_attention", out, 3, some_rows(4))
    assert (caught.value.hook, caught.value.layer) == ("after_attention", 3)


@pytest.mark.parametrize("value", [True, 1.5, -1, "3", None, float("inf")])
def test_what_is_no_count_is_told(value: Any) -> None:
    with pytest.raises(BrokenPromise, match="an int of 0 or more"):
        promises.count("kv_bytes", value)
    with pytest.raises(BrokenPromise, match="an int for each of 1 layers"):
        promises.by_layer("tokens_requested", [value], 1, int)


def test_a_long_value_is_told_in_short() -> None:
    with pytest.raises(BrokenPromise, match=r"returned \[0, 0, .{60,80}\.\.\.; expected a number for each of 2 layers"):
        promises.by_layer("tokens_kept", [0] * 999, 2)
    with pytest.raises(BrokenPromise, match="a Replay, or None"):
        promises.replay(3)
