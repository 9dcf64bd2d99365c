"""`kill -9` at random moments: the run, resumed by the same command, ends as if nothing had happened.

HARNESS_KILLS=30 kills thirty times instead of three; HARNESS_KILL_SEED draws other moments.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from harness.storage.samples import SAMPLES
from harness.storage.store import load_manifest
from tests.process import start
from tests.test_cli import _has_records, random_model

pytestmark = pytest.mark.cluster

KILLS = int(os.environ.get("HARNESS_KILLS", "3"))
EACH = 4
SEED = int(os.environ.get("HARNESS_KILL_SEED", "0"))
CLOCKS = {"device_state", "peak_memory_bytes", "worker"}
"""Fields that differ from run to run, beside those whose names end in `_s`."""


def started(folder: Path) -> BaseProcess:
    # Samples enough for every kill: a kill answers fewer than these, so the last ones find something to do, too.
    place = ["--model", random_model(folder.parent), "--output", folder]
    tasks = f"needle:lengths=192:depths=0.5:repeats={EACH * KILLS}:new_tokens=4"
    return start("run", "--methods", "full,slim,lazyllm", "--tasks", tasks, *place)


def finish(folder: Path) -> None:
    process = started(folder)
    process.join(600)
    assert process.exitcode == 0


def killed(folder: Path, moments: random.Random) -> str:
    """Starts the run, kills it at a random moment and says in which phase it was."""
    before, process = lines(folder), started(folder)
    if moments.random() < 0.25:
        time.sleep(moments.uniform(0, 2))
    else:
        answered(folder, before + moments.randint(1, 2 * EACH), process)
        time.sleep(moments.uniform(0, 0.05))
    process.kill()
    process.join()
    assert process.exitcode in (-signal.SIGKILL, 0)
    if process.exitcode == 0:
        return "finished"
    return "starting" if lines(folder) == before else "answering"


def answered(folder: Path, count: int, process: BaseProcess) -> None:
    while lines(folder) < count and process.is_alive():
        time.sleep(0.005)


def lines(folder: Path) -> int:
    return (folder / SAMPLES).read_bytes().count(b"\n") if _has_records(folder) else 0


def comparable(folder: Path) -> list[dict[str, Any]]:
    """All records, in their order, without clocks; read as plain JSON lines, not through the store."""
    rows = [json.loads(line) for line in (folder / SAMPLES).read_text(encoding="utf-8").split("\n")[:-1]]
    return [{k: v for k, v in row.items() if not k.endswith("_s") and k not in CLOCKS} for row in rows]


def test_a_run_that_is_killed_again_and_again_ends_like_one_that_was_not(tmp_path: Path) -> None:
    whole, broken, moments = tmp_path / "whole", tmp_path / "broken", random.Random(SEED)
    finish(whole)
    phases = [killed(broken, moments) for _ in range(KILLS)]
    finish(broken)
    print(f"{KILLS} kills: {', '.join(phases)}")
    assert comparable(broken) == comparable(whole)
    keys = [(row["cell"], row["sample"]) for row in comparable(broken)]
    assert len(keys) == len(set(keys)) == 3 * EACH * KILLS
    ended, expected = load_manifest(broken), load_manifest(whole)
    assert ended.status == "complete" and (ended.facts, ended.spec) == (expected.facts, expected.spec)
    assert "answering" in phases and {path.name for path in broken.iterdir()} == {path.name for path in whole.iterdir()}
