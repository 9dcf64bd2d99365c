"""`harness export` and `harness env`."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pandas as pd
import pytest

import harness
from harness.errors import InputError
from harness.measuring import roofline
from harness.storage.cells import harmless_frame
from harness.storage.export import export
from harness.storage.record import Record
from harness.storage.store import Manifest, RunStore
from tests.command import run as command
from tests.recorded import save


def record(sample: str) -> Record:
    """Everything that may be null is."""
    told = {
        "cell": "c", "method": "full", "task": "needle", "sample": sample, "prompt_hash": "p", "prompt_tokens": 100,
        "context_tokens": 100, "question": "prompt", "new_tokens": 2, "prediction": "42\n\u2028ü", "metric": "exact",
        "answers": ["42"], "tokens_requested": [100, 50], "tokens_kept": [100, 50], "tokens_recomputed": 0,
        "extra": {"needles": [[1, 2]], "depth": 0.5, "hard": {}}, "version": Record.model_fields["version"].default,
    }  # fmt: skip
    return Record.model_validate(dict.fromkeys(Record.model_fields) | told)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    manifest = Manifest(run_hash="h", model="smollm2", device="cpu", methods=["full"], tasks=["needle"])
    with RunStore(tmp_path / "run", manifest) as store:
        store.append(record("0"))
        store.append(record("1"))
        store.finish()
    return tmp_path / "run"


def test_csv_to_standard_output_is_nothing_but_the_records(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("export", run, "--csv", "-") == 0
    assert [line["sample"] for line in csv.DictReader(capsys.readouterr().out.splitlines())] == ["0", "1"]
    assert not Path("-").exists()


@pytest.mark.slow
def test_parquet_holds_what_load_gives(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    file = tmp_path / "records.parquet"
    assert command("export", str(run), "--parquet", str(file)) == 0
    assert capsys.readouterr().out == f"wrote {file}\n"
    found, loaded = pd.read_parquet(file), harness.load(run)
    assert list(found) == list(loaded) and len(found) == 2
    assert list(found["tokens_kept"][0]) == [100, 50] and found["prediction"][0] == "42\n\u2028ü"
    assert json.loads(found["extra"][0]) == record("0").extra and found["peak_memory_bytes"].isna().all()


def test_csv_holds_lists_as_json(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "records.csv"
    assert command("export", str(run), "--csv", str(file)) == 0
    found = pd.read_csv(file, dtype={"sample": str})
    assert list(found) == list(harness.load(run)) and list(found["sample"]) == ["0", "1"]
    assert json.loads(found["tokens_kept"][0]) == [100, 50] and found["prediction"][0] == "42\n\u2028ü"
    assert json.loads(found["answers"][0]) == ["42"] and json.loads(found["extra"][0]) == record("0").extra


def test_csv_cells_are_no_formulas_and_numbers_stay_numbers(tmp_path: Path) -> None:
    evil = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "=cmd|' /C calc'!A0"]
    kind = [*evil, "-5", "+1.5e3", "a=b", "a\r=b", "", "'=1"]
    records = [record(f"={n}").model_copy(update={"prediction": text}) for n, text in enumerate(kind)]
    manifest = Manifest(run_hash="h", model="smollm2", device="cpu", methods=[], tasks=[])
    folder = save(tmp_path / "run", manifest, records)
    file = export(folder, csv=tmp_path / "records.csv")
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["prediction"] for row in rows] == ["'" + text for text in evil] + kind[len(evil) :]
    assert {row["sample"][:2] for row in rows} == {"'="} and rows[0]["kept_fraction"] == "0.75"
    assert list(harmless_frame(pd.DataFrame({"=a": [-1.5, None]})).to_csv(index=False).splitlines()) == [
        "'=a",
        "-1.5",
        '""',
    ]


@pytest.mark.parametrize("arguments", [[], ["--csv", "a", "--parquet", "b"]])
def test_one_file_is_asked_for(run: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("export", str(run), *arguments) == 2
    assert "--parquet FILE or --csv FILE" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("export", str(tmp_path), "--csv", str(tmp_path / "a.csv")) == 2
    assert "not a run" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_file_that_cannot_be_written_is_one_line(run: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "missing" / "file"
    with pytest.raises(InputError, match="cannot write"):
        export(run, csv=target if kind == "csv" else None, parquet=target if kind == "parquet" else None)


def test_without_pyarrow_there_is_csv(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        export(run, parquet=tmp_path / "a.parquet")


def test_env_is_json_with_the_ceilings_once_they_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(roofline, "_best", lambda device, work: 0.5)
    monkeypatch.setattr(roofline, "_lasting", lambda device, work: 1.0)
    for sizes in (roofline._SIDE, roofline._COPIED):
        monkeypatch.setitem(sizes, "cpu", 256)
    assert command("env") == 0
    text = capsys.readouterr().out
    assert json.loads(text)["ceilings"] is None and '\n  "python"' in text
    assert command("env", "--measure") == 0
    (found,) = json.loads(capsys.readouterr().out)["ceilings"]
    assert found["gemm_flops"] == 2 * 256**3 / 0.5 and str(tmp_path) not in text
