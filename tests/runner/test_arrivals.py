"""`harness run` at a rate: a record each, the answers of one at a time, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import harness
from harness.errors import InputError
from harness.runner.plan import plan
from harness.runner.spec import RunSpec, cell_hash
from harness.storage.record import Arrival, Record
from harness.storage.store import load_manifest
from tests.checkpoint import save_checkpoint
from tests.command import run
from tests.report.test_report import record
from tests.runner.test_batches import BOOM as FAILS_ONCE
from tests.test_cli import random_model

METHODS = "full,snapkv:budget=64:window=8"
TASK = "speed:lengths=100:new_tokens=4:repeats=5"
LOADED = f"{TASK}:rate=200/inf:most=3"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load")
    asked = ("--methods", METHODS, "--tasks", f"{LOADED},{TASK}", "--model", random_model(folder))
    assert run("run", *asked, "--dtype", "float32", "--output", folder / "run") == 0
    return folder / "run"


def test_a_record_each_with_its_way_through_the_queue(loaded: Path) -> None:
    records = harness.load(loaded)
    assert len(records) == 2 * 5 * 3
    served = [Loaded(row) for row in records[records.arrival.notna()].to_dict("records")]
    for one in served:
        arrival, row = one.arrival, one.row
        assert arrival.rate == (200 if "rate=200" in row["task"] else None)
        assert arrival.start_s < arrival.first_token_s < arrival.last_token_s
        assert row["ttft_s"] == pytest.approx(arrival.first_token_s - arrival.start_s)
        assert row["e2e_s"] == pytest.approx(arrival.last_token_s - arrival.start_s)
        assert sum(row["token_s"]) == pytest.approx(row["e2e_s"] - row["ttft_s"])
        assert len(arrival.batch_sizes) == 3 and 1 <= max(arrival.batch_sizes) <= arrival.most == 3
        assert not arrival.replayed and arrival.captures == 0
    assert max(size for one in served for size in one.arrival.batch_sizes) > 1
    full, snapkv = (
        {(one.row["task"], one.row["sample"]): one.arrival.arrival_s for one in served if one.row["method"] == method}
        for method in METHODS.split(",")
    )
    assert full == snapkv and len(full) == 10
    alone = records[records.arrival.isna()]
    assert alone.decode_read_bytes.notna().all() and len(alone) == 10
    assert set(alone.cell).isdisjoint(records[records.arrival.notna()].cell) and records.cell.nunique() == 6


class Loaded:
    """A row of what was loaded, and its way through the queue."""

    def __init__(self, row: dict[Any, Any]) -> None:
        self.row, self.arrival = row, Arrival.model_validate(row["arrival"])


@pytest.mark.slow
def test_answers_are_those_of_one_at_a_time(tmp_path: Path) -> None:
    model, answers = save_checkpoint(tmp_path / "model"), list[pd.DataFrame]()
    for task in (TASK.replace("5", "2"), LOADED.replace("200/inf", "inf").replace("repeats=5", "repeats=2")):
        asked = ("--methods", METHODS, "--tasks", task, "--dtype", "float32", "--limit", 2)
        assert run("run", "--model", model, *asked, "--output", tmp_path / str(len(answers))) == 0
        records = harness.load(tmp_path / str(len(answers))).set_index(["method", "sample"]).sort_index()
        answers.append(records[["prediction", "new_tokens", "kept_fraction", "prompt_hash"]])
    assert answers[0].equals(answers[1]) and len(answers[0]) == 4 == answers[0].prediction.str.len().gt(0).sum()


def test_a_load_that_was_cut_short_is_served_again_and_no_record_twice(loaded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    asked = ("--methods", "full", "--tasks", f"{TASK}:rate=inf:most=2", "--model", random_model(tmp_path))
    assert run("run", *asked, "--output", folder) == 0
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"status": "running", "records": None}))
    (folder / "samples.jsonl").write_text("".join(lines[:-2]))
    assert run("run", *asked, "--output", folder) == 0 and load_manifest(folder).status == "complete"
    again = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    assert again[:-2] == lines[:-2] and [json.loads(line)["sample"] for line in again[-2:]] == ["100-3", "100-4"]


def test_the_rate_and_the_places_are_part_of_what_a_cell_is() -> None:
    hashes = set()
    for load in ("", ":rate=1", ":rate=2", ":rate=2:most=3"):
        planned = plan(RunSpec(methods="full", tasks=f"speed:lengths=100{load}"))
        hashes.add(cell_hash(planned.spec, planned.methods[0], planned.tasks[0], "weights", "float32", "sdpa"))
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": "lazyllm"}, "lazyllm.*revive=false"),
        ({"batch": 2}, "--batch: .*most="),
        ({"ledger": True}, "--ledger"),
        ({"parts": True}, "--parts"),
        ({"timing": False}, "--no-timing"),
        ({"tasks": "speed:rate=nan"}, "rate.*greater than 0"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_loads(given: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(RunSpec.read({"methods": "full", "tasks": "speed:lengths=100:rate=2"} | given))


def test_one_process_serves() -> None:
    with pytest.raises(InputError, match="--executor.*one process"):
        plan(RunSpec(methods="full", tasks="speed:lengths=100:rate=2"), elsewhere=True)


BOOM = f"""{FAILS_ONCE}
    def end(self):
        raise ValueError("my other bug")
"""


@pytest.mark.usefixtures("forget_methods")
def test_a_method_that_fails_in_one_request_fails_under_load(tmp_path: Path) -> None:
    (tmp_path / "boom.py").write_text(BOOM)
    asked = ("--methods", "boom,full", "--method-file", tmp_path / "boom.py", "--tasks", f"{TASK}:rate=inf:most=2")
    assert run("run", "--model", random_model(tmp_path), *asked, "--output", tmp_path / "run") == 1
    records = harness.load(tmp_path / "run")
    boom = records[records.method == "boom"]
    assert len(boom) == 5 and all("ValueError: my o" in extra["failed"] for extra in boom.extra)
    assert boom.arrival.isna().all() and (records[records.method == "full"].ttft_s > 0).all()


def test_older_records_have_no_arrival() -> None:
    values = record("full", "speed", 0).model_dump()
    del values["arrival"]
    assert Record.model_validate(values).arrival is None


def test_nobody_is_served_before_he_comes() -> None:
    values: dict[str, Any] = {"rate": 1.0, "most": 1, "batch_sizes": [], "replayed": True, "captures": 0}
    with pytest.raises(ValueError, match="order"):
        Arrival(**values, arrival_s=2.0, start_s=1.0, first_token_s=3.0, last_token_s=3.0)
    Arrival(**values, arrival_s=1.0, start_s=2.5, first_token_s=3.0, last_token_s=3.0)
