"""Runs a plan: a worker runs its requests one by one, and each record is stored before the next request starts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

from harness.measuring.provenance import environment
from harness.runner.failures import Failures
from harness.runner.plan import CellSpec, Plan
from harness.runner.progress import Progress
from harness.storage.record import Record
from harness.storage.store import RunStore

Job = Callable[[], Record]
"""Runs one request when it is called."""


class Worker(Protocol):
    """Holds a loaded model and runs requests. It knows neither store nor terminal, and is made of a plan alone."""

    def facts(self) -> dict[str, Any]:
        """What is known of the run only now that the model is loaded."""

    def jobs(self, cells: Sequence[CellSpec], done: Set[tuple[str, str]]) -> list[Job]:
        """The requests of one task's cells, in their order.

        Args:
            cells: of one task.
            done: (hash of the cell, sample) of every record that there is.

        Raises:
            InputError: the task's data turns out bad.
        """


def execute(plan: Plan, folder: Path, progress: Progress, start: Callable[[Plan], Worker]) -> list[str]:
    """Runs, or resumes, a plan and leaves `folder` complete, or marked incomplete if it is stopped or requests failed.

    Args:
        plan: what to do.
        folder: where the records go.
        progress: is told of every record.
        start: makes the worker; called once the folder is known to be the plan's.

    Returns:
        A line for each cell of which requests failed.

    Raises:
        InputError: the folder is of another run, the model cannot be loaded, or data turns out bad.
    """
    with RunStore(folder, plan.manifest(), environment()) as store:
        worker, failures = start(plan), Failures()
        store.describe(**worker.facts())
        # All data is read before the first request; what a task needs goes when the task is done.
        tasks = deque((cells[0].task, worker.jobs(cells, store.done)) for cells in plan.cells())
        while tasks:
            task, jobs = tasks.popleft()
            with progress.task(task, len(jobs)) as advance:
                for job in jobs:
                    record = job()
                    store.append(record)
                    failures.count(record)
                    advance(record)
        store.finish(failures.lines())
    return failures.lines()
