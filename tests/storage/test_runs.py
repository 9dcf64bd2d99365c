"""`harness runs`: what lies below a folder."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from harness.errors import InputError
from harness.storage.runs import past_runs
from harness.storage.store import Manifest, RunStore
from tests.command import run
from tests.storage.test_store import record


def made(folder: Path, started: str, finished: bool = True, records: int = 2) -> None:
    manifest = Manifest(
        run_hash="1", model="smollm2", device="cpu", started=started,
        methods=["full", "slim:w=4", "slim:w=8"], tasks=["needle:lengths=192", "longbench/trec_e"],
    )  # fmt: skip
    with RunStore(folder, manifest) as store:
        for number in range(records):
            store.append(record(str(number), method="full", task="needle:lengths=192"))
        if finished:
            store.finish()


def test_runs_are_listed_newest_first_with_their_records(tmp_path: Path) -> None:
    made(tmp_path / "old", "2026-01-01T00:00:00+00:00")
    made(tmp_path / "deep/new", "2026-02-01T10:20:30+00:00", finished=False, records=1)
    packed = tmp_path / "old/samples.jsonl"
    (tmp_path / "old/samples.jsonl.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    with (tmp_path / "deep/new/samples.jsonl").open("a") as lines:
        lines.write('{"torn')
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/manifest.json").write_text("{")
    (tmp_path / "torn/samples.jsonl.gz").write_bytes(b"no gzip")
    new, old, torn = (found.row() for found in past_runs(tmp_path))
    about = ("smollm2", "full, slim (2)", "needle, longbench/trec_e")
    assert new == (f"{tmp_path}/deep/new", "2026-02-01 10:20", *about, "1", "no: stopped before the end")
    assert old == (f"{tmp_path}/old", "2026-01-01 00:00", *about, "2", "yes")
    assert torn == (f"{tmp_path}/torn", "", "", "", "", "-", "no: the manifest cannot be read")


@pytest.mark.parametrize("kept", [0, 1])
def test_a_run_that_lost_records_is_not_complete(tmp_path: Path, kept: int) -> None:
    made(tmp_path, "2026-01-01T00:00:00+00:00")
    samples = tmp_path / "samples.jsonl"
    samples.write_bytes(b"".join(samples.read_bytes().splitlines(keepends=True)[:kept]))
    assert past_runs(tmp_path)[0].row()[-2:] == (str(kept), "no: the records are not those that it ended with")


def test_a_folder_that_is_not_there_and_one_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="is no folder"):
        past_runs(tmp_path / "none")
    assert past_runs(tmp_path) == []
    assert run("runs", tmp_path) == 0
    assert capsys.readouterr().out.split()[:2] == ["folder", "started"]


def test_the_command_prints_a_line_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / ("a-long-name-" * 10)
    made(folder, "2026-01-01T00:00:00+00:00")
    assert run("runs", tmp_path) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert line.startswith(str(folder)) and line.rstrip().endswith("yes")
