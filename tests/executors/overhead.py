"""What giving out a unit costs: a thousand units of a sample each, answered by workers that do nothing.

python -m tests.executors.overhead local
python -m tests.executors.overhead ray --units 1000
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import pytest
from rich.console import Console

from harness.executors.fleet import KINDS, Fleet
from harness.runner import fan_out as module
from harness.runner.progress import Progress
from harness.runner.worker import MethodWorker
from tests.executors.runs import LIGHT, keys, light_plan, settle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("executor", choices=KINDS)
    parser.add_argument("--units", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in {"ANSWER": LIGHT, "UNITS_A_SLOT": asked.units, "FEWEST": 1}.items():
            patch.setattr(module, name, value)
        settle(Path(folder), asked.units)
        plan, fleet = light_plan(Path(folder)), Fleet(asked.executor, workers=asked.workers)
        quiet = Progress(Console(stderr=True, quiet=True))
        began, busy = time.perf_counter(), time.process_time()
        module.fan_out(plan, Path(folder) / "run", quiet, MethodWorker, fleet)
        wall, cpu = time.perf_counter() - began, time.process_time() - busy
        assert len(keys(Path(folder) / "run")) == 2 * asked.units
    each = f"{wall / asked.units * 1e3:.1f} ms a unit, its process included; {cpu / asked.units * 1e3:.2f} ms"
    print(f"{asked.units} units, {asked.executor}, {asked.workers} workers: {wall:.1f} s, {each} of the driver's CPU")


if __name__ == "__main__":
    main()
