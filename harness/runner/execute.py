"""Runs a plan: a worker runs its requests one by one, and each record is stored before the next request starts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

from harness.measuring.provenance import environment, worker
from harness.runner.changes import check_code
from harness.runner.failures import Failures
from harness.runner.plan import CellSpec, Plan
from harness.runner.progress import Progress
from harness.runner.spec import RunSpec
from harness.storage.record import Record
from harness.storage.store import RunStore

Job = Callable[[], Record]
"""Runs one request when it is called."""
Key = tuple[str, str]
"""A request: hash of its cell, and its sample's id."""


class Worker(Protocol):
    """Holds a loaded model and runs requests. It knows neither store nor terminal, and is made of a plan alone."""

    @staticmethod
    def plan(spec: RunSpec) -> Plan:
        """The plan of a specification, made again in whatever process."""

    def __init__(self, plan: Plan) -> None:
        """Loads the model.

        Raises:
            InputError: it cannot be loaded.
        """

    def facts(self) -> dict[str, Any]:
        """What is known of the run only now that the model is loaded."""

    def jobs(self, cells: Sequence[CellSpec], done: Set[Key]) -> list[Job]:
        """The requests of one task's cells, in their order.

        Args:
            cells: of one task.
            done: every request that is not to be run; each one is looked for in it, in their order.

        Raises:
            InputError: the task's data turns out bad.
        """


def execute(plan: Plan, folder: Path, progress: Progress, start: Callable[[Plan], Worker]) -> list[str]:
    """Runs, or resumes, a plan and leaves `folder` complete, or marked incomplete if it is stopped or requests failed.

    `harness.runner.fan_out` does the same with other processes and machines.

    Args:
        plan: what to do.
        folder: where the records go.
        progress: is told of every record.
        start: makes the worker; called once the folder is known to be the plan's.

    Returns:
        A line for each cell of which requests failed.

    Raises:
        InputError: the folder is of another run, or of other code, the model cannot be loaded, or data turns out bad.
    """
    with RunStore(folder, plan.manifest(), environment()) as store:
        check_code(plan, store, progress)
        answering, failures, here = start(plan), Failures(), worker(plan.device.type)
        store.describe(**answering.facts())
        # All data is read before the first request; what a task needs goes when the task is done.
        tasks = deque((cells[0].task, answering.jobs(cells, store.done)) for cells in plan.cells())
        while tasks:
            task, jobs = tasks.popleft()
            with progress.task(task, len(jobs)) as advance:
                for job in jobs:
                    record = answered_by(here, job)
                    store.append(record)
                    failures.count(record)
                    advance(record)
        store.finish(failures.lines())
    return failures.lines()


def answered_by(worker: dict[str, Any], job: Job) -> Record:
    """Runs a request; its record says who did, beside what it knows of that itself."""
    record = job()
    return record.model_copy(update={"worker": worker | (record.worker or {})})
