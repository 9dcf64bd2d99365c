"""Requests that arrived at a rate: their table, their picture, goodput, and what they have no part in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.report.arrivals import arrivals, arrivals_figure
from harness.report.build import figures
from harness.report.caveats import caveats
from harness.report.goodput import goodput
from harness.report.recorded import Recorded, read
from harness.report.render import render
from harness.report.slo import parse_slo
from harness.report.table import Table
from harness.report.tables import tables
from harness.statistics.arrivals import requests
from harness.storage.record import Record
from tests.report.test_report import record, write

RATES = (1.0, 4.0)


def visit(method: str, rate: float | None, number: int, waits: float, **changes: Any) -> Record:
    """One a second; waits, 0.5 seconds to the first token, 3 tokens 0.1 and 0.3 seconds apart."""
    start = number + waits
    arrival = {
        "rate": rate, "most": 2, "arrival_s": float(number), "start_s": start, "first_token_s": start + 0.5,
        "last_token_s": start + 0.9, "batch_sizes": [1, 2], "replayed": method == "full", "captures": 0,
    }  # fmt: skip
    times = {"ttft_s": 0.5, "e2e_s": 0.9, "token_s": [0.1, 0.3], "tpot_s": 0.2, "new_tokens": 3}
    return record(method, f"speed:rate={rate or 'inf'}:most=2", number, arrival=arrival, **(times | changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """At twice the seconds that `lazyllm` waits, `full` waits; 30 requests at each rate."""
    records = [
        visit(method, rate, number, waits * rate * number / 10)
        for rate in RATES
        for number in range(30)
        for method, waits in (("full", 2.0), ("lazyllm", 1.0))
    ]
    folder = tmp_path_factory.mktemp("load") / "run"
    return read(write(folder, [*records, record("full", "needle", 0), record("lazyllm", "needle", 0)], tasks=[]))


def one(table: Table, method: str, rate: float, column: str) -> Any:
    (row,) = [row for row in table.rows if (row[1].text, row[0].text) == (method, f"speed:rate={rate}:most=2")]
    return row[table.head.index(column)].value


def test_percentiles_with_the_queue_and_without(run: Recorded) -> None:
    table = arrivals(run.records, run.methods)
    assert [row[1].text for row in table.rows] == ["full", "lazyllm"] * 2
    waits = 2.0 * 4.0 * np.arange(30) / 10
    for percent in (50, 90):
        assert one(table, "full", 4.0, f"TTFT p{percent}") == pytest.approx(np.percentile(waits + 0.5, percent))
        assert one(table, "full", 4.0, f"service TTFT p{percent}") == pytest.approx(0.5)
        assert one(table, "full", 4.0, f"TPOT p{percent}") == pytest.approx(0.2)
    assert one(table, "full", 4.0, "TTFT p99") is None
    lasts = 29 + waits[-1] + 0.9
    assert one(table, "full", 4.0, "requests/s") == pytest.approx(30 / lasts)
    assert one(table, "full", 4.0, "tokens/s") == pytest.approx(90 / lasts)
    assert one(table, "full", 4.0, "rate") == 4.0 and one(table, "lazyllm", 1.0, "n") == 30
    # Half of the tokens came alone: of three steps two brought one token, and one brought two.
    assert one(table, "full", 1.0, "batch") == pytest.approx(60 / (30 + 30 / 2))
    steps = table.head.index("steps")
    assert {row[steps].text for row in table.rows if row[1].text == "full"} == {"replayed"}
    assert {row[steps].text for row in table.rows if row[1].text == "lazyllm"} == {"launched"}


def test_goodput_is_of_clients_who_wait(run: Recorded) -> None:
    table = goodput(run, parse_slo("ttft=2.5s,tpot=250ms"))
    assert table.title == "Goodput, batch 1, no queue; under load"
    # 0.8 seconds more for each: the first three, and those who wait no more than 2 seconds at a quarter of the rate.
    assert one(table, "full", 4.0, "within") == 3 and one(table, "lazyllm", 1.0, "within") == 21
    lasts = 29 + 0.8 * 29 + 0.9
    assert one(table, "full", 4.0, "goodput, requests/s") == pytest.approx(3 / lasts)
    assert one(table, "full", 4.0, "all, requests/s") == pytest.approx(30 / lasts)
    assert one(goodput(run, parse_slo("tpot=150ms")), "full", 1.0, "within") == 0
    assert one(goodput(run, parse_slo("e2e=1.4s")), "full", 1.0, "within") == 3


def test_a_load_is_one_pair_and_what_lies_between_its_tokens_is_none(run: Recorded) -> None:
    effects = run.comparison.effects["speed:rate=4.0:most=2", "lazyllm"]
    assert effects["ttft_n"] == 1 and effects["tpot_n"] == effects["e2e_n"] == 0
    (told,) = [caveat for caveat in caveats(run.records) if caveat.title == "Arrived at a rate"]
    assert "speed:rate=4.0:most=2: 60 of 60 requests" in told.text and "needle" not in told.text
    summary = run.summary.set_index(["task", "method"])
    times = summary["tpot_s"].to_dict()
    assert math.isnan(times["speed:rate=4.0:most=2", "full"]) and times["needle", "full"] == 1.0


def test_a_picture_of_several_rates(run: Recorded) -> None:
    figure = arrivals_figure(run.records, run.methods)
    assert figure is not None and len(figure.axes) == 1
    (axes,) = figure.axes
    assert axes.get_title() == "speed:most=2" and "p90" in axes.get_ylabel()
    for line, waits in zip(axes.lines, (2.0, 1.0), strict=True):
        seconds = [float(np.percentile(0.5 + waits * rate * np.arange(30) / 10, 90)) for rate in RATES]
        assert np.array_equal(line.get_xdata(), RATES) and np.allclose(np.asarray(line.get_ydata()), seconds)
    both = dict(figures(run, parse_slo("ttft=2.5s")))["load"]
    assert len(both.axes) == 2 and "goodput" in both.axes[1].get_ylabel()


def test_one_rate_is_no_picture(run: Recorded) -> None:
    task = run.records["task"]
    assert arrivals_figure(run.records[task != "speed:rate=1.0:most=2"], run.methods) is None
    assert arrivals_figure(run.records[task == "needle"], run.methods) is None


def test_few_requests_have_a_median(run: Recorded) -> None:
    few = run.records[run.records["sample"].astype(int) < 7]
    figure = arrivals_figure(few, run.methods)
    assert figure is not None and "p50" in figure.axes[0].get_ylabel()


def test_all_at_once_has_no_rate_and_one_token_no_tpot(tmp_path: Path) -> None:
    records = [visit("full", None, number, 0.0, new_tokens=1, token_s=[]) for number in range(6)]
    found = read(write(tmp_path / "run", records, methods=[], tasks=[]))
    (row,) = arrivals(found.records).rows
    assert row[2].text == "inf" and requests(found.records)["tpot_s"].isna().all()
    (counted,) = goodput(found, parse_slo("tpot=1ms,ttft=1s")).rows
    assert counted[3].value == 6


def test_what_never_arrived_has_no_table(tmp_path: Path) -> None:
    run = read(write(tmp_path / "run", [record("full", "needle", 0)], methods=[], tasks=[]))
    assert "load" not in [table.name for table in tables(run)] and requests(run.records).empty


@pytest.mark.usefixtures("no_pictures")
def test_the_page_of_a_run_has_it(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [visit("full", 2.0, number, 0.0) for number in range(6)], methods=[], tasks=[])
    render(run)
    assert "## Requests arriving at a rate" in (run / "table.md").read_text()
