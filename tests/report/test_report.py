from __future__ import annotations

import itertools
import math
import random
import struct
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from harness.errors import InputError
from harness.report import formats, plots
from harness.report.markdown import markdown
from harness.report.plots import Point, pareto
from harness.report.render import compared, render
from harness.report.summary import COLUMNS, overall, summarise
from harness.statistics.noise import TWIN
from harness.storage.record import Record
from harness.storage.store import Manifest, load
from tests.recorded import invented, save

METHODS = ["full", "slim:budgets=0.5/0.25", "lazyllm"]
TASKS = ["needle", "longbench/trec_e"]


def record(method: str, task: str, sample: int, **changes: Any) -> Record:
    """`full` takes 1, 2, 3 ... seconds to its first token and 2 more to its last; others take what `changes` says."""
    values: dict[str, Any] = {
        "cell": f"{method} {task}", "method": method, "task": task, "sample": str(sample),
        "new_tokens": 3, "ttft_s": float(sample + 1), "tpot_s": 1.0, "e2e_s": float(sample + 3),
        "peak_memory_bytes": 3 << 30, "kv_bytes": 1001 + sample, "kv_bytes_host": 0, "extra_bytes": 0,
        "tokens_requested": [100, 100], "tokens_kept": [100, 100],
    }  # fmt: skip
    return invented(**(values | changes))


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {"run_hash": "h", "model": "smollm2", "device": "cpu", "methods": METHODS, "tasks": TASKS}
    return Manifest(**(values | {"status": "complete"} | changes))


def write(folder: Path, records: list[Record], **changes: Any) -> Path:
    environment = {"cpu": {"model": "Some CPU", "usable": 2}, "cuda": None, "packages": {"torch": "2.13.0"}}
    return save(folder, manifest(**changes), records, environment)


def main_records() -> list[Record]:
    """Three methods, two tasks, two samples: slim is twice as soon, lazyllm was not timed on `needle`."""
    changes: dict[str, dict[str, Any]] = {
        "full": {},
        METHODS[1]: {"ttft_s": 0.5, "e2e_s": 1.0, "score": 0.5, "tokens_kept": [100, 50]},
        "lazyllm": {"ttft_s": 0.8, "e2e_s": 1.2, "score": 0.8},
    }
    return [
        record(method, task, sample, **changes[method])
        for task, sample, method in itertools.product(TASKS, range(2), METHODS)
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write(tmp_path / "main", main_records())


def summary_of(run: Path) -> pd.DataFrame:
    return summarise(load(run), METHODS, TASKS)


def page_of(run: Path, **changes: Any) -> str:
    return markdown(manifest(**changes), summary_of(run), compared(manifest(), load(run)))


def test_summary_has_the_agreed_columns_in_the_order_of_the_run(run: Path) -> None:
    summary = summary_of(run)
    header = "method,task,n,score,ttft_s,ttft_speedup,tpot_s,e2e_s,e2e_speedup,peak_memory_bytes,kv_bytes,kept_fraction"
    header += ",tpot_mean_s,energy_n,energy_j,energy_per_token_j,energy_ratio"
    header += ",ttft_n,ttft_p50_s,ttft_p90_s,ttft_p99_s,itl_n,itl_p50_s,itl_p90_s,itl_p99_s"
    assert ",".join(summary.columns) == header
    assert list(zip(summary["task"], summary["method"], strict=True)) == list(itertools.product(TASKS, METHODS))


def test_summary_numbers(run: Path) -> None:
    full, slim, _ = summary_of(run)[:3].to_dict("records")
    assert (full["n"], full["score"], full["ttft_s"], full["ttft_speedup"]) == (2, 100.0, 1.5, 1.0)
    # Samples of full take 1 s and 2 s, slim's take 0.5 s each: the geometric mean of the ratios 2 and 4.
    assert (slim["score"], slim["ttft_speedup"], slim["e2e_speedup"]) == (50.0, 2.8284, 3.4641)
    assert (slim["kept_fraction"], slim["peak_memory_bytes"]) == (0.75, 3 << 30)


def test_speedups_pair_samples_and_not_positions(tmp_path: Path) -> None:
    records = [record("full", "needle", 0), record("full", "needle", 9), record("lazyllm", "needle", 9, ttft_s=5.0)]
    summary = summary_of(write(tmp_path, records))
    assert list(summary["ttft_speedup"]) == [1.0, 2.0]


def test_without_full_there_are_no_speedups(tmp_path: Path) -> None:
    run = write(tmp_path, [record("lazyllm", task, 0) for task in TASKS])
    summary = summary_of(run)
    assert summary["ttft_speedup"].isna().all() and summary["e2e_speedup"].isna().all()
    assert "No speed-ups" in page_of(run)
    assert ",," in render(run)[0].read_text()


def test_what_was_not_measured_is_null_and_never_zero(tmp_path: Path) -> None:
    unmeasured = dict.fromkeys(("score", "ttft_s", "tpot_s", "e2e_s", "peak_memory_bytes", "kv_bytes"))
    run = write(tmp_path, [record("full", "needle", 0), record("lazyllm", "needle", 0, **unmeasured)])
    lazy = render(run)[0].read_text().splitlines()[2]
    assert lazy == "lazyllm,needle,1,,,,,,,,,1.0,,0,,,,0,,,,0,,,"  # zeros: how many values there are
    row = next(line for line in page_of(run).splitlines() if "`lazyllm`" in line)
    assert row.split("|")[4:-2] == [" - "] * 8


def test_overall_compares_only_tasks_that_all_methods_have(run: Path) -> None:
    summary = summary_of(run)
    whole = overall(summary[~((summary["method"] == "lazyllm") & (summary["task"] == "needle"))])
    assert list(whole["tasks"]) == [1, 1, 1]
    assert list(whole["method"]) == METHODS


def test_overall_is_geometric_for_times_and_arithmetic_for_scores(tmp_path: Path) -> None:
    records = [
        record("full", task, 0, ttft_s=time, score=score)
        for task, time, score in zip(TASKS, (1.0, 4.0), (1, 0), strict=True)
    ]
    (row,) = overall(summary_of(write(tmp_path, records))).to_dict("records")
    assert math.isclose(row["ttft_s"], 2.0) and row["score"] == 50.0


def test_overall_is_null_where_one_task_is(tmp_path: Path) -> None:
    records = [record("full", "needle", 0), record("full", TASKS[1], 0, ttft_s=None, peak_memory_bytes=None)]
    (row,) = overall(summary_of(write(tmp_path, records))).to_dict("records")
    assert pd.isna(row["ttft_s"]) and pd.isna(row["peak_memory_bytes"]) and row["score"] == 100.0


def test_table_for_people(run: Path) -> None:
    page = page_of(run, environments=[{"cpu": {"model": "Some CPU", "usable": 2}}])
    assert "Model `smollm2` on Some CPU (2 cores)" in page
    row = next(line for line in page.splitlines() if "`slim" in line).split(" | ")
    assert row[:5] == ["| `needle`", "`slim:budgets=0.5/0.25`", "2", "50.0", "500 ms"]
    assert row[5] == "2.83x" and row[6:8] == ["1.00 s", "1.00 s"] and row[9] == "3.00 GiB"
    assert "## All tasks" in page and "incomplete" not in page


@pytest.mark.parametrize(
    ("changes", "words_at_the_top"),
    [
        ({"status": "incomplete", "reasons": ["interrupted"]}, "This run is incomplete: interrupted."),
        ({"status": "running"}, "This run has not ended, or was killed."),
        ({"environments": [{"a": 1}, {"a": 2}]}, "changed while this run was made"),
    ],
)
def test_table_says_what_is_wrong_with_a_run(run: Path, changes: dict[str, Any], words_at_the_top: str) -> None:
    page = page_of(run, **changes)
    assert words_at_the_top in page[: page.index("|")]


def test_random_weights_have_no_scores_and_no_plot(tmp_path: Path) -> None:
    records = [record(method, "needle", 0, score=None, prediction=None) for method in METHODS]
    run = write(tmp_path, records, latency_only=True)
    files = render(run)
    assert [file.name for file in files] == ["summary.csv", "comparison.csv", "table.md"]
    page = files[2].read_text(encoding="utf-8")
    assert "Random weights, latency only" in page and "score %" not in page


def test_a_run_without_records_renders(tmp_path: Path) -> None:
    csv, comparison, table = render(write(tmp_path, []))
    assert csv.read_text() == ",".join(COLUMNS) + "\n"
    assert comparison.read_text().startswith("method,task,n,units,") and comparison.read_text().count("\n") == 1
    assert "No records." in table.read_text(encoding="utf-8")


def test_render_writes_all_files_and_the_same_bytes_again(run: Path) -> None:
    files = render(run)
    assert [file.name for file in files] == ["summary.csv", "comparison.csv", "table.md", "accuracy_ttft.png"]
    before = [file.read_bytes() for file in files]
    width, height = struct.unpack(">II", before[3][16:24])
    assert before[3].startswith(b"\x89PNG") and width > 1000 and height > 700
    assert [file.read_bytes() for file in render(run)] == before


def long_records(count: int = 40) -> list[Record]:
    """`slim` is twice as soon and lazyllm 1 % sooner, full attention again differs by up to 4 %; slim loses half."""
    clock = random.Random(0)
    speed = {"full": 1.0, METHODS[1]: 0.5, "lazyllm": 0.99, TWIN: 0.97}

    def one(method: str, sample: int) -> Record:
        seconds = speed[method] * math.exp(clock.gauss(0, 0.02))
        right = float(method != METHODS[1] or sample % 2)
        return record(method, "needle", sample, ttft_s=seconds, tpot_s=seconds, e2e_s=seconds, score=right)

    return [one(method, sample) for sample in range(count) for method in speed]


def test_the_table_marks_what_the_tests_tell_apart_and_nothing_else(tmp_path: Path) -> None:
    page = page_of(write(tmp_path, long_records())).partition("## Compared")
    full, slim, lazy, twin = [line for line in page[0].splitlines() if line.startswith("| `needle`")]
    assert "**2.0" in slim and "**50" not in slim and "**100.0**" in full and "**100.0**" in lazy
    assert "**" not in twin and lazy.count("within noise") == 2
    slim, lazy, _ = [line for line in page[2].splitlines() if line.startswith("| `needle`")]
    assert "< 0.001 | worse | better | better | better |" in slim
    assert lazy.count("no difference (MDE") + lazy.count("undecided (MDE") + lazy.count("within noise") == 4
    assert "0 of 40 scores changed, and times may differ by TTFT" in page[2]


def test_where_no_two_methods_are_told_apart_nothing_is_bold(tmp_path: Path) -> None:
    run = write(tmp_path, [one for one in main_records() if one.task == "needle"])
    assert "**" not in page_of(run)


@pytest.mark.slow
def test_ten_thousand_records_render_in_ten_seconds(tmp_path: Path) -> None:
    methods = ["full", *(f"slim:budgets=0.{number}" for number in range(1, 10))]
    clock = random.Random(0)
    records = [
        record(method, f"task{task}", sample, score=clock.random(), ttft_s=clock.random(), e2e_s=1 + clock.random())
        for task, sample, method in itertools.product(range(20), range(50), methods)
    ]
    run = write(tmp_path, records)
    start = time.process_time()
    render(run)
    assert time.process_time() - start < 10


def test_render_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run"):
        render(tmp_path)


coordinates = st.sampled_from([0.0, 0.5, 1.0, 2.0]) | st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(coordinates, coordinates), max_size=12))
def test_pareto_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    finite = [index for index, point in enumerate(points) if all(map(math.isfinite, point))]

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one[0] <= other[0] and one[1] >= other[1] and one != other

    front = pareto(points)
    assert set(front) == {i for i in finite if not any(beats(points[j], points[i]) for j in finite)}
    assert [points[index][0] for index in front] == sorted(points[index][0] for index in front)
    assert len(front) == len(set(front))


@given(st.permutations([(1.0, 50.0), (1.0, 50.0), (2.0, 50.0), (2.0, 70.0), (math.nan, 99.0), (3.0, 70.0)]))
def test_pareto_front_depends_on_no_order(points: list[tuple[float, float]]) -> None:
    assert [points[index] for index in pareto(points)] == [(1.0, 50.0), (1.0, 50.0), (2.0, 70.0)]


def labels_of(points: list[Point]) -> list[Any]:
    figure = Figure(figsize=(7.5, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    plots._draw(axes, points)
    plots._write_labels(figure, axes, points)
    figure.draw_without_rendering()
    return [text.get_window_extent() for text in axes.texts]


@pytest.mark.parametrize("spread", [0.0, 0.001, 1.0])
def test_labels_do_not_overlap(spread: float) -> None:
    points = [Point(1 + spread * i % 3, 50 + spread * (i * 7 % 5), f"method{i} 1.5{i}x") for i in range(8)]
    boxes = labels_of(points)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_a_single_point_is_drawn() -> None:
    assert len(labels_of([Point(1.0, 100.0, "full 1.00x")])) == 1


def test_methods_go_by_their_bare_name_where_it_is_enough() -> None:
    labels = ["full", "slim:budgets=0.5:layers=3", "slim:budgets=0.25"]
    assert plots.short_names(labels) == ["full", "slim\n  budgets=0.5\n  layers=3", "slim\n  budgets=0.25"]


def test_device_is_the_gpu_where_the_run_used_it() -> None:
    environment = {"cuda": [{"name": "Some GPU"}], "cpu": {"model": "Some CPU", "usable": 4}}
    assert formats.device(manifest(device="cuda", environments=[environment])) == "Some GPU"
    assert formats.device(manifest(environments=[environment])) == "Some CPU (4 cores)"
    assert formats.device(manifest()) == "CPU"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "12.3 ms"), (0.99949, "999 ms"), (0.9996, "1.00 s"), (9.996, "10.0 s"), (75.04, "75.0 s")],
)
def test_seconds(value: float, text: str) -> None:
    assert formats.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (1023, "1.00 KiB"), (537919488, "513 MiB"), (141 << 30, "141 GiB")]
)
def test_size(value: int, text: str) -> None:
    assert formats.size(value) == text


@given(st.none() | st.just(math.nan) | st.just(pd.NA))
def test_null_is_a_dash_in_every_unit(null: Any) -> None:
    for write_value in (formats.seconds, formats.size, formats.times, formats.percent, formats.score):
        assert write_value(null) == "-"
