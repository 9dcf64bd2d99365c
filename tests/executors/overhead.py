"""What giving out a unit costs, and where the time goes: a thousand units of one sample, whose workers answer at once.

Orders, messages and records are real, of the size that runs have, and so is what is imported ahead of orders, which is
forked for each; but they load no model.

python -m tests.executors.overhead local
python -m tests.executors.overhead ray
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

import psutil
import pytest
from rich.console import Console

import harness.runner.answering as ahead
from harness.executors.cluster import RayExecutor
from harness.executors.fleet import KINDS, Fleet
from harness.executors.local import LocalExecutor
from harness.runner import fan_out as module
from harness.runner.progress import Progress
from harness.runner.worker import MethodWorker
from harness.storage.record import Record
from harness.storage.samples import Samples
from harness.storage.store import RunStore
from tests.executors.light import answer as answer
from tests.executors.runs import keys, light_plan, settle

REFERENCE = Path(__file__).parents[2] / "results/reference/cpu-needle"
IDENTITY = {"cell", "method", "task", "sample", "worker"}
CLOCKED: dict[str, list[tuple[Any, str]]] = {
    "start processes": [(LocalExecutor, "start"), (RayExecutor, "start"), (RayExecutor, "slots")],
    "wait for them": [(LocalExecutor, "next"), (RayExecutor, "next")],
    "read messages": [(module, "read_message")],
    "store records": [(RunStore, "append")],
}
ANSWER = "tests.executors.overhead:answer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("executor", choices=KINDS)
    parser.add_argument("--units", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    seconds = measured(asked.executor, asked.units, asked.workers)
    print(f"{asked.executor}, {asked.units} units, {asked.workers} workers, load {os.getloadavg()[0]:.1f}; ms a unit:")
    for part, total in seconds.items():
        print(f"  {part:32}{total * 1e3 / (1 if 'in all' in part else asked.units):9.2f}")
    wall, cpu = (1e3 * median(each) for each in zip(*(imports() for _ in range(3)), strict=True))
    print(f"what a place imports once: {wall:.0f} ms, {cpu:.0f} ms of CPU")


def measured(executor: str, units: int, workers: int) -> dict[str, float]:
    """Seconds of what gives the units out and carries them out, of its parts, and until the first can begin."""
    seconds, began = dict.fromkeys(CLOCKED, 0.0), list[float]()
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.chdir(folder)
        for constant, value in {"ANSWER": ANSWER, "UNITS_A_SLOT": units, "FEWEST": 1}.items():
            patch.setattr(module, constant, value)
        for part, places in CLOCKED.items():
            for owner, function in places:
                patch.setattr(owner, function, clocked(getattr(owner, function), seconds, part))

        def answer_units(run: Any, *given: Any, units: Callable[..., None] = module._Run._answer) -> None:
            seconds.update(dict.fromkeys(CLOCKED, 0.0))
            began.extend(clocks())
            units(run, *given)
            began.extend(clocks())

        patch.setattr(module._Run, "_answer", answer_units)
        settle(folder, units, fields=record().model_dump(mode="json", exclude=IDENTITY))
        plan, fleet = light_plan(folder), Fleet(executor, workers=workers)
        quiet = Progress(Console(stderr=True, quiet=True))
        asked = time.perf_counter()
        module.fan_out(plan, folder / "run", quiet, MethodWorker, fleet)
        assert len(keys(folder / "run")) == 2 * units
    wall, driver, others = (end - start for start, end in zip(began[:3], began[3:], strict=True))
    cpu = {"CPU time of the driver": driver, "CPU time of its processes": others}
    start = {"until the first, in all": began[0] - asked}
    return {"all": wall} | seconds | {"the rest": wall - sum(seconds.values())} | cpu | start


def clocks() -> tuple[float, float, float]:
    """Seconds: of the wall, of the CPU here and in the processes that were started here."""
    return time.perf_counter(), time.process_time(), of_children()


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
    subprocess.run([sys.executable, "-c", f"import {ahead.__name__}"], check=True)
    return time.perf_counter() - began, of_children() - busy


def of_children() -> float:
    """CPU seconds of the processes that were started here, a cluster's among them, and of those that they started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return used.ru_utime + used.ru_stime + sum(map(sum, ([*each[:4]] for each in living)))


if __name__ == "__main__":
    main()
