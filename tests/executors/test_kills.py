"""Workers and drivers killed at random moments: the run, resumed by the same command, ends as if nothing had happened.

HARNESS_KILLS=20 kills twenty times instead of four, and on Ray too, where that takes its time;
HARNESS_KILL_SEED draws other moments.
"""

from __future__ import annotations

import importlib.util
import os
import random
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from harness.executors.fleet import Fleet
from harness.storage.store import load_manifest
from tests.executors.runs import comparable, expected, keys, light_run, settle, start_light

pytestmark = pytest.mark.cluster

KILLS = int(os.environ.get("HARNESS_KILLS", "4"))
SEED = int(os.environ.get("HARNESS_KILL_SEED", "0"))
EACH = 20
_WORKERS = {"local": ["harness.executors.process"], "ray": ["harness.executors.process", "ray::_carry_out"]}
_PAUSE = {"local": (0.05, 1.5), "ray": (0.5, 6.0)}
"""Seconds between two kills; Ray's workers take longer to begin."""


@pytest.mark.parametrize(
    "kind",
    [
        "local",
        pytest.param(
            "ray",
            marks=pytest.mark.skipif(
                not importlib.util.find_spec("ray") or "HARNESS_KILLS" not in os.environ,
                reason="Ray is not installed, or HARNESS_KILLS not set",
            ),
        ),
    ],
)
def test_a_run_whose_workers_and_drivers_are_killed_ends_like_one_that_was_left_alone(
    kind: str, tmp_path: Path
) -> None:
    whole, broken, moments, samples = tmp_path / "whole", tmp_path / "broken", random.Random(SEED), EACH * KILLS
    settle(whole, samples)
    light_run(whole, Fleet("local", workers=2))
    settle(broken, samples, seconds=0.1)
    fleet, killed = Fleet(kind, workers=2), Counter[str]()
    while killed.total() < KILLS:
        driver = start_light(broken, fleet)
        while killed.total() < KILLS and driver.is_alive():
            time.sleep(moments.uniform(*_PAUSE[kind]))
            killed.update(victims(driver, kind, moments, driver_too=killed.total() % 4 == 3))
        driver.kill()
        driver.join()
    assert 0 < len(keys_so_far(broken)) < 2 * samples, "the kills came before the first answer, or behind the last"
    settle(broken, samples)
    assert light_run(broken, Fleet("local", workers=2)) == []
    print(f"{kind}: killed {dict(killed)}")
    assert comparable(broken / "run") == comparable(whole / "run") and keys(broken / "run") == expected(samples)
    assert load_manifest(broken / "run").status == "complete" and killed["worker"] and killed["driver"]


def victims(driver: BaseProcess, kind: str, moments: random.Random, *, driver_too: bool) -> list[str]:
    """Kills a worker's process, or what it was forked from, or Ray's worker above; or while there is one the driver.

    Returns:
        Which it was, if there was one.
    """
    assert driver.pid is not None
    try:
        workers = [one for one in psutil.Process(driver.pid).children(recursive=True) if is_worker(one, kind)]
    except psutil.NoSuchProcess:  # it has just ended by itself
        return []
    if not workers:
        return []
    if driver_too:
        driver.kill()
        driver.join()
        return ["driver"]
    moments.choice(workers).kill()
    return ["worker"]


def is_worker(process: psutil.Process, kind: str) -> bool:
    try:
        command = " ".join(process.cmdline())
        return any(name in command for name in _WORKERS[kind])
    except psutil.NoSuchProcess:
        return False


def keys_so_far(folder: Path) -> list[tuple[str, str]]:
    return keys(folder / "run") if (folder / "run/samples.jsonl").exists() else []
