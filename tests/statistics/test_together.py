"""Requests that were timed together are one reading; single ones are what they always were, to the bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from harness.statistics.estimators import joined, pairs, speed_effect
from harness.statistics.paired import ALL, COLUMNS, COSTS, compare, leaders, speedups
from harness.statistics.together import together

ARRIVAL = {"rate": 1.0, "most": 2}


def asked(method: str, seconds: list[float], size: int = 1, task: str = "speed", **known: Any) -> pd.DataFrame:
    """Records of `size` requests a batch that share its seconds, and have different answers; `size` 1: alone."""
    rows = []
    for batch, second in enumerate(seconds):
        for place in range(size):
            number = batch * size + place
            times = {"ttft_s": second * (1 + place / 10), "tpot_s": second, "e2e_s": 2 * second, "energy_j": second}
            rows.append({"method": method, "task": task, "sample": str(number), "score": float(number % 3), **times})
    extra: dict[str, Any] = {"extra": [{}] * len(rows)} | ({"batch": size} if size > 1 else {})
    return pd.DataFrame(rows).assign(**(extra | known))


def both(seconds: dict[str, list[float]], size: int = 1, **known: Any) -> pd.DataFrame:
    return pd.concat([asked(name, own, size, **known) for name, own in seconds.items()], ignore_index=True)


def drawn(number: int, seed: int = 0) -> dict[str, list[float]]:
    clock = np.random.default_rng(seed)
    return {"full": [*np.exp(clock.normal(1, 0.1, number))], "slim": [*np.exp(clock.normal(0, 0.1, number))]}


def row(found: pd.DataFrame, task: str = "speed") -> dict[str, Any]:
    (one,) = found[found["task"] == task].to_dict("records")
    return {str(name): value for name, value in one.items()}


@pytest.mark.parametrize("number", [7, 15, 40])
def test_single_requests_give_the_figures_they_gave_to_the_bit(number: int) -> None:
    records = both(drawn(number))
    full, slim = (records[records["method"] == name].set_index("sample") for name in ("full", "slim"))
    found = row(compare(records))
    for name, column in COSTS.items():
        plain = speed_effect([pairs(np.log(full[column]) - np.log(slim[column]))])
        values = [found[f"{name}_n"], *(found[f"{name}_{field}"] for field in ("ratio", "low", "high", "p"))]
        assert values == [plain.n, *np.exp([plain.estimate, plain.low, plain.high]), plain.p]
    alone: dict[str, Any] = {"batch": pd.array([1] * len(records), "Int64"), "batch_tokens_per_s": 5.0, "arrival": None}
    assert compare(records.assign(**alone)).equals(compare(records))
    assert leaders(records.assign(**alone), "ttft") == leaders(records, "ttft") == {("speed", "slim"), (ALL, "slim")}


@pytest.mark.parametrize("size", [2, 5])
def test_a_batch_is_one_pair_and_its_answers_are_many(size: int) -> None:
    seconds = drawn(8)
    single, batched = row(compare(both(seconds))), row(compare(both(seconds, size)))
    for name in COSTS:
        columns = [column for column in COLUMNS if column.startswith(f"{name}_")]
        assert np.allclose([batched[one] for one in columns], [single[one] for one in columns], rtol=1e-9), name
    assert (batched["n"], batched["score_n"], batched["tpot_n"]) == (8 * size, 8 * size, 8)
    assert leaders(both(seconds, size), "tpot") == {("speed", "slim"), (ALL, "slim")}


def test_six_requests_of_one_batch_are_no_six_pairs() -> None:
    records = both({"full": [2.0], "slim": [1.0]}, 16)
    found = row(compare(records))
    assert all(found[f"{name}_n"] == 1 and math.isnan(found[f"{name}_low"]) for name in COSTS)
    assert found["tpot_ratio"] == pytest.approx(2.0) and speedups(records).loc[("slim", "speed"), "ttft"] == 2.0
    assert not any(leaders(records, name) for name in COSTS)


def test_a_load_is_one_pair_too() -> None:
    seconds = drawn(12)
    found = row(compare(both(seconds, arrival=[ARRIVAL] * 12)))
    assert (found["ttft_n"], found["tpot_n"], found["energy_n"], found["score_n"]) == (1, 0, 0, 12)
    assert math.isfinite(found["ttft_ratio"]) and math.isnan(found["ttft_low"])


def test_a_batch_is_known_by_its_rate_in_whatever_order_its_records_come() -> None:
    records = asked("full", [1.0, 1.0, 3.0], 2, batch_tokens_per_s=[7.0, 7.0, 8.0, 8.0, math.nan, math.nan])
    assert together(records).tolist() == [0, 0, 1, 1, 2, 2]
    assert together(records.iloc[[0, 2, 4, 1, 3, 5]]).tolist() == [0, 1, 2, 0, 1, 2]
    # Without a rate the order says it; of other methods and tasks it is never the same batch.
    unknown = records.drop(columns="batch_tokens_per_s")
    assert together(unknown).tolist() == [0, 0, 1, 1, 2, 2]
    assert together(pd.concat([unknown, unknown.assign(task="b")])).tolist() == [
        *[0, 0, 1, 1, 2, 2],
        *[3, 3, 4, 4, 5, 5],
    ]
    assert together(records.head(0)).tolist() == []


def test_batches_that_are_cut_otherwise_in_the_two_methods_are_one_pair() -> None:
    full, slim = asked("full", [2.0] * 12, 2), asked("slim", [1.0] * 6, 4)
    assert row(compare(pd.concat([full, slim])))["tpot_n"] == 6
    shifted = slim.assign(sample=[str((number + 1) % 24) for number in range(24)])
    assert row(compare(pd.concat([full, shifted])))["tpot_n"] == 1, "each batch shares a sample with the next one"
    alone = asked("slim", [1.0] * 24)
    assert row(compare(pd.concat([full, alone])))["tpot_n"] == 12


def test_joined_rows_share_a_number_or_a_row_that_does() -> None:
    assert joined([5, 5, 9, 2]).tolist() == [0, 0, 2, 3]
    assert joined([1, 2, 3, 4], [7, 8, 8, 9]).tolist() == [0, 1, 1, 3]
    assert joined([1, 1, 2, 2, 3], [4, 5, 5, 6, 6]).tolist() == [0] * 5
    assert joined([]).tolist() == []


def test_batches_of_one_context_are_one_unit() -> None:
    found = pairs([1.0, 3.0, 5.0, 7.0, 9.0], [0, 0, 0, 1, 1], timed=[[0, 0, 1, 2, 3]])
    assert found.values.tolist() == [2.0, 5.0, 7.0, 9.0] and found.counts.tolist() == [2.0, 2.0]
    assert pairs([1.0, math.nan, 5.0], timed=[[0, 0, 1]]).values.tolist() == [1.0, 5.0]


def test_intervals_of_batches_hold_the_truth_where_those_of_their_requests_do_not() -> None:
    """Noise of 5 % is the batch's, 1 % the request's."""
    clock = np.random.default_rng(4)
    size, batches, held = 8, 10, np.zeros(2)
    for _ in range(400):
        values = np.repeat(clock.normal(0, 0.05, batches), size) + clock.normal(0, 0.01, batches * size)
        numbers = np.repeat(np.arange(batches), size)
        found = [speed_effect([pairs(values, timed=timed)]) for timed in ([numbers], [])]
        held += [effect.low <= 0 <= effect.high for effect in found]
    assert held[0] / 400 > 0.93 and held[1] / 400 < 0.7
