"""What a second worker saves: the same run with one and with two, its start-up included and apart.

python -m tests.executors.shards
python -m tests.executors.shards --device cuda --model random:llama-3.1-8b --methods full,snapkv,quest,slim,lazyllm \
    --tasks speed:lengths=32768:repeats=12:new_tokens=256

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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil
import pytest

from harness.grammar import parse_sums
from harness.runner import fan_out as module
from harness.runner.answering import answer as real
from tests.command import run

LOG = "HARNESS_SHARDS_LOG"
CLOCKS = ("wall", "CPU")
Seconds = tuple[float, float]
"""Of the wall, and of the CPU."""


class Unit(NamedTuple):
    """An order, and what it took.

    Attributes:
        place: number of the process that it was forked from.
        ahead: how long that one had been there.
        ended: the whole order.
        records: until each record left it.
    """

    place: int
    ahead: Seconds
    ended: Seconds
    records: list[Seconds]


class Clocked:
    """The real answers; what they took goes to a file."""

    ahead = staticmethod(real.ahead)

    def __call__(self, order: bytes) -> Iterator[bytes]:
        """See `harness.executors.executor.Answer`."""
        began, records = time.perf_counter(), list[Seconds]()
        place = psutil.Process(os.getppid())
        ahead = time.time() - place.create_time(), sum(place.cpu_times()[:2])
        for message in real(order):
            if message.startswith(b'{"kind":"record"'):
                records.append((time.perf_counter() - began, time.process_time()))
            yield message
        ended = time.perf_counter() - began, time.process_time()
        with Path(os.environ[LOG]).open("a") as log:
            log.write(json.dumps(Unit(place.pid, ahead, ended, records)) + "\n")


answer = Clocked()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", default="full,slim,lazyllm")
    parser.add_argument("--tasks", default="needle:lengths=512:depths=0.5:repeats=40")
    asked = vars(parser.parse_args())
    print(f"a driver's imports: {time.process_time():.1f} s of CPU")
    first: Mapping[str, Seconds] = {}
    for workers in asked.pop("workers"):
        parts = measured(workers, asked)
        first = first or parts
        for part, seconds in parts.items():
            pairs = zip(CLOCKS, seconds, first[part], strict=True)
            print(f"  {part:32}" + "".join(f"{clock:>8} {now:7.1f} s, {now / of:.3f}" for clock, now, of in pairs))
    fixed = [whole - busy for whole, busy in zip(first["all"], first["requests"], strict=True)]
    print("two take 0.55 from requests of " + " and ".join(f"{9 * each:.0f} s" for each in fixed) + " on", flush=True)


def measured(workers: int, options: dict[str, str]) -> dict[str, Seconds]:
    """Runs it; what its parts took, and all of them."""
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
    methods = len(parse_sums(options["methods"]))
    starts = [[started(unit, clock, methods) for unit in units] for clock in (0, 1)]
    whole = [longest(units, [unit.ended[clock] for unit in units]) for clock in (0, 1)]
    until = [longest(units, each) for each in starts]
    cpu = driver + survey.ahead[1] + survey.ended[1] + whole[1]
    print(
        f"{workers} workers, {len(units)} units, load {os.getloadavg()[0]:.1f}; seconds, and of those of the first run:"
    )
    return {
        "the driver, behind its imports": (wall - survey.ahead[0] - survey.ended[0] - whole[0], driver),
        "a place: imports, samples": survey.ahead,
        "the list of requests": survey.ended,
        "a unit until its first request": (median(starts[0]), median(starts[1])),
        "the units of a place until then": (until[0], until[1]),
        "requests": (whole[0] - until[0], whole[1] - until[1]),
        "all": (wall, cpu),
    }


def started(unit: Unit, clock: int, methods: int) -> float:
    """Seconds until its first request: until its first sample is answered, without what a sample takes."""
    ends = [record[clock] for record in unit.records][methods - 1 :: methods]
    return max(0.0, ends[0] - median(end - before for before, end in zip(ends, ends[1:], strict=False)))


def longest(units: Sequence[Unit], seconds: Sequence[float]) -> float:
    """The most that the units of a place take together."""
    places: defaultdict[int, float] = defaultdict(float)
    for unit, took in zip(units, seconds, strict=True):
        places[unit.place] += took
    return max(places.values())


if __name__ == "__main__":
    main()
