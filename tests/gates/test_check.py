"""The gate is proven by seeded regressions: each is caught and called by its name, and clean re-runs raise no alarm."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from harness.errors import InputError
from harness.gates.baseline import Baseline, as_text, digest, read_baseline, write_baseline
from harness.gates.check import Report, check
from harness.gates.tolerance import Tolerance, parse_tolerance
from harness.storage.record import Record
from harness.storage.store import Manifest, RunStore
from tests.command import run
from tests.recorded import invented, save

TASKS = ("needle", "longbench/trec_e")
SPEEDUP = {"full": 1.0, "slim": 1.5, "lazyllm": 1.2, "full#aa": 1.0}
KEPT = {"full": [1000] * 4, "slim": [1000, 800, 400, 200], "lazyllm": [1000, 900, 700, 500], "full#aa": [1000] * 4}
SAMPLES = 40
MACHINE = {"cpu": {"model": "A", "cores": 2, "usable": 2}, "cuda": None, "python": "3.11", "packages": {"torch": "2"}}


def manifest(**changes: Any) -> Manifest:
    facts = {"weights_hash": "w", "dtype": "float32", "attention": "sdpa"}
    values: dict[str, Any] = {"run_hash": "r", "model": "smollm2", "device": "cpu", "methods": [], "tasks": []}
    values |= {"facts": facts, "environments": [MACHINE], "updated": "2026-01-02T03:04:05+00:00", "status": "complete"}
    return Manifest(**(values | changes))


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def clocks(seed: int, samples: int, methods: tuple[str, ...], noise: float, machine: float) -> np.ndarray[Any, Any]:
    """Seconds [samples, methods]: lognormal noise, a drift of 20 %, 3 % of the runs interrupted, order A B B A."""
    clock = np.random.default_rng(seed)
    size = (samples, len(methods))
    order = np.arange(samples * len(methods)).reshape(size)
    order[1::2] = order[1::2, ::-1]
    drift = 1 + 0.2 * order / order.max()
    interrupted = np.where(clock.random(size) < 0.03, clock.uniform(1.2, 3.0, size), 1.0)
    return np.asarray(np.exp(clock.normal(0, noise, size)) * drift * interrupted * machine)


def rerun(
    seed: int = 0,
    *,
    samples: int = SAMPLES,
    machine: float = 1.0,
    noise: float = 0.03,
    slower: float = 1.0,
    kept: float = 1.0,
    off_by_one: bool = False,
    template: str = "",
    wrong: int = 0,
    moved: int = 0,
    flips: float = 0.0,
    methods: tuple[str, ...] = ("full", "slim", "lazyllm"),
) -> list[Record]:
    """Records of one run on synthetic clocks; the regressions are slim's.

    Args:
        seed: of the clocks.
        samples: a task.
        machine: how much slower everything is.
        noise: of one run.
        slower: slim alone.
        kept: slim alone, share of its tokens.
        off_by_one: the scorer compares with the next sample's answer.
        template: put before every prompt.
        wrong: slim's first answers are wrong.
        moved: so many of slim's samples keep other tokens in layer 2, as many as before.
        flips: share of answers of every method that change by chance, as in bfloat16.
        methods: in the order of the run.
    """  # fmt: skip
    found, chance = [], np.random.default_rng(seed + 10_000)
    for task_number, task in enumerate(TASKS):
        seconds = clocks(seed * 10 + task_number, samples, methods, noise, machine)
        for sample in range(samples):
            for column, method in enumerate(methods):
                number = sample if chance.random() >= flips and not (method == "slim" and sample < wrong) else -1
                own = seconds[sample, column] / SPEEDUP[method] * (slower if method == "slim" else 1)
                layers = [int(n * (kept if method == "slim" else 1)) for n in KEPT[method]]
                expected = sample + off_by_one
                one = record(method, task, sample, template, number, expected, own * (1 + sample / 9), layers)
                found.append(with_spans(one, method == "slim" and sample < moved))
    return found


def with_spans(one: Record, moved: bool) -> Record:
    """The record with the tokens of each layer: the first of the prompt; if moved, in layer 2 those from 1 on."""
    spans: list[list[list[float]] | None] = [[[0, count]] for count in one.tokens_kept]
    spans[2] = [[1, 1 + one.tokens_kept[2]]] if moved else spans[2]
    return one.model_copy(update={"extra": {"kept_spans": spans}})


def record(
    method: str, task: str, sample: int, template: str, said: int, expected: int, seconds: float, kept: list[int]
) -> Record:
    # Every fifth sample is beyond the model.
    answer = "nothing" if sample % 5 == 4 else str(said)
    return invented(
        cell=f"{method} {task}", method=method, task=task, sample=f"{sample:03}",
        prompt_hash=sha(f"{template}{task}{sample}"),
        prompt_tokens=1000, new_tokens=8, prediction=answer, score=float(answer == str(expected)), metric="exact_match",
        answers=[str(expected)], ttft_s=seconds, tpot_s=seconds / 30, e2e_s=1.2 * seconds, tokens_requested=kept,
        tokens_kept=kept,
    )  # fmt: skip


def digested(records: list[Record], **changes: Any) -> Baseline:
    return digest(pd.DataFrame([one.model_dump() for one in records]), manifest(**changes), "base")


@pytest.fixture(scope="module")
def base() -> Baseline:
    return digested(rerun())


def violated(report: Report) -> set[tuple[str, str]]:
    return {(result.gate, result.method) for result in report.of("violated")}


BFLOAT16: dict[str, Any] = {"facts": {"weights_hash": "w", "dtype": "bfloat16"}}


# Clean re-runs


@pytest.mark.slow
def test_fifty_clean_reruns_raise_no_alarm(base: Baseline) -> None:
    undecided = 0
    for seed in range(1, 51):
        report = check(base, digested(rerun(seed, machine=2.0 if seed % 2 else 1.0)))
        assert not report.of("violated"), report.lines()
        undecided += len(report.of("undecided"))
    # Twelve gates of speed a run: for most of them 40 samples are enough, so silence is not for want of samples.
    assert undecided < 0.25 * 50 * 12


@pytest.mark.slow
def test_fifty_noisy_short_reruns_with_answers_that_flip_raise_no_alarm() -> None:
    before = digested(rerun(flips=0.05, samples=8), **BFLOAT16)
    for seed in range(1, 51):
        report = check(before, digested(rerun(seed, flips=0.05, samples=8, noise=0.1, machine=2.0), **BFLOAT16))
        assert not report.of("violated"), report.lines()


def test_a_run_passes_the_baseline_made_of_it(base: Baseline) -> None:
    report = check(base, base, Tolerance(same_device=True))
    assert report.exit_code() == 0 and report.summary().startswith("check passed: 0 violated, 0 undecided, ")
    assert {one.outcome for one in report.results} == {"passed"}


# Seeded regressions


def test_thirty_percent_fewer_tokens_are_named_before_any_score(base: Baseline) -> None:
    report = check(base, digested(rerun(1, kept=0.7)))
    assert violated(report) == {("kept set", "slim")} and report.exit_code() == 1
    first = report.lines()[0]
    assert first.startswith("REGRESSION: slim x longbench/trec_e: kept set changed: 40 of 40 samples: 96000 -> 67200")
    assert "layer 0 1000 -> 700 on average (first: 000 at layer 0)" in first


def test_other_tokens_of_the_same_number_are_named_with_sample_and_layer(base: Baseline) -> None:
    report = check(base, digested(rerun(1, moved=1)))
    assert violated(report) == {("kept set", "slim")}
    assert report.lines()[0] == (
        "REGRESSION: slim x longbench/trec_e: kept set changed: 1 of 40 samples: as many tokens, but other ones "
        "(first: 000 at layer 2)"
    )


def test_on_another_machine_a_few_other_tokens_are_rounding_and_many_are_not(base: Baseline) -> None:
    other = {"environments": [MACHINE | {"cpu": {"model": "B", "cores": 2, "usable": 2}}]}
    torch = {"environments": [MACHINE | {"packages": {"torch": "3"}}]}
    for elsewhere in (other, torch):
        few = check(base, digested(rerun(1, moved=10, wrong=10), **elsewhere))
        assert not {gate for gate, _ in violated(few)} & {"kept set", "answers"}
        assert {one.gate for one in few.of("undecided")} >= {"kept set", "answers"}
        assert any("25% of a cell's samples" in line for line in few.lines())
        many = check(base, digested(rerun(1, moved=11), **elsewhere))
        assert violated(many) == {("kept set", "slim")}
    assert violated(check(base, digested(rerun(1, kept=0.999), **other))) == {("kept set", "slim")}


def test_where_answers_cannot_be_compared_tokens_are_not_either_but_their_number_is() -> None:
    before = digested(rerun(), **BFLOAT16)
    assert not violated(check(before, digested(rerun(1, moved=40), **BFLOAT16)))
    assert ("kept set", "slim") in violated(check(before, digested(rerun(1, kept=0.7), **BFLOAT16)))


def test_a_baseline_of_version_1_is_read_and_compares_numbers_alone(tmp_path: Path) -> None:
    text = re.sub(r'"tokens": "[^"]*", |, "tokens": "[^"]*"', "", as_text(digested(rerun())))
    assert '"tokens"' not in text
    (tmp_path / "old.json").write_text(text.replace('"version": 2', '"version": 1'))
    old = read_baseline(tmp_path / "old.json")
    report = check(old, digested(rerun(1, moved=40)))
    assert not violated(report) and any("version 1" in note and "record it again" in note for note in report.notes)
    assert violated(check(old, digested(rerun(1, kept=0.7)))) == {("kept set", "slim")}


def test_a_scorer_off_by_one_is_told_from_worse_answers(base: Baseline) -> None:
    report = check(base, digested(rerun(1, off_by_one=True)))
    methods = ("full", "slim", "lazyllm")
    assert violated(report) == {(gate, method) for gate in ("scorer", "score") for method in methods}
    assert "scorer changed: 32 of 40 samples: same answers, other scores" in report.lines()[0]


@pytest.mark.parametrize("seed", range(1, 11))
def test_ten_percent_slower_is_caught_in_the_method_alone(base: Baseline, seed: int) -> None:
    report = check(base, digested(rerun(seed, slower=1.1, machine=1.7)))
    assert violated(report) == {(speed, "slim") for speed in ("ttft", "tpot", "e2e")}
    line = report.lines()[0]
    assert "ttft speed-up over full 1.488 -> 1.3" in line and "bound x0.952" in line and "interval" in line


def test_a_prompt_template_change_is_named_first(base: Baseline) -> None:
    report = check(base, digested(rerun(1, template="Please. ")))
    assert {gate for gate, _ in violated(report)} == {"prompt"} and len(report.of("violated")) == 6
    assert "prompt changed: 40 of 40 samples (first: 000)" in report.lines()[0]
    assert any("0 of the 40 samples that both have" in line and "not paired" in line for line in report.lines())
    assert all(one.paired is False for one in report.results if one.gate in ("score", "ttft"))


def test_wrong_answers_are_changed_answers_and_lower_scores(base: Baseline) -> None:
    report = check(base, digested(rerun(1, wrong=12)))
    assert violated(report) == {("answers", "slim"), ("score", "slim")}
    assert any("score 80.0 -> 55.0 points, change -25.0" in line for line in report.lines())


def test_in_bfloat16_and_on_another_device_answers_are_left_to_the_score(base: Baseline) -> None:
    before, after = digested(rerun(), **BFLOAT16), digested(rerun(1, wrong=1), **BFLOAT16)
    report = check(before, after)
    assert not violated(report) and any(
        "answers and kept tokens are not compared exactly" in line for line in report.lines()
    )
    assert not violated(check(base, digested(rerun(1, wrong=1), device="cuda")))
    assert violated(check(base, digested(rerun(1, wrong=1)))) == {("answers", "slim")}


def test_a_small_slowdown_within_the_bound_passes(base: Baseline) -> None:
    assert check(base, digested(rerun(1, slower=1.015))).exit_code() == 0


# What cannot be decided


def test_too_few_samples_are_undecided_and_say_how_many_are_needed() -> None:
    report = check(digested(rerun(samples=5)), digested(rerun(1, samples=5, wrong=1)))
    score = next(one for one in report.of("undecided") if one.gate == "score")
    assert score.needed is not None and score.needed > 5
    assert f"undecided, 5 of {score.needed} needed" in str(score)
    speed = next(one for one in report.of("undecided") if one.gate == "ttft")
    assert speed.n == 5 and speed.needed is not None and speed.needed > 5


def test_undecided_gates_follow_the_choice() -> None:
    report = check(digested(rerun(samples=4)), digested(rerun(1, samples=4)))
    assert (report.exit_code(), report.exit_code("fail"), report.exit_code("pass")) == (1, 1, 0)
    assert report.summary().startswith("check UNDECIDED: 0 violated, 12 undecided (which fails it; --undecided pass")
    assert report.summary("pass").startswith("check passed: 0 violated, 12 undecided (let through)")


def test_two_of_six_samples_are_no_pass_however_well_they_did() -> None:
    whole = digested(rerun(samples=6))
    report = check(whole, digested([one for one in rerun(samples=6) if one.sample in ("000", "001")]))
    missing = [one for one in report.of("undecided") if one.gate == "missing"]
    assert len(missing) == 6 and not report.of("violated") and report.exit_code() == 1
    assert str(missing[0]).endswith("missing: 4 of the baseline's 6 samples (first: 002)")
    assert "check UNDECIDED" in report.lines()[-1]


def test_samples_that_lost_their_score_are_missing() -> None:
    silent = [r.model_copy(update={"score": None}) if r.sample == "003" else r for r in rerun(samples=6)]
    report = check(digested(rerun(samples=6), **BFLOAT16), digested(silent, **BFLOAT16))
    assert {str(one.text) for one in report.of("undecided") if one.gate == "missing"} == {
        "missing: 1 of the baseline's 6 samples (first: 003)"
    }


@pytest.mark.parametrize(("samples", "outcome"), [(5, "undecided"), (8, "violated")])
def test_a_total_loss_is_called_as_soon_as_the_exact_test_can(samples: int, outcome: str) -> None:
    right, wrong = (
        [r.model_copy(update={"score": score, "prediction": str(score)}) for r in rerun(samples=samples)]
        for score in (1.0, 0.0)
    )
    report = check(digested(right, **BFLOAT16), digested(wrong, **BFLOAT16))
    score = next(one for one in report.results if one.gate == "score")
    # Six gates share 5 %, and eight losses are the fewest with p = 2^(1-8) below a sixth of that.
    assert score.outcome == outcome and score.needed == 8
    assert ("undecided, 5 of 8 needed" in score.text) == (samples == 5)


def test_fewer_than_six_pairs_of_times_are_undecided_however_alike() -> None:
    report = check(digested(rerun(samples=5, noise=1e-6)), digested(rerun(1, samples=5, noise=1e-6, slower=2.0)))
    assert {one.outcome for one in report.results if one.gate == "ttft"} == {"undecided"}


def test_one_pair_has_no_interval_and_needs_at_least_six() -> None:
    report = check(digested(rerun(samples=1)), digested(rerun(1, samples=1)))
    line = str(next(one for one in report.results if one.gate == "ttft"))
    assert "1 of at least 6 needed" in line and "no interval" in line and "nan" not in line


def test_heads_that_keep_different_numbers_have_a_baseline(tmp_path: Path) -> None:
    uneven = [one.model_copy(update={"tokens_kept": [1000, 800.375, 400, 200]}) for one in rerun(samples=6)]
    (tmp_path / "base.json").write_text(as_text(digested(uneven)))
    known = read_baseline(tmp_path / "base.json")
    assert known.cells["slim"]["needle"].samples["000"].kept == 2400.38
    assert not check(known, digested(uneven)).of("violated")
    assert ("kept set", "slim") in violated(check(known, digested(rerun(samples=6))))


def batched(records: list[Record], size: int) -> list[Record]:
    """The same, decoded `size` at a time: the times of a batch are those of its first request."""
    first: dict[tuple[str, str, int], Record] = {}
    found = []
    for one in records:
        lead = first.setdefault((one.method, one.task, int(one.sample) // size), one)
        times = {name: getattr(lead, name) for name in ("ttft_s", "tpot_s", "e2e_s")}
        found.append(one.model_copy(update=times | {"batch": size, "batch_tokens_per_s": 1 / float(lead.tpot_s or 1)}))
    return found


@pytest.mark.parametrize("template", ["", "Please. "])
def test_a_batch_is_one_reading_of_time_whatever_its_answers(template: str) -> None:
    """Paired, and, where prompts are other ones, not."""
    few, many = (
        check(digested(batched(rerun(), size)), digested(batched(rerun(1, slower=2.0, template=template), size)))
        for size in (8, 4)
    )
    times = {one.gate: one for one in few.results if one.method == "slim"}
    assert {times[name].n for name in ("ttft", "tpot", "e2e")} == {5} and times["score"].n == 40
    assert {times[name].outcome for name in ("ttft", "tpot", "e2e")} == {"undecided"}
    assert {(name, "slim") for name in ("ttft", "tpot", "e2e")} <= violated(many)


def test_a_baseline_says_which_samples_were_timed_together_and_nothing_of_single_ones(tmp_path: Path) -> None:
    single, together = digested(rerun()), digested(batched(rerun(), 8))
    assert '"timed"' not in as_text(single)
    (tmp_path / "base.json").write_text(as_text(together))
    assert (known := read_baseline(tmp_path / "base.json")) == together
    assert known.cells["slim"]["needle"].ratios["ttft"].n == 5
    # What one of the two runs asked together is one reading.
    found = next(one for one in check(single, together).results if (one.gate, one.method) == ("ttft", "slim"))
    assert found.n == 5


def test_the_samples_said_to_be_needed_decide() -> None:
    few = check(digested(rerun(samples=12)), digested(rerun(1, samples=12)))
    needed = int(np.median([one.needed or 0 for one in few.of("undecided")]))
    many = check(digested(rerun(samples=2 * needed)), digested(rerun(1, samples=2 * needed)))
    assert 12 < needed < 150 and 4 * len(many.of("undecided")) < len(few.of("undecided"))


def test_a_cell_that_is_gone_is_undecided_and_a_new_one_is_noted(base: Baseline) -> None:
    fewer = digested(rerun(1, methods=("full", "slim")))
    assert {one.method for one in check(base, fewer).of("undecided") if one.gate == "missing"} == {"lazyllm"}
    assert any("not in the baseline: lazyllm" in line for line in check(fewer, base).lines())


def test_fewer_samples_than_the_baseline_are_paired_where_they_match(base: Baseline) -> None:
    report = check(base, digested(rerun(1, samples=30)))
    assert not violated(report) and any("10 of the baseline's 40 samples" in line for line in report.lines())


def test_slower_by_less_than_the_noise_floor_is_no_regression() -> None:
    methods = ("full", "slim", "full#aa")
    before = digested(rerun(methods=methods))
    assert "full#aa" not in before.cells and 1 < before.noise_floor["needle"]["ttft"] < 1.1
    loud = before.model_copy(update={"noise_floor": {"all": {"ttft": 1.3, "tpot": 1.3, "e2e": 1.3}}})
    after = digested(rerun(1, slower=1.1, methods=methods))
    assert violated(check(before, after)) == {(speed, "slim") for speed in ("ttft", "tpot", "e2e")}
    assert not violated(check(loud, after))
    assert any("differs from itself by as much" in line for line in check(loud, after).lines())


# Seconds


def test_seconds_count_only_where_asked_and_on_the_same_machine(base: Baseline) -> None:
    slow = digested(rerun(1, machine=2.0))
    assert check(base, slow).exit_code() == 0
    report = check(base, slow, Tolerance(same_device=True))
    assert violated(report) == {("full ttft", "full"), ("full tpot", "full"), ("full e2e", "full")}
    other = MACHINE | {"cpu": {"model": "B", "cores": 2, "usable": 2}}
    moved = digested(rerun(1), environments=[MACHINE, other])
    with pytest.raises(InputError, match="same kind of machine"):
        check(base, digested(rerun(1), environments=[other]), Tolerance(same_device=True))
    with pytest.raises(InputError, match="same kind of machine"):
        check(moved, moved, Tolerance(same_device=True))


# Tolerance


def test_bounds() -> None:
    assert parse_tolerance("median:2.5pt", "ratio:10%", True) == Tolerance("median", 2.5, 10.0, True)
    assert parse_tolerance() == Tolerance()


@pytest.mark.parametrize("accuracy", ["2pt", "mean:2", "mean:2%", "mean:0pt", "mean:-1pt", "max:2pt", "mean:101pt", ""])
def test_what_is_no_bound_of_accuracy_is_refused_in_one_line(accuracy: str) -> None:
    with pytest.raises(InputError, match="--accuracy") as error:
        parse_tolerance(accuracy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("speed", ["5%", "ratio:5", "ratio:0%", "median:5%", "ratio:nan%", "ratio:5pt", "ratio:5000%"])
def test_what_is_no_bound_of_speed_is_refused_in_one_line(speed: str) -> None:
    with pytest.raises(InputError, match="--speed"):
        parse_tolerance(speed=speed)


def test_the_median_over_tasks_lets_one_task_fall_and_not_all() -> None:
    old, new = with_third(rerun()), with_third(rerun(1))
    one = [r.model_copy(update=WRONG) if r.task == "needle" else r for r in new]
    before, fallen, all_fallen = (
        digested(records, **BFLOAT16) for records in (old, one, [r.model_copy(update=WRONG) for r in new])
    )
    assert ("score", "slim") in violated(check(before, fallen))
    assert not violated(check(before, fallen, Tolerance(over="median")))
    report = check(before, all_fallen, Tolerance(over="median"))
    assert ("score", "slim") in violated(report) and "slim x median of 3 tasks" in "\n".join(report.lines())


WRONG = {"score": 0.0, "prediction": "?"}


def with_third(records: list[Record]) -> list[Record]:
    return records + [r.model_copy(update={"task": "third"}) for r in records if r.task == "needle"]


# Unusable input


def test_runs_that_cannot_be_compared_are_refused(base: Baseline) -> None:
    with pytest.raises(InputError, match="other weights"):
        check(base, digested(rerun(1), facts={"weights_hash": "v"}))
    renamed = [one.model_copy(update={"task": "other"}) for one in rerun(samples=2) if one.task == "needle"]
    with pytest.raises(InputError, match="no method and task in common"):
        check(base, digested(renamed))
    with pytest.raises(InputError, match="no records"):
        digest(pd.DataFrame(), manifest())


def test_random_weights_have_no_scores_and_their_speed_is_still_gated() -> None:
    blank = {"prediction": None, "score": None}
    before, after = ([one.model_copy(update=blank) for one in run] for run in (rerun(), rerun(1, slower=1.1)))
    report = check(digested(before), digested(after))
    assert violated(report) == {(speed, "slim") for speed in ("ttft", "tpot", "e2e")}
    assert not {one.gate for one in report.results} & {"score", "answers", "scorer"}


def test_samples_of_one_context_count_once() -> None:
    def shared(records: list[Record]) -> Baseline:
        return digested([r.model_copy(update={"extra": {"context_hash": f"c{int(r.sample) // 10}"}}) for r in records])

    report = check(shared(rerun()), shared(rerun(1, wrong=10)))
    assert violated(report) == {("answers", "slim")}


# The file


def test_a_baseline_is_small_sorted_and_comes_back_as_it_was(tmp_path: Path, base: Baseline) -> None:
    text = as_text(base)
    assert text == as_text(digested(list(reversed(rerun()))))
    (tmp_path / "b.json").write_text(text, encoding="utf-8")
    assert read_baseline(tmp_path / "b.json") == base
    assert max(map(len, text.splitlines())) < 300 and len(text.splitlines()) < 6 * SAMPLES + 100
    full, *_, slim = (line for line in text.splitlines() if '"007"' in line)
    assert all(f'"{name}"' in slim for name in ("answer", "prompt", "kept", "kept_hash", "tokens", "score", "ratio"))
    assert '"seconds"' in full and '"seconds"' not in slim and "{}" not in text


def test_what_is_no_baseline_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    with pytest.raises(InputError, match="cannot read"):
        read_baseline(path)
    for text, message in [("{", "is no baseline"), ("[]", "version None"), ('{"version": 9}', "version 9")]:
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_baseline(path)
    path.write_text(as_text(digested(rerun(samples=1))).replace('"ttft": 1.', '"ttft": -1.'))
    with pytest.raises(InputError, match="greater than 0"):
        read_baseline(path)
    path.write_text('{"version": 1, "name": "x"}')
    with pytest.raises(InputError, match="provenance"):
        read_baseline(path)


# The command line


def saved(folder: Path, records: list[Record], **changes: Any) -> Path:
    return save(folder, manifest(**(changes | {"environments": []})), records, MACHINE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    made = {"old": rerun(samples=6), "new": rerun(1, samples=6), "bad": rerun(1, samples=6, kept=0.7)}
    found = {name: saved(folder / name, records) for name, records in made.items()}
    return found | {"baseline": write_baseline(found["old"], "cpu", folder / "baselines")}


def test_baseline_and_check_by_command(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert run("baseline", runs["old"], "--name", "cpu", "--dir", tmp_path) == 0
    path = tmp_path / "cpu.json"
    assert f"wrote {path}" in capsys.readouterr().out and str(tmp_path) not in path.read_text()
    assert run("check", runs["new"], "--baseline", path, "--undecided", "pass") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("check passed: 0 violated")
    assert run("check", runs["new"], "--baseline", path) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("check UNDECIDED: 0 violated")
    assert run("check", runs["bad"], "--baseline", path) == 1
    assert "kept set changed" in capsys.readouterr().out


def test_unusable_input_is_one_line_and_exit_code_two(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = ("check", runs["new"], "--baseline", runs["baseline"])
    stopped = tmp_path / "stopped"
    with RunStore(stopped, manifest()) as store:
        store.append(rerun(samples=1)[0])
    for arguments in [
        ("check", tmp_path, "--baseline", runs["baseline"]),
        ("check", runs["new"], "--baseline", tmp_path / "none.json"),
        ("check", stopped, "--baseline", runs["baseline"]),
        ("baseline", stopped, "--name", "x", "--dir", tmp_path),
        ("baseline", runs["old"], "--name", "../x", "--dir", tmp_path),
        (*good, "--speed", "5"), (*good, "--accuracy", "2"), (*good, "--undecided", "maybe"),
        (*good, "--json", tmp_path / "no" / "x.json"), (*good, "--junit", tmp_path / "no" / "x.xml"),
    ]:  # fmt: skip
        assert run(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("harness: ") and error.count("\n") == 1, error


def test_outputs_for_machines(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    junit = tmp_path / "junit.xml"
    files = ("--json", "-", "--junit", junit)
    assert run("check", runs["bad"], "--baseline", runs["baseline"], "--undecided", "pass", *files) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["exit_code"] == 1 and printed["counts"]["violated"] == 2
    finding = next(one for one in printed["findings"] if one["outcome"] == "violated")
    assert (finding["gate"], finding["baseline"], finding["now"]) == ("kept set", 14400, 10080)
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert suite is not None and suite.get("failures") == "2" and int(suite.get("tests", 0)) == len(printed["findings"])
    assert len(suite.findall("testcase/failure")) == 2
    summary = (tmp_path / "summary.md").read_text()
    assert "kept set changed" in summary and summary.startswith("### harness check")
    arguments = ("--baseline", runs["baseline"], "--undecided", "pass", "--json", tmp_path / "x.json")
    assert run("check", runs["new"], *arguments) == 0
    assert json.loads((tmp_path / "x.json").read_text())["exit_code"] == 0
    assert (tmp_path / "summary.md").read_text().count("### harness check") == 2


def test_what_is_not_known_is_null_and_not_nan() -> None:
    from harness.gates.output import as_json

    report = check(digested(rerun(samples=1)), digested(rerun(1, samples=1)))
    assert "NaN" not in as_json(report, "pass") and all(
        not (isinstance(value, float) and math.isnan(value))
        for result in report.results
        for value in dataclasses.astuple(result)
    )


# Joules and tails: gates where they are asked for


def costly(seed: int = 0, *, joules: float = 1.0, slow_gaps: float = 1.0, gaps: int = 40) -> list[Record]:
    """A run on a GPU that counts; slim takes `joules` times as many, and an eighth of its gaps `slow_gaps` times."""
    clock = np.random.default_rng(seed)
    found = []
    for one in rerun(seed):
        slim = one.method == "slim"
        spent = 300 / SPEEDUP[one.method] * float(clock.lognormal(0, 0.03)) * (joules if slim else 1)
        noisy = 0.02 * clock.lognormal(0, 0.03, gaps)
        noisy[::8] *= 2 * (slow_gaps if slim else 1)
        found.append(one.model_copy(update={"energy_j": spent, "token_s": noisy.tolist(), "new_tokens": gaps + 1}))
    return found


@pytest.fixture(scope="module")
def counted() -> Baseline:
    return digested(costly())


def test_joules_and_tails_are_gates_where_they_are_asked_for(counted: Baseline) -> None:
    both = parse_tolerance(energy="ratio:10%", tail="ratio:25%")
    clean = check(counted, digested(costly(1)), both)
    assert not clean.of("violated") and {"energy", "itl_p90"} <= {result.gate for result in clean.of("passed")}
    hungry = check(counted, digested(costly(1, joules=1.2)), both)
    assert violated(hungry) == {("energy", "slim")} and "energy of full over its own" in hungry.lines()[0]
    stalling = check(counted, digested(costly(1, slow_gaps=1.5)), both)
    assert violated(stalling) == {("itl_p90", "slim")}
    # A bound that is not asked for is not held.
    assert not check(counted, digested(costly(1, joules=1.2, slow_gaps=1.5))).of("violated")


def test_nothing_changes_where_they_are_not_asked_for(counted: Baseline) -> None:
    gates = {result.gate for result in check(counted, digested(costly(1))).results}
    assert gates == {"prompt", "kept set", "answers", "scorer", "score", "ttft", "tpot", "e2e"}


def test_a_run_without_joules_or_with_short_answers_has_not_passed(base: Baseline, counted: Baseline) -> None:
    for tolerance, gate in ((Tolerance(energy=10), "energy"), (Tolerance(tail=10), "tail")):
        neither = [one for one in check(base, digested(rerun(1)), tolerance).results if one.gate == gate]
        assert len(neither) == 4 and {one.outcome for one in neither} == {"undecided"}
    one_side = check(base, digested(costly(1)), Tolerance(energy=10)).results
    assert {one.outcome for one in one_side if one.gate == "energy"} == {"undecided"}
    short = check(digested(costly(gaps=28)), digested(costly(1, gaps=28)), Tolerance(tail=10)).results
    assert {one.outcome for one in short if one.gate == "tail"} == {"undecided"}


def test_a_baseline_has_them_as_ratios(counted: Baseline) -> None:
    sample = counted.cells["slim"]["needle"].samples["000"]
    assert sample.ratio.keys() == {"ttft", "tpot", "e2e", "energy", "itl_p90"} and not sample.seconds
    assert sample.ratio["energy"] == pytest.approx(SPEEDUP["slim"], rel=0.2)
    assert counted.cells["full"]["needle"].samples["000"].seconds.keys() == {"ttft", "tpot", "e2e"}
    assert counted.cells["slim"]["needle"].ratios["energy"].ratio == pytest.approx(SPEEDUP["slim"], rel=0.02)


@pytest.mark.parametrize("option", ["energy", "tail"])
def test_a_bound_that_cannot_be_read_names_its_option(option: str) -> None:
    bound: dict[str, Any] = {option: "5%"}
    with pytest.raises(InputError, match=f"--{option} '5%': expected ratio:5%"):
        parse_tolerance(**bound)
