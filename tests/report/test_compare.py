from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from harness.cli import app
from harness.errors import InputError
from harness.report.compare import Change, changes, compare_runs, to_markdown
from harness.statistics.noise import TWIN
from harness.storage.record import Record
from tests.report.test_report import manifest, record
from tests.report.test_tables import written

GPU = {"cuda": [{"name": "Some GPU", "driver": "1"}], "cpu": {"model": "Some CPU", "usable": 2}}


def records(factor: float = 1.0, lost: int = 0, seed: int = 0, **more: Any) -> list[Record]:
    """20 samples of two methods; `slim` takes `factor` as long and loses the first `lost` answers."""
    clock = random.Random(seed)

    def one(method: str, sample: int) -> Record:
        slower = (factor if method == "slim" else 1.0) * clock.uniform(0.99, 1.01)
        score = 0.0 if method == "slim" and sample < lost else 1.0
        return record(method, "needle", sample, ttft_s=slower, tpot_s=slower, e2e_s=slower, score=score, **more)

    return [one(method, sample) for sample in range(20) for method in ("full", "slim")]


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return written(tmp_path / "before", records())


def test_what_got_slower_and_what_was_lost(before: Path, tmp_path: Path) -> None:
    found = compare_runs(before, written(tmp_path / "after", records(factor=1.2, lost=8, seed=1)))
    rows = {row["method"]: row for row in found.effects.to_dict("records")}
    assert rows["slim"]["ttft_verdict"] == "worse" and rows["slim"]["ttft_ratio"] == pytest.approx(1 / 1.2, rel=0.01)
    assert rows["slim"]["score_verdict"] == "worse" and (rows["slim"]["lost"], rows["slim"]["gained"]) == (8, 0)
    assert rows["full"]["score_difference"] == 0 and rows["full"]["ttft_verdict"] == "no difference"
    assert list(found.flips["sample"]) == [str(number) for number in range(8)] and rows["all"]["lost"] == 8
    page = to_markdown(found)
    assert "# after against before" in page and "| `slim` | `needle` | 20 | 8 | 0 | -40.0" in page


def test_requests_of_one_batch_are_one_pair(before: Path, tmp_path: Path) -> None:
    after = written(tmp_path / "after", records(factor=1.2, seed=1, batch=10, batch_tokens_per_s=7.0))
    rows = {row["method"]: row for row in compare_runs(before, after).effects.to_dict("records")}
    assert (rows["slim"]["n"], rows["slim"]["ttft_n"], rows["slim"]["ttft_verdict"]) == (20, 2, "undecided")


def test_a_run_against_itself(before: Path) -> None:
    found = compare_runs(before, before)
    assert found.changes == [] and found.flips.empty and found.notes == []
    assert "Nothing that is recorded." in to_markdown(found) and "None." in to_markdown(found)


def test_speeds_of_different_devices_are_refused_unless_told(before: Path, tmp_path: Path) -> None:
    after = written(tmp_path / "after", records(factor=0.1), device="cuda")
    found = compare_runs(before, after)
    assert found.refused and "--across-devices" in found.refused
    assert found.effects["ttft_ratio"].isna().all() and found.effects["score_difference"].notna().all()
    assert "0.1" not in to_markdown(found).split("## Paired")[1] and "TTFT" not in to_markdown(found)
    assert compare_runs(before, after, across_devices=True).effects["ttft_ratio"].notna().all()


def test_a_run_that_was_resumed_elsewhere_has_no_speeds_to_compare() -> None:
    from harness.report.compare import _refusal

    moved = manifest(device="cuda", environments=[GPU, GPU | {"cuda": [{"name": "Other GPU"}]}])
    assert _refusal(moved, moved) is not None
    assert _refusal(manifest(environments=[GPU]), manifest(environments=[GPU | {"memory_bytes": 1}])) is None


def test_changes_of_code_options_and_versions() -> None:
    packages = {"packages": {"torch": "2.11"}, "git": {"commit": "a" * 40}}
    one = manifest(spec={"seed": 0, "dtype": "auto"}, facts={"method_sources": {"slim": "x"}}, environments=[packages])
    other = manifest(spec={"seed": 1, "dtype": "auto"}, facts={"method_sources": {"slim": "y"}}, environments=[GPU])
    found = {change.name: change for change in changes(one, other)}
    assert found["option seed"] == Change("option seed", 0, 1)
    assert found["method_sources.slim"] == Change("method_sources.slim", "x", "y")
    assert found["packages.torch"] == Change("packages.torch", "2.11", None)
    assert found["cuda.0.driver"].b == "1" and "git.commit" in found and "option dtype" not in found


def test_an_option_that_a_run_does_not_name_is_the_default(tmp_path: Path) -> None:
    one = written(tmp_path / "one", [], spec={"max_length": None})
    other = written(tmp_path / "other", [], spec={"max_length": 900, "batch": 16}, facts={"dtype": "float32"})
    page = to_markdown(compare_runs(one, other))
    assert "| `option max_length` | default | `900` |" in page and "| `option batch` | default | `16` |" in page
    assert "| `dtype` | - | `float32` |" in page


def test_only_equal_prompts_are_paired(before: Path, tmp_path: Path) -> None:
    found = compare_runs(before, written(tmp_path / "after", records(prompt_hash="other")))
    assert found.effects.empty and "40 pairs are left out: their prompts differ." in found.notes
    assert "No sample is in both runs" in to_markdown(found)


def test_what_is_in_one_run_only_is_said(before: Path, tmp_path: Path) -> None:
    after = [one for one in records() if one.method == "full" and int(one.sample) < 15]
    found = compare_runs(before, written(tmp_path / "after", [*after, record("quest", "needle", 0)]))
    assert found.notes == ["Only in before: `slim`.", "Only in after: `quest`.", "26 records are in one run only."]


def test_null_scores_and_empty_runs(before: Path, tmp_path: Path) -> None:
    empty = written(tmp_path / "empty", [])
    assert "No sample is in both runs" in to_markdown(compare_runs(before, empty))
    silent = written(tmp_path / "silent", [record("full", "needle", n, score=None, ttft_s=None) for n in range(3)])
    assert "| - | - |" in to_markdown(compare_runs(silent, silent))


def test_the_twin_is_no_method(tmp_path: Path) -> None:
    run = written(tmp_path / "run", [record("full", "needle", 0), record(TWIN, "needle", 0)])
    assert TWIN not in to_markdown(compare_runs(run, run))


def test_no_run_is_refused(before: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run"):
        compare_runs(before, tmp_path)


def test_commands(before: Path, tmp_path: Path, no_pictures: None) -> None:
    done = CliRunner().invoke(app, ["compare", str(before), str(before)])
    assert done.exit_code == 0 and "## Paired differences" in done.output
    done = CliRunner().invoke(app, ["report", str(before), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0 and (tmp_path / "out" / "index.html").is_file()
