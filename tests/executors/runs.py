"""Runs in other processes, and what is compared of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from harness.executors.fleet import Fleet
from harness.runner import fan_out as module
from harness.runner.fan_out import fan_out
from harness.runner.plan import Plan
from harness.runner.plan import plan as make_plan
from harness.runner.progress import Progress
from harness.runner.spec import RunSpec
from harness.runner.worker import MethodWorker
from harness.storage.samples import SAMPLES
from tests.executors.light import METHODS, TASK
from tests.process import FORKS
from tests.test_cli import random_model

CLOCKS = {"device_state", "peak_memory_bytes", "worker"}
"""Fields that differ from process to process, beside those whose names end in `_s`."""
LIGHT = "tests.executors.light:answer"


def light_plan(folder: Path) -> Plan:
    """A plan whose requests `tests.executors.light` can answer."""
    return make_plan(RunSpec(model=random_model(folder), methods=",".join(METHODS), tasks=TASK, device="cpu"))


def settle(folder: Path, samples: int, seconds: float = 0.0, fields: Mapping[str, object] | None = None) -> None:
    """What light workers in this folder find; `fields` are what records say, if not nothing."""
    folder.mkdir(exist_ok=True)
    (folder / "samples").write_text(json.dumps([samples, seconds, fields or {}]))


def start_light(folder: Path, fleet: Fleet) -> BaseProcess:
    """The same in a process of its own, which can be killed."""
    process = FORKS.Process(target=light_run, args=(folder, fleet))
    process.start()
    return process


def light_run(folder: Path, fleet: Fleet) -> list[str]:
    """Runs it there, in `folder/run`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(module, "ANSWER", LIGHT)
        return fan_out(light_plan(folder), folder / "run", Progress(Console(stderr=True)), MethodWorker, fleet)


def keys(folder: Path) -> list[tuple[str, str]]:
    """(method, sample) of every line of a run, in their order."""
    return [(row["method"], row["sample"]) for row in rows(folder)]


def expected(samples: int) -> list[tuple[str, str]]:
    return [(method, str(sample)) for sample in range(samples) for method in METHODS]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / SAMPLES).read_text(encoding="utf-8").split("\n")[:-1]]


def comparable(folder: Path) -> list[dict[str, Any]]:
    """All records, in their order, without clocks and workers; read as plain JSON lines, not through the store."""
    return [{k: v for k, v in row.items() if not k.endswith("_s") and k not in CLOCKS} for row in rows(folder)]
