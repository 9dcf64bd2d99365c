"""What a second worker saves: the same run with one and with two, its start-up included and apart.

python -m tests.executors.shards
python -m tests.executors.shards --device cuda --model random:llama-3.1-8b --tasks speed:lengths=32768:repeats=64

Seconds of the wall mean something on a machine that does nothing else. On a CPU shared with others the seconds that
each process had of it do: those that follow upon each other are added, of those side by side the most count.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil
import pytest

from harness.runner import fan_out as module
from harness.runner.answering import answer as real
from tests.command import run

LOG = "HARNESS_SHARDS_LOG"


class Unit(NamedTuple):
    """An order, and seconds when each record left it, from when it began; of the wall, and of its process's CPU.

    Attributes:
        place: number of the process that it was forked from.
        ahead: CPU seconds that this one had used.
        ended: the whole order.
        records: each record.
    """

    place: int
    ahead: float
    ended: tuple[float, float]
    records: list[tuple[float, float]]


def answer(order: bytes) -> Iterator[bytes]:
    """The real one; what it took goes to a file."""
    begun, records = time.perf_counter(), list[tuple[float, float]]()
    place = psutil.Process(os.getppid())
    ahead = sum(place.cpu_times()[:2])
    for message in real(order):
        if message.startswith(b'{"kind":"record"'):
            records.append((time.perf_counter() - begun, time.process_time()))
        yield message
    ended = time.perf_counter() - begun, time.process_time()
    with Path(os.environ[LOG]).open("a") as log:
        log.write(json.dumps(Unit(place.pid, ahead, ended, records)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", default="full,slim,lazyllm")
    parser.add_argument("--tasks", default="needle:lengths=512:depths=0.5:repeats=40")
    asked = vars(parser.parse_args())
    started = time.process_time()
    print(f"a driver's imports: {started:.1f} s of CPU")
    totals: dict[int, list[float]] = {}
    for workers in asked.pop("workers"):
        totals[workers] = measured(workers, asked)
        less = [now / before for now, before in zip(totals[workers], next(iter(totals.values())), strict=True)]
        parts = zip(("wall", "CPU", "requests on the wall", "their CPU"), less, strict=True)
        print("  of the first: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in parts), flush=True)


def measured(workers: int, options: dict[str, str]) -> list[float]:
    """Runs it. Returns seconds of the wall, of the CPU, and of requests alone, on the wall and the CPU."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        log = Path(name) / "log"
        patch.setenv(LOG, str(log))
        patch.setenv("OMP_NUM_THREADS", "1")  # each, also where one worker is alone
        patch.setattr(module, "ANSWER", "tests.executors.shards:answer")
        asked = [text for option, value in options.items() for text in (f"--{option}", value)]
        asked += ["--output", f"{name}/run", "--no-timing", "--executor", "local", "--workers", str(workers)]
        began, busy = time.perf_counter(), time.process_time()
        if code := run("run", *asked):
            raise SystemExit(code)
        wall, driver = time.perf_counter() - began, time.process_time() - busy
        survey, *units = [Unit(*json.loads(line)) for line in log.read_text().splitlines()]
    assert not survey.records
    imports, starts = survey.ahead, median(started(unit, 1) for unit in units)
    cpu = driver + imports + survey.ended[1] + longest(units, [unit.ended[1] for unit in units])
    alone = [[seconds - started(unit, clock) for clock, seconds in enumerate(unit.ended)] for unit in units]
    requests = [longest(units, [each[clock] for each in alone]) for clock in (0, 1)]
    print(
        f"{workers} workers, {len(units)} units, load {os.getloadavg()[0]:.1f}: {wall:.1f} s; of CPU {cpu:.1f} s: "
        f"the driver {driver:.1f}, imports {imports:.1f}, the list of requests {survey.ended[1]:.1f}, a unit until its "
        f"first request {starts:.1f}; requests {requests[0]:.1f} s, of CPU {requests[1]:.1f} s"
    )
    return [wall, cpu, *requests]


def started(unit: Unit, clock: int) -> float:
    """Seconds until its first request: its first record, without what a request takes."""
    ends = [record[clock] for record in unit.records]
    return max(0.0, ends[0] - median(end - before for before, end in zip(ends, ends[1:], strict=False)))


def longest(units: Sequence[Unit], seconds: Sequence[float]) -> float:
    """The most that the units of a place take together."""
    places: defaultdict[int, float] = defaultdict(float)
    for unit, took in zip(units, seconds, strict=True):
        places[unit.place] += took
    return max(places.values())


if __name__ == "__main__":
    main()
