"""What serving benchmarks report: percentiles, mean TPOT, joules, goodput."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.errors import InputError
from harness.report.build import report
from harness.report.compare import compare_runs
from harness.report.compare import to_markdown as compared_text
from harness.report.goodput import goodput
from harness.report.json_summary import json_summary
from harness.report.recorded import Recorded, read
from harness.report.render import render
from harness.report.slo import Limit, parse_slo
from harness.report.table import Table
from harness.report.tables import decision, tables
from harness.storage.record import OUT_OF_MEMORY, Record
from tests.command import run as command
from tests.report.test_report import record, write

CLOCK = np.random.default_rng(7)


def answered(method: str, sample: int, seconds: float, **changes: Any) -> Record:
    """20 tokens behind a TTFT of about `seconds`; every tenth gap is slow."""
    gaps = [0.01 * (1 + 4 * (index % 10 == 9)) for index in range(19)]
    ttft = seconds * float(CLOCK.lognormal(0, 0.03))
    times = {"ttft_s": ttft, "token_s": gaps, "tpot_s": 0.01, "e2e_s": ttft + sum(gaps), "new_tokens": 20}
    return record(method, "needle", sample, **(times | changes))


def one(table: Table, method: str, column: str) -> Any:
    """The value of a cell."""
    (row,) = [row for row in table.rows if row[1].text == method]
    return row[table.head.index(column)].value


def named(run: Path, name: str) -> Table:
    (table,) = [table for table in tables(read(run), [Limit("ttft", 2.0)]) if table.name == name]
    return table


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 requests: `lazyllm` takes half the joules of `full` and a third of its time to the first token."""
    joules = {"full": 600.0, "lazyllm": 300.0}
    state = {"idle_power_w": 90.0, "energy_step_s": 0.1, "foreign_processes": 0}
    records = [
        answered(
            method, sample, 3.0 if method == "full" else 1.0,
            energy_j=joules[method] * float(CLOCK.lognormal(0, 0.02)), device_state=state,
        )
        for sample in range(30) for method in joules
    ]  # fmt: skip
    return write(tmp_path_factory.mktemp("runs") / "main", records, methods=[], tasks=[])


def test_percentiles_of_all_requests_together_and_the_mean_beside_the_median(run: Path) -> None:
    table = named(run, "tails")
    records = read(run).records
    own = records[records["method"] == "full"]
    assert one(table, "full", "n") == 30 and one(table, "full", "gaps") == 30 * 19
    assert one(table, "full", "TTFT p90") == pytest.approx(np.percentile(own["ttft_s"], 90))
    assert one(table, "full", "TTFT p99") is None
    assert one(table, "full", "ITL p90") == pytest.approx(0.01) and one(table, "full", "ITL p99") == pytest.approx(0.05)
    assert one(table, "full", "TPOT median") == 0.01
    # One gap of 19 is five times as long as the others, which no median sees.
    assert one(table, "full", "TPOT mean") == pytest.approx((18 + 5) * 0.01 / 19, abs=1e-6)


def test_vllms_tpot_is_of_two_tokens_or_more() -> None:
    of = record("full", "needle", 0, ttft_s=1.0, e2e_s=4.0, new_tokens=4)
    assert of.tpot_mean_s == 1.0
    for changes in ({"new_tokens": 1}, {"ttft_s": None}, {"e2e_s": None}):
        assert math.isnan(of.model_copy(update=changes).tpot_mean_s)


def test_joules_by_request_and_token_with_paired_ratios(run: Path) -> None:
    table = named(run, "energy")
    assert one(table, "full", "a request") == pytest.approx(600, rel=0.02)
    assert one(table, "lazyllm", "a new token") == pytest.approx(300 / 20, rel=0.02)
    assert one(table, "lazyllm", "verdict") == "better" and one(table, "full", "less") is None
    (row,) = [row for row in table.rows if row[1].text == "lazyllm"]
    ratio = row[table.head.index("less")]
    assert ratio.low is not None and ratio.high is not None
    assert 1.95 < ratio.low < ratio.value < ratio.high < 2.05
    assert "every 100 ms" in table.note and "below 1.00 s" in table.note and "90 W" in table.note
    assert {"energy", "less energy"} <= set(decision(read(run)).head)


def test_every_summary_has_them(run: Path) -> None:
    render(run)
    (lazy,) = [row for row in csv.DictReader((run / "summary.csv").open()) if row["method"] == "lazyllm"]
    assert float(lazy["energy_ratio"]) == pytest.approx(2, rel=0.02) and lazy["energy_n"] == "30"
    assert float(lazy["itl_p99_s"]) == 0.05 and lazy["ttft_p99_s"] == "" and lazy["itl_n"] == "570"
    page = (run / "table.md").read_text()
    assert "## Percentiles of latency" in page and "## Energy" in page and "| energy |" in page
    (result,) = [row for row in json.loads(json_summary(run))["results"] if row["method"] == "lazyllm"]
    assert result["energy_per_token_j"] == pytest.approx(15, rel=0.02) and result["ttft_p99_s"] is None


def test_two_runs_are_compared_by_joules_where_both_have_them(run: Path, tmp_path: Path) -> None:
    less = [one.model_copy(update={"energy_j": 0.8 * one.energy_j}) for one in records_of(run) if one.energy_j]
    other = write(tmp_path / "other", less, methods=[], tasks=[])
    found = compare_runs(run, other)
    assert found.effects["energy_ratio"].to_numpy() == pytest.approx(1.25, rel=1e-6)
    assert "| energy |" in compared_text(found)
    bare = write(tmp_path / "bare", [one.model_copy(update={"energy_j": None}) for one in less], methods=[], tasks=[])
    assert "| energy |" not in compared_text(compare_runs(run, bare))


def records_of(run: Path) -> list[Record]:
    return [Record.model_validate_json(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_what_was_not_counted_or_is_too_short_has_no_table(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [record(m, "needle", n) for m in ("full", "lazyllm") for n in range(9)])
    names = [table.name for table in tables(read(run))]
    assert "energy" not in names and "tails" not in names and "goodput" not in names
    assert "energy" not in decision(read(run)).head
    render(run)
    assert "Energy" not in (run / "table.md").read_text()


def test_goodput_counts_what_keeps_every_limit(tmp_path: Path) -> None:
    records = [
        record("full", "needle", 0, ttft_s=1.0, e2e_s=2.0, new_tokens=11),  # 100 ms a token
        record("full", "needle", 1, ttft_s=1.0, e2e_s=2.1, new_tokens=11),  # 110 ms
        record("full", "needle", 2, ttft_s=3.0, e2e_s=3.1, new_tokens=11),
        record("full", "needle", 3, ttft_s=2.0, e2e_s=2.0, new_tokens=1),  # no time a token
        without_answer(record("full", "needle", 4)),
    ]
    run = read(write(tmp_path / "run", records, methods=[], tasks=[]))
    table = goodput(run, parse_slo("ttft=2s,tpot=100ms"))
    assert (one(table, "full", "n"), one(table, "full", "within"), one(table, "full", "share")) == (5, 2, 0.4)
    busy = 2.0 + 2.1 + 3.1 + 2.0
    assert one(table, "full", "goodput, requests/s") == pytest.approx(2 / busy)
    assert one(table, "full", "all, requests/s") == pytest.approx(4 / busy)
    assert table.title == "Goodput, batch 1, no queue"
    together = goodput(Recorded(run.name, run.manifest, run.records.assign(batch=4)), parse_slo("ttft=2s,tpot=100ms"))
    assert together.title == "Goodput, batch 4, no queue"
    assert one(together, "full", "goodput, requests/s") == pytest.approx(2 / (7.0 + (busy - 7.0) / 4))
    assert one(goodput(run, parse_slo("e2e=2.05s")), "full", "within") == 2


def without_answer(of: Record) -> Record:
    nothing = dict.fromkeys(("ttft_s", "tpot_s", "token_s", "e2e_s", "score", "prediction"))
    return of.model_copy(update=nothing | {"new_tokens": 0, "extra": {OUT_OF_MEMORY: "no room"}})


def test_what_was_never_timed_has_no_goodput(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [without_answer(record("full", "needle", 0))], methods=[], tasks=[])
    assert not goodput(read(run), parse_slo("ttft=1s")).rows


def test_limits_as_the_command_line_writes_them() -> None:
    assert parse_slo("ttft=2s, tpot=50ms") == [Limit("ttft", 2.0), Limit("tpot", 0.05)]
    assert parse_slo("e2e=1.5s") == [Limit("e2e", 1.5)]


@pytest.mark.parametrize("text", ["", "ttft", "ttft=2", "ttft=-2s", "ttft=0s", "itl=2s", "ttft=2s,ttft=3s", "ttft=2s,"])
def test_limits_that_cannot_be_read_are_one_line(text: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="--slo"):
        parse_slo(text)
    assert command("report", run, "--slo", text) == 2
    assert capsys.readouterr().err.startswith(f"harness: --slo {text!r}: expected ttft=2s")


@pytest.mark.usefixtures("no_pictures")
def test_the_command_writes_goodput_everywhere(run: Path, tmp_path: Path) -> None:
    assert command("report", run, "--slo", "ttft=2s", "--output", tmp_path) == 0
    (lazy,) = [row for row in csv.DictReader((tmp_path / "goodput.csv").open()) if row["method"] == "lazyllm"]
    assert lazy["within"] == "30" and float(lazy["share"]) == 1
    assert "Goodput, batch 1, no queue" in (tmp_path / "index.html").read_text()
    names = {path.name for path in report([run], tmp_path / "plain")}
    assert "goodput.csv" not in names and {"tails.csv", "energy.csv"} <= names
