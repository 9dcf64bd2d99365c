"""`kill -9` at random moments: the run, resumed by the same command, ends as if nothing had happened.

HARNESS_KILLS=30 kills thirty times instead of three; HARNESS_KILL_SEED draws other moments.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from harness.storage.store import SAMPLES, load_manifest
from tests.test_cli import _has_records

KILLS = int(os.environ.get("HARNESS_KILLS", "3"))
SEED = int(os.environ.get("HARNESS_KILL_SEED", "0"))
COMMAND = [sys.executable, "-c", "from harness.cli import main; main()", "run", "--methods", "full,slim,lazyllm"]
CLOCKS = {"device_state", "peak_memory_bytes"}
"""Fields that differ from run to run, beside those whose names end in `_s`."""


def command(folder: Path) -> list[str]:
    # A sample for each kill and method: kills answer fewer than that, so the last ones find something to do, too.
    tasks = f"needle:lengths=192:depths=0.5:repeats={KILLS}:new_tokens=4"
    return [*COMMAND, "--tasks", tasks, "--output", str(folder)]


def finish(folder: Path) -> None:
    subprocess.run(command(folder), check=True, capture_output=True, timeout=600)


def killed(folder: Path, moments: random.Random) -> str:
    """Starts the run, kills it at a random moment and says in which phase it was."""
    before = lines(folder)
    with subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        if moments.random() < 0.25:
            time.sleep(moments.uniform(0, 8))
        else:
            answered(folder, before + moments.randint(1, 4), process)
            time.sleep(moments.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
    assert process.returncode in (-signal.SIGKILL, 0)
    if process.returncode == 0:
        return "finished"
    return "starting" if lines(folder) == before else "answering"


def answered(folder: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    while lines(folder) < count and process.poll() is None:
        time.sleep(0.005)


def lines(folder: Path) -> int:
    return (folder / SAMPLES).read_bytes().count(b"\n") if _has_records(folder) else 0


def comparable(folder: Path) -> list[dict[str, Any]]:
    """All records, in their order, without clocks; read as plain JSON lines, not through the store."""
    rows = [json.loads(line) for line in (folder / SAMPLES).read_text(encoding="utf-8").split("\n")[:-1]]
    return [{k: v for k, v in row.items() if not k.endswith("_s") and k not in CLOCKS} for row in rows]


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_was_not(tmp_path: Path) -> None:
    whole, broken, moments = tmp_path / "whole", tmp_path / "broken", random.Random(SEED)
    finish(whole)
    phases = [killed(broken, moments) for _ in range(KILLS)]
    finish(broken)
    print(f"{KILLS} kills: {', '.join(phases)}")
    assert comparable(broken) == comparable(whole)
    keys = [(row["cell"], row["sample"]) for row in comparable(broken)]
    assert len(keys) == len(set(keys)) == 3 * KILLS
    ended, expected = load_manifest(broken), load_manifest(whole)
    assert ended.status == "complete" and (ended.facts, ended.spec) == (expected.facts, expected.spec)
    assert "answering" in phases and {path.name for path in broken.iterdir()} == {path.name for path in whole.iterdir()}
