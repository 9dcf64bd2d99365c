"""The promises of docs/statistics.md, on simulated clocks; `harness.statistics.bench real` checks real ones."""

from __future__ import annotations

import numpy as np
import pytest

from harness.statistics.bench import (
    EVEN,
    PAIRS,
    SKEWED,
    main,
    run_bench,
    score_coverage,
    simulate_bench,
    simulated_logs,
    speed_coverage,
)
from harness.statistics.estimators import pairs, score_effect, speed_effect

pytestmark = pytest.mark.slow


def test_false_alarms_are_rare_and_a_slowdown_of_five_percent_is_caught() -> None:
    found = simulate_bench(repeats=300, pairs=PAIRS, noise=0.05)
    assert found.false_alarm_rate <= 0.05 and found.power >= 0.95
    assert abs(found.measured - 0.05) < 0.002 and found.covered >= 0.93 * 600


@pytest.mark.parametrize("seed", range(3))
def test_more_noise_means_less_power_and_no_more_false_alarms(seed: int) -> None:
    found = simulate_bench(repeats=200, pairs=20, noise=0.1, seed=seed)
    assert found.false_alarm_rate <= 0.05 and found.power < 0.5


@pytest.mark.parametrize("number", [5, 8, 10, 20, 50])
@pytest.mark.parametrize("machine", [(0.01, 0.0), (0.05, 0.03), (0.1, 0.1)])
def test_intervals_of_ratios_hold_the_truth(number: int, machine: tuple[float, float]) -> None:
    # 95 % less three standard errors of 1500 repeats
    assert speed_coverage(number, *machine, repeats=1500) >= 0.95 - 3 * 0.0056


@pytest.mark.parametrize("number", [6, 20, 100])
@pytest.mark.parametrize("flips", [(0.02, 0.02), (0.05, 0.0), (0.14, 0.0), (0.2, 0.1)])
def test_intervals_of_scores_hold_the_truth(number: int, flips: tuple[float, float]) -> None:
    assert score_coverage(number, *flips, repeats=500) >= 0.95 - 3 * 0.0098


@pytest.mark.parametrize("number", [6, 20, 50])
@pytest.mark.parametrize("sizes", [EVEN, SKEWED], ids=["even", "skewed"])
@pytest.mark.parametrize("lost", [0.1, 0.3])
def test_intervals_of_graded_scores_of_which_few_change_hold_the_truth(
    number: int, sizes: tuple[float, ...], lost: float
) -> None:
    assert score_coverage(number, lost, 0.0, sizes, repeats=500) >= 0.95 - 3 * 0.0098


def test_intervals_over_several_tasks_hold_the_truth() -> None:
    clock, inside = np.random.default_rng(0), np.zeros(2)
    for index in range(500):
        times = [pairs(simulated_logs(clock, 8, noise=noise)) for noise in (0.01, 0.05, 0.1)]
        draws = (clock.choice([-1.0, 0.0, 1.0], 25, p=[lost, 0.9 - lost, 0.1]) for lost in (0.0, 0.1, 0.3))
        scores = [pairs(draw, label=f"{index} {task}") for task, draw in enumerate(draws)]
        speed, score = speed_effect(times), score_effect(scores)
        inside += [speed.low <= 0 <= speed.high, score.low <= -0.1 / 3 <= score.high]
    assert np.all(inside / 500 >= 0.95 - 3 * 0.0098)


def test_the_same_seed_gives_the_same_bench() -> None:
    assert str(simulate_bench(repeats=5, pairs=10)) == str(simulate_bench(repeats=5, pairs=10))


def test_real_clocks_run() -> None:
    found = run_bench(repeats=2, pairs=10)
    assert found.run_s > 0 and 0 <= found.false_alarm_rate <= 1 and 0 <= found.power <= 1


def test_the_bench_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["real", "4"]) == 0
    assert "false alarms" in capsys.readouterr().out
