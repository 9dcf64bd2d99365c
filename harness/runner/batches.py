"""`--batch`: a task's samples are asked some at a time, decoded together; each gets a record of its own.

Samples stay in their order, so a batch is the same however often a run is interrupted: where some of its records are
there already, all of it is asked again and the missing ones are kept. Conversations are refused: what comes in at a
later turn are many rows of one request.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

from harness.engine.batch import Batch
from harness.engine.replay.seating import Seatings
from harness.measuring.together import MeasuredBatch, measure_batch
from harness.runner.exclusions import check_turns
from harness.runner.execute import Job
from harness.runner.loaded import Cell
from harness.runner.order import order
from harness.runner.plan import CellSpec
from harness.runner.request import Bench, answer, attempted, release, stop_texts
from harness.runner.samples import Prompt, read_prompts
from harness.storage.record import Record


def batch_jobs(bench: Bench, cells: Sequence[CellSpec], done: Set[tuple[str, str]], seatings: Seatings) -> list[Job]:
    """A job for each record that is missing; the first one of a batch asks all of it.

    Args:
        bench: of the run.
        cells: of one task, which take turns in changing order.
        done: (hash of the cell, sample) of every record that there is.
        seatings: of the run's engine.

    Raises:
        InputError: the task's data turns out bad, or a sample has further questions.
    """
    run = bench.run
    prompts = read_prompts(run.plan.task(cells[0]), run.plan, run.model)
    check_turns(run.spec.batch, cells[0].task, turns=any(prompt.later for prompt in prompts))
    askers = [Asker(bench, cell, seatings) for cell in cells]
    size, jobs = run.spec.batch, list[Job]()
    for start in range(0, len(prompts), size):
        together = prompts[start : start + size]
        for place in order(len(askers), together[0].number // size):
            group = Group(askers[place], together)
            jobs += [
                partial(group.record, place)
                for place, prompt in enumerate(group.prompts)
                if (group.asker.hash, prompt.sample.id) not in done
            ]
    return jobs


class Asks(Protocol):
    """Asks prompts of one cell at once.

    Attributes:
        hash: of the cell.
    """

    hash: str

    def ask(self, prompts: Sequence[Prompt]) -> list[Record]:
        """Their records, in the order of the prompts."""


@dataclass(frozen=True)
class Group:
    """Prompts that are asked at once, when the first of their records is wanted."""

    asker: Asks
    prompts: Sequence[Prompt]

    @cached_property
    def _records(self) -> list[Record]:
        return self.asker.ask(self.prompts)

    def record(self, number: int) -> Record:
        """Of one of the prompts."""
        return self._records[number]


class Asker:
    """Asks batches of one cell.

    Attributes:
        hash: of the cell.
    """

    def __init__(self, bench: Bench, cell: CellSpec, seatings: Seatings) -> None:
        """
        Args:
            bench: of the run.
            cell: whose method gets an instance for each request.
            seatings: of the run's engine.
        """
        run = bench.run
        self._bench, self._cells = bench, [run.bind(cell, slot) for slot in range(run.spec.batch)]
        self._batch = Batch(run.engine, [one.method for one in self._cells], seatings)
        self._warm: set[tuple[int, int]] = set()
        self.hash = self._cells[0].hash

    def ask(self, prompts: Sequence[Prompt]) -> list[Record]:
        """A batch's records, in the order of its prompts."""
        there = [prompt.on(self._bench.run.device) for prompt in prompts]
        try:
            self._warm_up(there)
            return attempted(self._bench, self._cells[0], there, lambda: self._measured(there))
        finally:
            for cell in self._cells:
                release(cell.method)

    def _warm_up(self, prompts: Sequence[Prompt]) -> None:
        """A rehearsal of this batch where its size or its lengths are new."""
        key = len(prompts), max(len(prompt.request.prompt) for prompt in prompts).bit_length()
        if key in self._warm:
            return
        self._warm.add(key)
        # Out of memory, or a fault of the method: the batch itself will find that out.
        with suppress(Exception):
            self._batch.rehearse([prompt.request for prompt in prompts])

    def _measured(self, prompts: Sequence[Prompt]) -> list[Record]:
        run = self._bench.run
        ended = [stop_texts(run, prompt) for prompt in prompts]
        stopwatch = run.engine.context.stopwatch if run.spec.parts else None
        found = measure_batch(self._batch, [prompt.request for prompt in prompts], ended, stopwatch, self._bench.meter)
        each = zip(self._cells, prompts, found.each, strict=False)
        return [
            Record(**answer(self._bench, cell, prompt, measured) | _facts(cell, found))
            for cell, prompt, measured in each
        ]


def _facts(cell: Cell, found: MeasuredBatch) -> dict[str, Any]:
    rate = None if cell.method.simulated else found.tokens_per_s
    return {"batch": len(found.each), "batch_tokens_per_s": rate}
