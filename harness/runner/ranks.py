"""`--tensor-parallel N`: one model over N devices of this machine, a process each (`harness.runner.team`).

This process is the first rank. Each makes a record of its part of a request; the first one joins them, and it alone
writes. What is stored when a run ends stays, and the run resumes.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence, Set
from functools import partial
from typing import Any

from harness.runner.execute import Job, Key
from harness.runner.joined import joined
from harness.runner.orders import Noted
from harness.runner.plan import CellSpec, Plan
from harness.runner.spec import RunSpec
from harness.runner.team import Team
from harness.runner.worker import MethodWorker
from harness.storage.record import Record


class RankedWorker:
    """A `harness.runner.execute.Worker` whose model is spread over as many devices as its plan says."""

    @staticmethod
    def plan(spec: RunSpec) -> Plan:
        """Of `harness run`."""
        return MethodWorker.plan(spec)

    def __init__(self, plan: Plan) -> None:
        """Starts the other ranks; all load their parts of the model.

        Raises:
            InputError: on any of them it cannot be loaded.
        """
        self._team = Team(plan)
        self._held = [self._team.load(plan)]
        self._jobs = 0
        weakref.finalize(self, _end, self._team, self._held)

    @property
    def _own(self) -> MethodWorker:
        return self._held[0]

    def facts(self) -> dict[str, Any]:
        """Of the loaded run."""
        return self._own.facts()

    def jobs(self, cells: Sequence[CellSpec], done: Set[Key]) -> list[Job]:
        """As `MethodWorker.jobs`, on all ranks."""
        noted = Noted(done)
        jobs, first = self._team.during(lambda: self._own.jobs(cells, noted)), self._jobs
        self._jobs += len(jobs)
        self._team.during(lambda: self._team.tell((cells[0].task, noted.found)))
        return [partial(self._run, number, job) for number, job in enumerate(jobs, first)]

    def _run(self, number: int, job: Job) -> Record:
        def together() -> Record:
            self._team.tell(number)
            return joined([job(), *self._team.records()], self._team.who)

        return self._team.during(together)


def _end(team: Team, held: list[MethodWorker]) -> None:
    # What was recorded with sums in it goes first: NCCL waits for that.
    held.clear()
    gc.collect()
    team.close()


def worker_of(spec: RunSpec) -> type[MethodWorker] | type[RankedWorker]:
    """Who answers a run's requests."""
    return MethodWorker if spec.tensor_parallel == 1 else RankedWorker
