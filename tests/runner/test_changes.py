"""`--redo`: what changed since a run's records were made, whose requests are asked again, and what stays."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import harness
from harness.errors import InputError
from harness.leaderboard.entries import read_entry
from harness.leaderboard.frame import paired
from harness.report.caveats import caveats
from harness.runner.changes import changes, check_code
from harness.runner.plan import Plan, Sources, chosen, plan
from harness.runner.progress import Progress
from harness.runner.spec import RunSpec, WrongOption, cell_hash
from harness.statistics.paired import compare
from harness.storage.record import Record
from harness.storage.samples import SAMPLES
from harness.storage.store import RunStore, load_manifest
from tests.storage.test_store import record
from tests.test_cli import tiny

METHODS = "full,snapkv:budget=0.5,slim+xattention"
FACTS = {"weights_hash": "w", "dtype": "float32", "attention": "sdpa", "engine": "stock"}


def planned(folder: Path, redo: str = "") -> Plan:
    tasks = "needle:lengths=512,speed:lengths=256"
    return plan(RunSpec(model=tiny(folder), methods=METHODS, tasks=tasks, device="cpu", redo=redo))


def store_of(folder: Path, run: Plan, sources: Sources, *, scored: bool = True) -> RunStore:
    """The run, opened; its model is scored unless it is not to be."""
    manifest = run.manifest().model_copy(update={"latency_only": not scored})
    store = RunStore(folder, manifest, {"packages": dict(sources.versions)})
    store.describe(**FACTS, method_sources=sources.methods, task_sources=sources.tasks)
    return store


def answers(run: Plan, sources: Sources, samples: int = 8) -> list[Record]:
    """One record a cell and sample, of that code; `full` takes twice as long as the others."""
    on = (FACTS["weights_hash"], f"torch.{FACTS['dtype']}", f"{FACTS['attention']}, {FACTS['engine']}")
    cells = {
        (method.label, task.label): cell_hash(run.spec, method, task, *on, sources.of(method.label, task.label))
        for task in run.tasks
        for method in run.methods
    }
    return [
        record(
            str(sample),
            cell=cell,
            method=method,
            task=task,
            ttft_s=0.5 + 0.5 * (method == "full"),
            e2e_s=2,
        )
        for sample in range(samples)
        for (method, task), cell in cells.items()
    ]


def edited(sources: Sources, **changed: Mapping[str, str] | str) -> Sources:
    """The code as it was before an edit."""
    own: dict[str, Any] = {
        name: getattr(sources, name) | value if isinstance(value, dict) else value for name, value in changed.items()
    }
    return replace(sources, **own)


def begun(folder: Path, scored: bool = True, **changed: Mapping[str, str] | str) -> Path:
    """A run whose records are of other code."""
    run = planned(folder)
    before = edited(run.sources(), **changed)
    with store_of(folder / "run", run, before, scored=scored) as store:
        for one in answers(run, before):
            store.append(one)
    return folder / "run"


def resumed(folder: Path, redo: str = "") -> tuple[RunStore, str]:
    """The run opened again with the code that is here, and what is said of that."""
    run = planned(folder, redo)
    manifest = run.manifest().model_copy(update={"latency_only": load_manifest(folder / "run").latency_only})
    store, said = RunStore(folder / "run", manifest), io.StringIO()
    try:
        check_code(run, store, Progress(Console(file=said, width=1000)))
    except BaseException:
        store.close()
        raise
    return store, said.getvalue()


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ({"methods": {"snapkv:budget=0.5": "old"}}, "method snapkv; --redo snapkv asks"),
        ({"methods": {"full": "old", "snapkv:budget=0.5": "old"}}, "methods full, snapkv; --redo full,snapkv "),
        ({"tasks": {"needle:lengths=512": "old"}}, "task needle:lengths=512; --redo '*' asks"),
        ({"engine": "old"}, "the engine; --redo '*' asks"),
        ({"versions": {"torch": "1.0"}}, f"torch 1.0 (now {version('torch')}); --redo '*' asks"),
    ],
)
def test_what_changed_is_named_with_the_way_on(tmp_path: Path, before: dict[str, Any], said: str) -> None:
    begun(tmp_path, **before)
    written = (tmp_path / "run" / SAMPLES).read_bytes()
    with pytest.raises(InputError, match="code changed since it was started: ") as error:
        resumed(tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "run" / SAMPLES).read_bytes() == written


def test_of_a_sum_the_part_that_changed_is_named(tmp_path: Path) -> None:
    run = planned(tmp_path)
    own = run.sources().methods["slim+xattention"].partition("+")[0]
    begun(tmp_path, methods={"slim+xattention": f"{own}+old"})
    with pytest.raises(InputError, match=r"method xattention; --redo xattention asks"):
        resumed(tmp_path)
    store, _ = resumed(tmp_path, "xattention")
    store.close()
    assert {method for method, _ in store.cells} == {"full", "snapkv:budget=0.5"}


def test_code_that_is_as_it_was_changes_nothing(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    store, said = resumed(tmp_path, "*")
    store.close()
    assert said == "" and len(store.done) == 3 * 2 * 8 and load_manifest(folder).aside == {}


def test_only_all_that_changed_may_be_asked_again(tmp_path: Path) -> None:
    begun(tmp_path, methods={"full": "old", "snapkv:budget=0.5": "old"})
    with pytest.raises(InputError, match="methods full, snapkv"):
        resumed(tmp_path, "snapkv")
    assert load_manifest(tmp_path / "run").aside == {}


def test_one_method_is_asked_again_and_nothing_is_lost(tmp_path: Path) -> None:
    folder = begun(tmp_path, methods={"snapkv:budget=0.5": "old"})
    before = (folder / SAMPLES).read_text()
    store, said = resumed(tmp_path, "snapkv")
    assert "16 requests of 1 methods are asked again" in said and "their times stand without a pair" in said
    run = planned(tmp_path)
    with store:
        assert len(store.done) == 2 * 2 * 8
        fresh = [one for one in answers(run, run.sources()) if one.method.startswith("snapkv")]
        store.describe(method_sources=run.sources().methods)
        for one in fresh:
            store.append(one)
        store.finish()
    assert (folder / SAMPLES).read_text().startswith(before), "what was answered by the old code is in the file"
    records = harness.load(folder)
    assert len(records) == 3 * 2 * 8 and not records.duplicated(["method", "task", "sample"]).any()
    assert set(records[records["redo"].notna()]["method"]) == {"snapkv:budget=0.5"}
    again, said = resumed(tmp_path, "snapkv")
    again.close()
    assert said == "" and len(again.done) == 3 * 2 * 8, "the same command goes on and leaves nothing aside twice"


def test_times_of_two_times_are_no_pair_and_scores_are(tmp_path: Path) -> None:
    folder = begun(tmp_path, methods={"snapkv:budget=0.5": "old"})
    store, _ = resumed(tmp_path, "snapkv")
    run = planned(tmp_path)
    with store:
        for one in answers(run, run.sources()):
            if one.method.startswith("snapkv"):
                store.append(one)
        store.finish()
    records = harness.load(folder)
    rows = compare(records[records["task"] == "needle:lengths=512"]).set_index(["method", "task"])
    pairs = rows.xs("needle:lengths=512", level="task")[["ttft_n", "score_n"]]
    assert [*pairs.loc["snapkv:budget=0.5"]] == [0, 8] and [*pairs.loc["slim+xattention"]] == [8, 8]
    board = paired([read_entry("run", folder)]).groupby("label")[["ttft", "diff"]].count()
    assert [*board.loc["snapkv:budget=0.5"]] == [0, 16] and [*board.loc["slim+xattention"]] == [16, 16]
    assert "Times not paired" in " ".join(map(str, caveats(records)))


def test_where_there_are_times_alone_all_are_asked_again_side_by_side(tmp_path: Path) -> None:
    begun(tmp_path, scored=False, methods={"snapkv:budget=0.5": "old"})
    store, said = resumed(tmp_path, "snapkv")
    assert store.done == set() and "48 requests of 3 methods are asked again" in said
    run = planned(tmp_path)
    with store:
        for one in answers(run, run.sources()):
            store.append(one)
        store.finish()
    rows = compare(harness.load(tmp_path / "run")).set_index(["method", "task"])
    assert rows.loc[("snapkv:budget=0.5", "speed:lengths=256"), "ttft_n"] == 8


def test_a_task_that_changed_is_asked_again_and_others_stay(tmp_path: Path) -> None:
    begun(tmp_path, tasks={"needle:lengths=512": "old"})
    store, _ = resumed(tmp_path, "*")
    store.close()
    assert {task for _, task in store.cells} == {"speed:lengths=256"}


def test_records_of_versions_that_say_too_little_are_left_to_the_store(tmp_path: Path) -> None:
    run = planned(tmp_path)
    found = changes(run, run.manifest(), {("full", "speed:lengths=256"): "old"})
    assert not found.cells and str(found) == ""


def test_patterns_fit_labels_and_names() -> None:
    assert chosen("snapkv", "snapkv:budget=0.5") and chosen("full", "full#aa") and chosen("x*", "slim+xattention:tau=1")
    assert chosen("a, snapkv:*", "snapkv:budget=0.5") and not chosen("snap", "snapkv") and not chosen("", "full")


def test_a_pattern_that_fits_nothing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(WrongOption, match="--redo: 'snap' fits none of the methods full, snapkv"):
        planned(tmp_path, "snap")
