from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.report.crossover import crossing, crossovers
from harness.report.recorded import read
from harness.report.table import to_csv
from harness.storage.record import Record
from tests.report.test_report import record
from tests.report.test_tables import math_noise, written

NAN = math.nan


@pytest.mark.parametrize(
    ("ratios", "low", "high", "at"),
    [
        ([0.5, 2.0, 4.0], 1024, 2048, math.sqrt(2) * 1024),
        ([2.0, 0.5, 2.0], 2048, 4096, math.sqrt(2) * 2048),
        ([1.5, 2.0, 3.0], 0, 1024, NAN),
        ([0.5, 0.8, 0.9], 4096, math.inf, NAN),
        ([0.5, 2.0, 0.9], 4096, math.inf, NAN),
        ([0.5, NAN, 2.0], 1024, 4096, 2048.0),
        ([NAN, NAN, 2.0], 0, 4096, NAN),
        ([1.0, 2.0, 2.0], 1024, 2048, 1024.0),
        ([0.5, 2.0, NAN], 1024, 2048, math.sqrt(2) * 1024),
    ],
)
def test_crossing(ratios: list[float], low: float, high: float, at: float) -> None:
    found = crossing([1024, 2048, 4096], ratios)
    assert found is not None
    assert found[:2] == (low, high) and found.at == pytest.approx(at, nan_ok=True)


def test_nothing_measured_has_no_crossing() -> None:
    assert crossing([1024, 2048], [NAN, NAN]) is None and crossing([], []) is None


@given(st.lists(st.floats(0.1, 10) | st.just(NAN), min_size=1, max_size=8))
def test_a_method_wins_beyond_its_crossing_and_not_ahead_of_it(ratios: list[float]) -> None:
    lengths = [2.0**index for index in range(len(ratios))]
    if (found := crossing(lengths, ratios)) is None:
        assert all(map(math.isnan, ratios))
        return
    known = {x: ratio for x, ratio in zip(lengths, ratios, strict=True) if not math.isnan(ratio)}
    assert all(ratio > 1 for x, ratio in known.items() if x >= found.high)
    assert not found.low or known[found.low] <= 1
    assert math.isnan(found.at) == (not found.low or math.isinf(found.high))
    assert math.isnan(found.at) or found.low <= found.at <= found.high


def test_table_says_between_which_lengths_and_what_the_test_says(tmp_path: Path) -> None:
    """Times in ms by length; `lazyllm` never wins, `snapkv` from the shortest on, `slim` between, but not in all."""
    clock = random.Random(0)
    ttft = {"full": (8, 16), "slim": (10, 8), "snapkv": (4, 8), "lazyllm": (9, 17)}
    e2e = {"full": 20, "slim": 30, "snapkv": 20, "lazyllm": 20}

    def one(method: str, length: int, ms: float, number: int) -> Record:
        times = {"ttft_s": ms * math_noise(clock), "e2e_s": e2e[method] * math_noise(clock)}
        tokens = {"prompt_tokens": length, "context_tokens": length, "extra": {"length": length}}
        return record(method, "speed", number, **times, **tokens).model_copy(update={"sample": f"{length}-{number}"})

    grid = [(method, *pair) for method, times in ttft.items() for pair in zip((1024, 2048), times, strict=True)]
    run = read(written(tmp_path / "run", [one(*each, number) for each in grid for number in range(20)]))
    table = crossovers(run)
    shown = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert list(shown) == ["slim", "snapkv", "lazyllm"]
    # 10 against 8 ms, then 8 against 16: log(10 / 8) / (log(10 / 8) + log(16 / 8)) of the way, in logarithms.
    assert table.rows[0][1].value == pytest.approx(1212, rel=0.01)
    assert shown["slim"][0].endswith(", between 1024 and 2048") and shown["slim"][1] == "better"
    assert shown["slim"][2:] == ["at no length measured, up to 2048", "worse"]
    assert shown["snapkv"][:2] == ["1024 or less, the shortest", "better"]
    assert shown["lazyllm"][:2] == ["at no length measured, up to 2048", "worse"]
    head, slim, *_ = to_csv(table).splitlines()
    assert head.startswith("method,sooner from,sooner from low,sooner from high,TTFT verdict at the longest")
    assert ",1024,2048,better," in slim


def test_one_length_has_no_crossover(tmp_path: Path) -> None:
    records = [record(method, "speed", 0) for method in ("full", "slim")]
    assert not crossovers(read(written(tmp_path / "run", records))).rows
