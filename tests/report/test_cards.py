"""Times of different cards make no pair, within a run either; scores do, and reports say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.report.caveats import caveats
from harness.report.render import render
from harness.statistics.paired import cards, compare, leaders, speedups
from harness.storage.record import Record
from harness.storage.store import load
from tests.report.test_report import record
from tests.report.test_tables import written


def worker(card: str, device: str = "H200") -> dict[str, Any]:
    return {"host": "a", "process": 1, "device": device, "gpu_uuid": card, "driver": "1"}


def records(apart: int, device: str = "H200") -> list[Record]:
    """8 samples; `slim` takes half as long, and answers the first `apart` on another card, ten times as fast."""
    made = []
    for sample in range(8):
        made.append(record("full", "needle", sample, ttft_s=1.0 + sample / 100, worker=worker("GPU-1")))
        other = sample < apart
        where = worker("GPU-2", device) if other else worker("GPU-1")
        made.append(record("slim", "needle", sample, ttft_s=0.05 if other else 0.5 + sample / 250, worker=where))
    return made


def frame(folder: Path, apart: int) -> pd.DataFrame:
    return load(written(folder, records(apart)))


@pytest.mark.parametrize("apart", [0, 3, 8])
def test_only_times_of_one_card_are_paired(tmp_path: Path, apart: int) -> None:
    row = compare(frame(tmp_path / "run", apart)).iloc[0]
    assert (row["n"], row["score_n"], row["ttft_n"]) == (8, 8, 8 - apart)
    assert row["ttft_ratio"] == pytest.approx(2, rel=0.02) if apart < 8 else pd.isna(row["ttft_ratio"])


def test_no_method_leads_by_another_card(tmp_path: Path) -> None:
    assert ("needle", "slim") in leaders(frame(tmp_path / "one", 0), "ttft")
    two = frame(tmp_path / "two", 8)
    assert leaders(two, "ttft") == set() and speedups(two)["ttft"].isna()["slim", "needle"]


def test_reports_say_so(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", records(3, device="A100"))
    told = "\n".join(map(str, caveats(load(folder))))
    assert "Times not paired, on another card than `full`, or at another time: slim on needle: 3 of 8 requests." in told
    assert "Measured on different kinds of device: H200: 13 requests; A100: 3 requests." in told
    render(folder)
    assert "Times not paired" in (folder / "table.md").read_text()
    assert not list(caveats(load(written(tmp_path / "same", records(0)))))


def test_older_records_were_made_on_one_card(tmp_path: Path) -> None:
    old = load(written(tmp_path / "old", [record("full", "needle", 0), record("slim", "needle", 0)]))
    assert set(cards(old)) == set(cards(old.drop(columns="worker"))) == {""}
    assert not list(caveats(old.drop(columns="worker")))
