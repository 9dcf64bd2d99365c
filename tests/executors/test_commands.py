"""Every command that records goes through executors, and `harness.run` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import harness
from tests.command import run
from tests.executors.runs import comparable
from tests.test_cli import random_model

LOCAL = ["--executor", "local", "--workers", "1"]
GRID = "model: {model}\nmethods: [full, recent]\ntasks: speed:repeats=2:new_tokens=2\nlengths: 256\ntiming: false\n"
PROBE = ["--lengths", "400", "--depths", "0.5", "--repeats", "1", "--layers", "2", "--arms", "needle"]

pytestmark = [pytest.mark.usefixtures("forked_workers"), pytest.mark.cluster]


def test_a_sweep(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(GRID.format(model=random_model(tmp_path)))
    for folder, options in (("one", []), ("two", LOCAL)):
        assert run("sweep", grid, "--output", tmp_path / folder, *options) == 0
    assert comparable(tmp_path / "one/config.json") == comparable(tmp_path / "two/config.json") != []


def test_a_probe(tmp_path: Path) -> None:
    place = ["--model", random_model(tmp_path), "--device", "cpu"]
    for folder, options in (("one", []), ("two", LOCAL)):
        assert run("reproduce", "diffusion", *PROBE, *place, "--output", tmp_path / folder, *options) == 0
    assert comparable(tmp_path / "one") == comparable(tmp_path / "two") != []


def test_a_method_from_a_file_and_python(tmp_path: Path, forget_methods: None) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        'from harness.engine.method import Method\n\n\nclass Mine(Method):\n    name = "mine"\n    summary = "mine"\n'
    )
    asked: dict[str, Any] = {"model": random_model(tmp_path), "tasks": "speed:lengths=256:new_tokens=1:repeats=1"}
    where: dict[str, Any] = {"output": tmp_path / "run", "executor": "local", "progress": False}
    found = harness.run(["full", "mine"], method_file=file, **where, **asked)
    assert sorted(found["method"]) == ["full", "mine"] and found["ttft_s"].notna().all()
