from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import InputError
from harness.statistics.estimators import (
    ALPHA,
    SPEED_ALPHA,
    holm,
    mcnemar,
    pairs,
    score_effect,
    sign_flip,
    speed_effect,
    trimmed_mean,
)
from harness.statistics.noise import TWIN, noise_floor
from harness.statistics.paired import ALL, COLUMNS, COSTS, compare, leaders, speedups, verdict, verdicts
from harness.statistics.power import flips_needed, flips_power, pairs_needed, score_mde, speed_mde

Row = dict[str, Any]


def table(scores: dict[str, list[float]], task: str = "needle", **times: list[float]) -> pd.DataFrame:
    """Records of methods with these scores; all times of a method are 1 s unless `times` has them."""
    return timed(scores, times, task)


def timed(scores: dict[str, list[float]], times: dict[str, list[float]], task: str = "needle") -> pd.DataFrame:
    rows: list[Row] = []
    for method, values in scores.items():
        seconds = times.get(method, [1.0] * len(values))
        for sample, (score, second) in enumerate(zip(values, seconds, strict=True)):
            clocks = {"ttft_s": second, "tpot_s": second, "e2e_s": second}
            rows.append({"method": method, "task": task, "sample": str(sample), "score": score, "extra": {}, **clocks})
    return pd.DataFrame(rows)


def only(found: pd.DataFrame, method: str, task: str = "needle") -> Row:
    (row,) = found[(found["method"] == method) & (found["task"] == task)].to_dict("records")
    return {str(name): value for name, value in row.items()}


# Estimators against scipy's, and against textbooks


def test_mcnemar_is_the_exact_one() -> None:
    assert mcnemar(0, 0) == 1.0 and mcnemar(0, 5) == 0.0625
    assert math.isclose(mcnemar(2, 10), 2 * sum(math.comb(12, k) for k in range(3)) / 2**12)


@given(st.integers(0, 8), st.integers(0, 5))
def test_mcnemar_is_a_sign_flip_test(losses: int, gains: int) -> None:
    values = np.array([-1.0] * losses + [1.0] * gains + [0.0])
    assert math.isclose(sign_flip(values), mcnemar(losses, gains))


@pytest.mark.parametrize(
    ("number", "tolerance"), [(9, 1e-12), (30, 0.015), pytest.param(600, 0.015, marks=pytest.mark.slow)]
)
def test_sign_flip_is_scipys_permutation_test(number: int, tolerance: float) -> None:
    values = np.random.default_rng(number).normal(1 / math.sqrt(number), 1, number)
    exact = scipy.stats.permutation_test(
        (values, np.zeros(number)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        rng=np.random.default_rng(0),
    )
    assert abs(sign_flip(values) - float(exact.pvalue)) <= tolerance


def test_holm_adjusts_step_by_step_and_skips_what_is_unknown() -> None:
    assert np.allclose(holm([0.01, 0.04, math.nan, 0.03, 0.005]), [0.03, 0.06, math.nan, 0.06, 0.02], equal_nan=True)
    assert holm([]).size == 0 and np.isnan(holm([math.nan])).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.randoms())
def test_holm_depends_on_no_order_and_is_never_below_p(values: list[float], random: Any) -> None:
    shuffled = random.sample(range(len(values)), len(values))
    adjusted = holm(values)
    assert np.all(adjusted >= np.array(values)) and np.all(adjusted <= 1)
    assert np.allclose(holm([values[index] for index in shuffled]), adjusted[shuffled])


@pytest.mark.parametrize("number", [20, 50])
def test_the_speed_interval_is_scipys_of_a_trimmed_mean(number: int) -> None:
    values = np.random.default_rng(1).standard_t(2, number)
    found = speed_effect([pairs(values)])
    low, high = scipy.stats.mstats.trimmed_mean_ci(values, limits=(0.2, 0.2))
    assert math.isclose(found.estimate, float(scipy.stats.trim_mean(values, 0.2)))
    assert np.allclose([found.low, found.high], [float(low), float(high)])


def test_below_ten_pairs_the_speed_interval_is_students() -> None:
    values = np.random.default_rng(1).normal(0.1, 0.1, 7)
    found, student = speed_effect([pairs(values)]), scipy.stats.ttest_1samp(values, 0.0)
    ends = student.confidence_interval()
    assert np.allclose([found.low, found.high, found.p], [float(ends.low), float(ends.high), float(student.pvalue)])


def test_the_score_interval_of_many_changes_is_scipys_bootstrap_a_little_wider() -> None:
    values = np.random.default_rng(2).choice([-1.0, 0.0, 1.0], 60, p=[0.3, 0.6, 0.1])
    found = score_effect([pairs(values)])
    plain = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0))
    low, high = plain.confidence_interval
    assert np.allclose([found.low, found.high], [low, high], atol=0.03)
    assert 1 < (found.high - found.low) / (high - low) < 1.15


# Few, equal and clustered values


@pytest.mark.parametrize("values", [[], [0.5], [math.nan, 0.1]])
def test_fewer_than_two_values_have_no_interval(values: list[float]) -> None:
    for found in (score_effect([pairs(values)]), speed_effect([pairs(values)]), score_effect([])):
        assert all(map(math.isnan, (found.low, found.high, found.p, found.se)))
    assert score_mde(score_effect([pairs(values)])) == math.inf


@pytest.mark.parametrize("value", [0.0, -1.0, 0.25])
def test_equal_differences_are_no_certainty(value: float) -> None:
    found = score_effect([pairs([value] * 30)])
    rate = 1 - 0.05 ** (1 / 30)  # of pairs that differ, of which none is seen in one of twenty runs
    assert math.isclose(found.low, max(-1, value - rate * (1 + value)), abs_tol=0.03)
    assert math.isclose(found.high, value + rate * (1 - value), abs_tol=0.03)


def test_equal_ratios_have_no_interval() -> None:
    found = speed_effect([pairs([math.log(2)] * 9)])
    assert math.isclose(found.estimate, math.log(2)) and math.isnan(found.low) and math.isnan(found.p)


def test_a_task_without_changes_adds_its_doubt_to_the_whole() -> None:
    moved, still = pairs([-1.0, 1.0] * 20), pairs([0.0] * 5)
    whole, alone = score_effect([moved, still]), score_effect([moved])
    assert whole.high - whole.low > 0.3 and (alone.high - alone.low) / 2 < 0.35


def test_copies_within_a_cluster_add_no_certainty() -> None:
    values, units = np.random.default_rng(3).normal(0.1, 0.3, 30), np.arange(30)
    for effect in (score_effect, speed_effect):
        once = effect([pairs(values, units, "a")])
        copied = effect([pairs(np.repeat(values, 4), np.repeat(units, 4), "a")])
        taken_apart = effect([pairs(np.repeat(values, 4), label="a")])
        assert (copied.n, copied.units) == (120, 30)
        assert np.allclose([copied.low, copied.high, copied.p], [once.low, once.high, once.p])
        assert taken_apart.high - taken_apart.low < 0.65 * (once.high - once.low)


def test_interrupted_runs_hardly_move_a_ratio() -> None:
    values = np.random.default_rng(4).normal(0.05, 0.01, 30)
    calm = speed_effect([pairs(values)])
    values[[3, 11, 20]] += [3.0, -2.0, 1.0]
    found = speed_effect([pairs(values)])
    assert abs(found.estimate - calm.estimate) < 0.003 and found.p < 1e-6
    assert found.high - found.low < 1.6 * (calm.high - calm.low)


def test_resamples_are_the_same_each_time_and_others_for_each_task() -> None:
    values = np.random.default_rng(5).normal(0, 0.3, 40)
    one, again, other = (pairs(values, label=label).resampled(0) for label in ("a", "a", "b"))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert trimmed_mean(values)[0] == trimmed_mean(values[::-1])[0]


# What could have been found


def test_an_effect_of_the_detectable_size_is_found_four_times_out_of_five() -> None:
    generator = np.random.default_rng(6)
    mdes = [speed_mde(speed_effect([pairs(generator.normal(0, 0.05, 25))])) for _ in range(300)]
    true = float(np.median(mdes))
    p = np.array([speed_effect([pairs(generator.normal(true, 0.05, 25))]).p for _ in range(600)])
    assert 0.74 <= np.mean(p <= SPEED_ALPHA) <= 0.88


@pytest.mark.slow
def test_without_a_single_change_the_detectable_effect_is_a_rate_of_flips() -> None:
    mde = score_mde(score_effect([pairs([0.0] * 50)]))
    flips = np.random.default_rng(7).binomial(50, mde, 4000)
    assert abs(np.mean([mcnemar(int(lost), 0) <= ALPHA for lost in flips]) - 0.8) < 0.03


def test_what_no_result_could_show_is_not_detectable() -> None:
    assert score_mde(score_effect([pairs([1.0, 0.0, 0.0, 1.0, 0.0])])) == math.inf
    assert score_mde(score_effect([pairs([0.0] * 6)])) < math.inf


def test_what_would_take_a_tenfold_ratio_or_more_than_all_answers_is_not_detectable() -> None:
    wild = speed_effect([pairs(np.random.default_rng(8).normal(0, 3, 8))])
    assert math.isfinite(wild.high) and speed_mde(wild) == math.inf
    mixed = score_effect([pairs([1.0, -1.0] * 3)])
    assert score_mde(mixed) == math.inf


@pytest.mark.slow
def test_flips_needed_are_those_of_mcnemars_exact_test() -> None:
    # A total loss: as many losses as make p = 2^(1-n) small enough.
    assert [flips_needed(1.0, 0.0, alpha) for alpha in (0.05, 0.05 / 6, 0.001)] == [6, 8, 11]
    assert mcnemar(8, 0) <= 0.05 / 6 < mcnemar(7, 0)
    draws = np.random.default_rng(9).choice([-1, 1, 0], (1500, 60), p=[0.3, 0.1, 0.6])
    p = [mcnemar(int((draw < 0).sum()), int((draw > 0).sum())) for draw in draws]
    found = np.mean((np.array(p) <= ALPHA) & (draws.sum(1) < 0))
    assert abs(flips_power(60, 0.3, 0.1) - found) < 0.04
    number = flips_needed(0.3, 0.1)
    assert flips_power(number, 0.3, 0.1) >= 0.8 > flips_power(number - 10, 0.3, 0.1)
    assert flips_needed(0.02, 0.0) < 400 and flips_needed(0.1, 0.1) == 10**6


def test_pairs_needed_have_the_power_they_promise() -> None:
    number = pairs_needed(0.08)
    generator = np.random.default_rng(8)
    p = [speed_effect([pairs(generator.normal(math.log(1.05), 0.08, number))]).p for _ in range(500)]
    assert 40 <= number <= 60 and np.mean(np.array(p) <= SPEED_ALPHA) >= 0.9


# Verdicts


@pytest.mark.parametrize(
    ("effect", "word"),
    [
        ((7.0, 3.0, 11.0, 0.01), "better"),
        ((-7.0, -11.0, -3.0, 0.05), "worse"),
        ((7.0, 3.0, 11.0, 0.06), "undecided"),
        ((7.0, -1.0, 15.0, 0.01), "undecided"),
        ((1.0, -1.0, 3.0, 0.3), "no difference"),
        ((1.5, 1.0, 2.0, 0.01), "within noise"),
        ((1.5, 1.0, 2.0, 0.2), "no difference"),
        ((1.0, -1.0, 6.0, 0.3), "undecided"),
        ((1.0, math.nan, math.nan, math.nan), "undecided"),
    ],
)
def test_verdict(effect: tuple[float, float, float, float], word: str) -> None:
    assert verdict(*effect, margin=5.0, alpha=0.05, floor=2.0) == word


def test_where_nothing_could_be_found_there_is_no_verdict() -> None:
    assert verdict(0.0, -1.0, 1.0, 1.0, margin=5.0, alpha=0.05, mde=math.inf) == "undecided"


# Tables of a run


def test_comparison_pairs_samples_and_not_positions() -> None:
    records = table({"full": [1, 0, 1], "slim": [0, 0, 1]}, full=[1.0, 2.0, 4.0], slim=[1.0, 1.0, 1.0])
    found = only(compare(records.sample(frac=1, random_state=0).drop(index=0)), "slim")
    assert list(compare(records).columns) == COLUMNS
    assert (found["n"], found["score_n"], found["score_difference"]) == (2, 2, 0.0)
    assert math.isclose(found["ttft_ratio"], math.sqrt(8))


def test_exact_match_is_judged_by_mcnemar_and_the_rest_by_sign_flips() -> None:
    exact = only(compare(table({"full": [1.0] * 8 + [0.0], "slim": [0.0] * 8 + [1.0]})), "slim")
    assert exact["score_test"] == "McNemar" and exact["score_p"] == mcnemar(8, 1)
    graded = only(compare(table({"full": [0.5] * 8, "slim": [0.25] * 8})), "slim")
    assert graded["score_test"] == "sign flip" and graded["score_p"] == 2 / 2**8


def test_all_weighs_tasks_the_same_and_takes_those_of_all_methods() -> None:
    tasks = [table({"full": [1.0] * 2, "slim": [0.0, 0.5]}, "a"), table({"full": [1.0] * 6, "slim": [1.0] * 6}, "b")]
    whole = only(compare(pd.concat(tasks)), "slim", ALL)
    assert (whole["n"], whole["score_difference"]) == (8, -37.5)
    tasks += [table({"full": [1.0] * 6, "lazyllm": [1.0] * 6}, "b").query("method == 'lazyllm'")]
    assert only(compare(pd.concat(tasks)), "slim", ALL)["n"] == 6


def test_a_comparison_does_not_depend_on_the_other_methods_but_for_holm() -> None:
    clock = np.random.default_rng(9)
    scores = {name: list(clock.random(25)) for name in ("full", "slim", "lazyllm")}
    alone, among = (
        only(compare(table({name: scores[name] for name in names})), "slim") for names in (["full", "slim"], scores)
    )
    same = [column for column in COLUMNS if not column.endswith(("_holm", "_mde"))]
    assert [alone[column] for column in same if alone[column] == alone[column]] == [
        among[column] for column in same if among[column] == among[column]
    ]
    assert among["score_p_holm"] >= alone["score_p_holm"] and among["score_mde"] > alone["score_mde"]


@pytest.mark.parametrize(("number", "word"), [(2, "undecided"), (5, "undecided"), (6, "better")])
def test_fewer_than_six_pairs_have_estimates_and_no_verdict(number: int, word: str) -> None:
    times = {"slim": list(np.exp(np.random.default_rng(number).normal(-1, 0.001, number)))}
    records = timed({"full": [1.0] * number, "slim": [0.0] * number}, times)
    found = only(verdicts(compare(records)), "slim")
    assert found["ttft_verdict"] == word and math.isclose(found["ttft_ratio"], math.e, rel_tol=0.01)
    assert found["score_difference"] == -100.0 and found["score_verdict"] == ("worse" if number == 6 else "undecided")
    known = number >= 6
    assert (
        math.isfinite(found["ttft_low"]) == math.isfinite(found["ttft_p"]) == math.isfinite(found["ttft_mde"]) == known
    )
    assert (leaders(records, "ttft") == {("needle", "slim"), (ALL, "slim")}) == known == bool(leaders(records, "ttft"))


def test_samples_of_one_context_are_one_cluster() -> None:
    records = table({"full": [1.0] * 12, "slim": [0.0, 0.0, 0.0, 1.0, 1.0, 1.0] * 2})
    records["extra"] = pd.Series([{"context_hash": f"c{int(sample) // 2}"} for sample in records["sample"]])
    found = only(compare(records), "slim")
    assert (found["n"], found["units"], found["score_test"]) == (12, 6, "sign flip")
    assert found["score_p"] == 0.125 and found["score_mde"] > 50


def test_what_was_not_measured_has_no_effect() -> None:
    records = table({"full": [1.0] * 3, "slim": [1.0] * 3}, slim=[math.nan] * 3)
    found = only(compare(records), "slim")
    assert found["n"] == 3 and found["ttft_n"] == 0
    assert math.isnan(found["ttft_ratio"]) and math.isnan(found["ttft_low"]) and found["ttft_mde"] == math.inf


def test_a_sample_answered_twice_is_refused() -> None:
    records = table({"full": [1.0], "slim": [1.0]})
    with pytest.raises(InputError, match="twice"):
        compare(pd.concat([records, records]))


def test_without_the_reference_there_is_nothing_to_compare() -> None:
    records = table({"slim": [1.0, 0.0]})
    assert compare(records).empty and speedups(records).empty and noise_floor(records).empty
    assert compare(records.head(0)).empty and verdicts(compare(records)).empty and leaders(records, "score") == set()


def noisy(seed: int, effects: dict[str, float], number: int = 40) -> pd.DataFrame:
    clock = np.random.default_rng(seed)
    times = {name: list(np.exp(clock.normal(effect, 0.02, number))) for name, effect in effects.items()}
    return timed({name: [1.0] * number for name in effects}, times)


def test_gains_below_the_noise_floor_are_within_noise() -> None:
    records = noisy(1, {"full": 0.0, TWIN: 0.03, "lazyllm": -0.02, "slim": -0.5})
    floors = noise_floor(records)
    floor = only(floors.assign(method=TWIN), TWIN)
    assert 1.02 < floor["ttft_floor"] < 1.05 and (floor["score_flips"], floor["score_floor"]) == (0, 0.0)
    found = verdicts(compare(records), floors)
    assert only(found, "lazyllm")["ttft_verdict"] == "within noise" and only(found, "slim")["ttft_verdict"] == "better"
    assert only(verdicts(compare(records)), "lazyllm")["ttft_verdict"] == "better"


def test_score_flips_of_the_twin_are_counted() -> None:
    floors = noise_floor(table({"full": [1, 1, 0, 0.5], TWIN: [1, 0, 1, 0.5]}))
    assert list(floors["score_flips"]) == [2, 2] and list(floors["score_floor"]) == [50.0, 50.0]


def test_twins_do_not_count_among_the_methods_that_holm_adjusts_for() -> None:
    records = noisy(2, {"full": 0.0, TWIN: 0.0, "slim": -0.01})
    with_twin, without = compare(records), compare(records[records["method"] != TWIN])
    assert only(with_twin, "slim")["ttft_p_holm"] == only(without, "slim")["ttft_p_holm"]


def test_leaders_are_what_nothing_is_shown_to_beat() -> None:
    records = noisy(3, {"full": 0.0, "slim": -0.5, "lazyllm": -0.5, "streaming": -0.1})
    assert leaders(records, "ttft") == set(itertools.product(["needle", ALL], ["slim", "lazyllm"]))
    assert leaders(records, "score") == set()


def test_speedups_are_the_estimates_of_the_comparison() -> None:
    records = noisy(4, {"full": 0.0, "slim": -0.3})
    assert speedups(records).loc[("slim", "needle"), "e2e"] == only(compare(records), "slim")["e2e_ratio"]
    of_full = speedups(records.assign(energy_j=records["e2e_s"] * 300)).xs("full", level="method")
    assert list(of_full.columns) == list(COSTS) and list(of_full.to_numpy().ravel()) == [1.0] * 4


@pytest.mark.slow
def test_a_whole_run_of_nothing_but_noise_is_rarely_flagged() -> None:
    """Ten methods x three tasks that are all full attention: Holm keeps the run below the level, not the cell."""
    clock, flagged = np.random.default_rng(10), 0
    for _ in range(300):
        full = clock.normal(0, 0.02, (3, 12))
        logs = full[:, None] - clock.normal(0, 0.02, (3, 10, 12))
        flagged += min(holm([speed_effect([pairs(cell)]).p for cell in logs.reshape(30, 12)])) <= SPEED_ALPHA
    assert flagged <= 0.05 * 300
