"""Runs a study so that what is recorded is balanced whenever it ends: by an hour that is over, Ctrl-C or a crash.

A portion, one part at one budget and length, is done before the next one begins, so that what there was time for is a
whole table. In it every run gets one sample of each task first, then two, four, and so on to its limit; all methods
answer a sample before the next one is asked. So of any two tasks of the portion that stopped one has at most twice the
samples of the other, and no method has easier ones. Each stage is `harness.runner.execute` with another limit, which is
no part of a run's identity; model, engine and what was recorded and warmed up stay from one stage and run to the next.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console

from harness.runner.execute import execute
from harness.runner.plan import Plan, plan
from harness.runner.progress import Advance, Progress
from harness.runner.spec import RunSpec
from harness.runner.worker import MethodWorker
from harness.storage.record import Record
from harness.storage.store import MANIFEST, load_manifest
from harness.study.changed import changed
from harness.study.runs import StudyRun

UNLIMITED = 10**6
"""Samples of a part without a limit: more than any task has."""


class TimeIsUp(Exception):
    """The minutes that a study was given are over; raised between two requests, the last of them recorded."""


class Timed(Progress):
    """Progress that ends what it watches."""

    def __init__(self, console: Console, deadline: float) -> None:
        """Args:
        console: where to print.
        deadline: on `time.monotonic`; infinite for none.
        """
        super().__init__(console)
        self._deadline = deadline

    def check(self) -> None:
        """Raises `TimeIsUp` if it is."""
        if time.monotonic() >= self._deadline:
            raise TimeIsUp

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        """As `Progress`; looks at the clock behind every record."""
        self.check()
        with super().task(label, total) as advance:
            yield self._checked(advance)

    def _checked(self, advance: Advance) -> Advance:
        def checked(record: Record) -> None:
            advance(record)
            self.check()

        return checked


_SHARED = ("model", "device", "dtype", "attention", "engine", "timing", "batch", "memory_limit")
"""Options of runs that one worker can serve: what it loads and builds."""


class Workers:
    """The worker of each run: the last one, if model and engine are the same, so that nothing is warmed up again."""

    def __init__(self) -> None:
        """None yet."""
        self._key: tuple[object, ...] | None = None
        self._worker: MethodWorker | None = None

    def __call__(self, planned: Plan) -> MethodWorker:
        """Made, or made of the last one."""
        key = tuple(getattr(planned.spec, name) for name in _SHARED)
        if self._worker is not None and self._key == key:
            self._worker = self._worker.under(planned)
        else:
            # The last model goes before the next one comes: its engine is in cycles, and nothing else frees it in time.
            self._key, self._worker = None, None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._key, self._worker = key, MethodWorker(planned)
        return self._worker


def run_study(
    runs: Sequence[StudyRun], folder: Path, progress: Timed, samples: int | None = None
) -> tuple[bool, list[str]]:
    """Runs, or resumes, the runs of a study, stage by stage.

    Args:
        runs: most important first.
        folder: of the study.
        progress: is told of every record.
        samples: of each task at most, if fewer than the study's own.

    Returns:
        Whether all is recorded, and a line for each method that failed on a task.

    Raises:
        InputError: a folder is of another run, a model cannot be loaded, or data turns out bad.
    """
    workers, failures = Workers(), dict[str, None]()
    try:
        for run, limit in stages(runs, samples):
            progress.check()
            spec = run.spec.model_copy(update={"limit": limit})
            if not _passed(spec, folder / run.folder):
                failures |= dict.fromkeys(execute(plan(spec), folder / run.folder, progress, workers))
    except TimeIsUp:
        return False, list(failures)
    return True, list(failures)


def stages(runs: Sequence[StudyRun], samples: int | None = None) -> Iterator[tuple[StudyRun, int]]:
    """Portion by portion, the runs that differ in protocol alone with a limit of 1, then 2, 4, ... up to their own."""
    for _, portion in groupby(runs, key=lambda run: (run.budget, run.part, run.length)):
        left, limit = list(portion), 1
        most = {run.folder: min(run.spec.limit or UNLIMITED, samples or UNLIMITED) for run in left}
        while left:
            yield from ((run, min(limit, most[run.folder])) for run in left)
            left = [run for run in left if most[run.folder] > limit]
            limit = limit * 2 if any(most[run.folder] < UNLIMITED for run in left) else UNLIMITED


def _passed(spec: RunSpec, folder: Path) -> bool:
    """Whether this stage of a run has ended: it is complete, or a later one has begun, which asks again what failed.

    Not where answers of other code are asked again: that goes through the stages like the first time.
    """
    if not (folder / MANIFEST).is_file():
        return False
    found = load_manifest(folder)
    reached, limit = (asked or UNLIMITED for asked in (found.spec.get("limit"), spec.limit))
    ended = reached > limit or (reached == limit and found.status == "complete")
    return found.run_hash == spec.run_hash() and ended and not (spec.redo and changed(spec, folder).cells)
