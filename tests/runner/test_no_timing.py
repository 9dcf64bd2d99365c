"""`--no-timing`: the same answers without a single second."""

from __future__ import annotations

from pathlib import Path

import pytest

import harness
from harness.measuring import roofline
from harness.runner.spec import RunSpec
from harness.storage.store import load_manifest
from tests.command import run
from tests.test_cli import random_model

SMALL = ["--methods", "full,slim", "--tasks", "needle:lengths=192:depths=0.5:repeats=2:new_tokens=4", "--device", "cpu"]


@pytest.mark.slow
def test_no_column_holds_seconds_and_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed, untimed = tmp_path / "timed", tmp_path / "untimed"
    asked = ["run", *SMALL, "--model", random_model(tmp_path)]
    assert run(*asked, "--output", timed) == 0
    monkeypatch.setattr(roofline, "measure_ceilings", pytest.fail)
    monkeypatch.setattr(roofline, "_remembered", pytest.fail)
    assert run(*asked, "--no-timing", "--output", untimed) == 0
    before, after = harness.load(timed), harness.load(untimed)
    seconds = [name for name in after.columns.astype(str) if name.endswith("_s")]
    assert (
        {"ttft_s", "tpot_s", "token_s", "e2e_s", "parts_s"} < set(seconds)
        and after[seconds].isna().all(axis=None)
        and before["ttft_s"].notna().all()
    )
    same = ["cell", "method", "sample", "prompt_hash", "new_tokens", "kv_bytes", "tokens_kept", "prefill_flops"]
    assert before[same].equals(after[same])
    assert run("report", untimed) == 0 and run("resume", untimed, "--model", asked[-1]) == 0


def test_it_is_another_run_and_those_of_earlier_versions_are_what_they_were(tmp_path: Path) -> None:
    assert "timing" not in RunSpec().identity() and RunSpec().run_hash() != RunSpec(timing=False).run_hash()
    folder = tmp_path / "run"
    assert run("run", *SMALL, "--no-timing", "--model", random_model(tmp_path), "--output", folder) == 0
    assert load_manifest(folder).spec["timing"] is False
