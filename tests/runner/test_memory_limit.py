"""Requests that the device's memory cannot hold: recorded as such, and the run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import harness
from harness.conformance.tiny import random_ids, tiny_engine
from harness.engine.engine import Engine
from harness.engine.method import Method
from harness.engine.request import Request
from harness.measuring.clock import Measured, measure
from harness.runner.catalog import parse_methods
from tests.command import run
from tests.test_cli import random_model


def test_a_request_without_room_is_recorded_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def scarce(engine: Engine, method: Method, request: Request, **options: Any) -> Measured:
        if method.name == "full":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. More words.")
        return measure(engine, method, request, **options)

    monkeypatch.setattr("harness.runner.request.measure", scarce)
    folder = tmp_path / "run"
    speed = [
        "--model",
        random_model(tmp_path),
        "--tasks",
        "speed:lengths=192:new_tokens=4:repeats=2",
        "--methods",
        "full,slim",
    ]
    assert run("run", *speed, "--methods", "full,slim", "--output", str(folder)) == 0
    records = harness.load(folder)
    full = records["method"] == "full"
    assert records[full]["ttft_s"].isna().all() and records[~full]["ttft_s"].notna().all()
    assert [extra["out_of_memory"] for extra in records[full]["extra"]] == ["CUDA out of memory"] * 2
    assert "full: out of memory" in capsys.readouterr().err
    assert "**Out of memory**, and so without numbers: full on" in (folder / "table.md").read_text()
    assert run("report", str(folder)) == 0


def test_a_limit_needs_a_device_that_can_be_limited(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert run("run", "--memory-limit", "2", "--device", "cpu") == 2
    assert "--memory-limit needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("gib", ["0", "-1"])
def test_a_limit_is_positive(gib: str) -> None:
    assert run("run", "--memory-limit", gib) == 2


@pytest.mark.parametrize("text", ["full", "slim", "lazyllm", "quest:budget=64"])
def test_an_answered_request_holds_no_keys_while_the_next_method_runs(text: str) -> None:
    engine = tiny_engine()
    (spec,) = parse_methods(text)
    method = spec.build(engine.context)
    for length in (150, 150, 90):
        request = Request(random_ids(length), 3)
        first = list(engine.stream(method, request))
        method.end()
        assert sum(cache.nbytes for cache in method.cache) == 0
        assert list(engine.stream(method, request)) == first


def test_in_a_run_no_other_method_holds_keys_from_the_first_request_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what warming up left behind."""
    methods: set[Method] = set()
    held: list[int] = []
    stream = Engine.stream

    def noted(engine: Engine, method: Method, request: Request, **options: Any) -> Iterator[int]:
        methods.add(method)
        return stream(engine, method, request, **options)

    def weighed(engine: Engine, method: Method, request: Request, **options: Any) -> Measured:
        held.append(sum(cache.nbytes for other in methods - {method} for cache in other.cache))
        return measure(engine, method, request, **options)

    monkeypatch.setattr(Engine, "stream", noted)
    monkeypatch.setattr("harness.runner.request.measure", weighed)
    tasks = ["--tasks", "speed:lengths=96:new_tokens=3:repeats=2", "--methods", "full,slim,lazyllm"]
    assert run("run", "--model", random_model(tmp_path), *tasks, "--output", str(tmp_path / "run")) == 0
    assert len(methods) == 3 and held == [0] * 6
