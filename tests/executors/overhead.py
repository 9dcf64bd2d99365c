"""What giving out a unit costs, and where the time goes: a thousand units of one sample, whose workers answer at once.

Orders, messages and records are real, of the size that runs have; the workers know no model. What a worker that has one
imports ahead of it is measured apart.

python -m tests.executors.overhead local
python -m tests.executors.overhead ray --units 100
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from rich.console import Console

from harness.executors.cluster import RayExecutor
from harness.executors.fleet import KINDS, Fleet
from harness.executors.local import LocalExecutor
from harness.runner import fan_out as module
from harness.runner.progress import Progress
from harness.runner.worker import MethodWorker
from harness.storage.record import Record
from harness.storage.samples import Samples
from harness.storage.store import RunStore
from tests.executors.runs import LIGHT, keys, light_plan, settle

REFERENCE = Path(__file__).parents[2] / "results/reference/cpu-needle"
IDENTITY = {"cell", "method", "task", "sample", "worker"}
CLOCKED: dict[str, list[tuple[Any, str]]] = {
    "begin (a cluster is started)": [(Fleet, "open")],
    "start processes": [(LocalExecutor, "start"), (RayExecutor, "start"), (RayExecutor, "slots")],
    "wait for them": [(LocalExecutor, "next"), (RayExecutor, "next")],
    "read messages": [(module, "read_message")],
    "store records": [(RunStore, "append")],
}
IMPORTS = "import harness.runner.orders, harness.runner.worker, transformers.models.llama.modeling_llama"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("executor", choices=KINDS)
    parser.add_argument("--units", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    seconds = measured(asked.executor, asked.units, asked.workers)
    print(f"{asked.executor}, {asked.units} units, {asked.workers} workers, load {os.getloadavg()[0]:.1f}; ms a unit:")
    for part, total in seconds.items():
        print(f"  {part:32}{total / asked.units * 1e3:9.2f}")
    wall, cpu = (1e3 * median(each) for each in zip(*(imports() for _ in range(3)), strict=True))
    print(f"a real worker's imports: {wall:.0f} ms, {cpu:.0f} ms of CPU")


def measured(executor: str, units: int, workers: int) -> dict[str, float]:
    """Seconds of a whole run, and of its parts."""
    seconds = dict.fromkeys(CLOCKED, 0.0)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.chdir(folder)
        for constant, value in {"ANSWER": LIGHT, "UNITS_A_SLOT": units, "FEWEST": 1}.items():
            patch.setattr(module, constant, value)
        for part, places in CLOCKED.items():
            for owner, function in places:
                patch.setattr(owner, function, clocked(getattr(owner, function), seconds, part))
        settle(folder, units, fields=record().model_dump(mode="json", exclude=IDENTITY))
        plan, fleet = light_plan(folder), Fleet(executor, workers=workers)
        quiet = Progress(Console(stderr=True, quiet=True))
        began, busy, others = time.perf_counter(), time.process_time(), of_children()
        module.fan_out(plan, folder / "run", quiet, MethodWorker, fleet)
        whole = {"all": time.perf_counter() - began}
        cpu = {
            "CPU time of the driver": time.process_time() - busy,
            "CPU time of its processes": of_children() - others,
        }
        assert len(keys(folder / "run")) == 2 * units
    return whole | seconds | {"the rest": whole["all"] - sum(seconds.values())} | cpu


def record() -> Record:
    """Of 2.4 KB."""
    lines = Samples.read(REFERENCE).whole
    return Record.model_validate_json(lines[: lines.index(b"\n")])


def clocked(function: Callable[..., Any], seconds: dict[str, float], part: str) -> Callable[..., Any]:
    """The function, whose seconds count for a part."""

    def call(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            seconds[part] += time.perf_counter() - began

    return call


def imports() -> tuple[float, float]:
    """Seconds, and those of them on a CPU, until a new process has imported what answers requests."""
    began, busy = time.perf_counter(), of_children()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    return time.perf_counter() - began, of_children() - busy


def of_children() -> float:
    """CPU seconds of the processes that have ended here; a cluster's are not ours."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
