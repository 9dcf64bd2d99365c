"""Tasks under load: a method is asked all samples of a task as they arrive; each gets a record of its own.

All methods get the same requests at the same seconds. Where some records of a load are there already, all of it is
served again and the missing ones are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from contextlib import suppress
from functools import partial
from typing import Any

from harness.engine.continuous import Continuous
from harness.engine.replay.seating import Seatings
from harness.engine.request import Request
from harness.errors import InputError
from harness.measuring.arrivals import Arriving, Visit, WallClock, serve
from harness.measuring.clock import Measured
from harness.runner.batches import Group
from harness.runner.execute import Job
from harness.runner.plan import CellSpec
from harness.runner.request import Bench, answer, attempted, release, stop_texts
from harness.runner.samples import Prompt, read_prompts
from harness.storage.record import Arrival, Record
from tasks.common.load import Load

REHEARSALS = 2
"""Requests that are served together, unrecorded, ahead of a load."""
_NEVER_MEASURED = dict.fromkeys(("decode_read_bytes", "decode_floor_s", "decode_bus_bytes", "decode_bus_floor_s"))
"""A request's steps are of ever other batches, so no number of bytes is theirs."""


def arrival_jobs(
    bench: Bench, cells: Sequence[CellSpec], done: Set[tuple[str, str]], load: Load, seatings: Seatings
) -> list[Job]:
    """A job for each record that is missing; the first one of a method serves all of its requests.

    Args:
        bench: of the run.
        cells: of one task.
        done: (hash of the cell, sample) of every record that there is.
        load: of the task.
        seatings: of the run's engine.

    Raises:
        InputError: the task's data turns out bad, or a sample is none that can be asked beside others.
    """
    task = bench.run.plan.task(cells[0])
    prompts = read_prompts(task, bench.run.plan, bench.run.model)
    if any(prompt.later or prompt.sample.choices for prompt in prompts):
        raise InputError(f"{task.label}: samples with follow-ups or choices cannot arrive at a rate")
    groups = [Group(ArrivalAsker(bench, cell, load, seatings), prompts) for cell in cells]
    return [
        partial(group.record, place)
        for group in groups
        for place, prompt in enumerate(prompts)
        if (group.asker.hash, prompt.sample.id) not in done
    ]


class ArrivalAsker:
    """Serves one cell's requests as they arrive.

    Attributes:
        hash: of the cell.
    """

    def __init__(self, bench: Bench, cell: CellSpec, load: Load, seatings: Seatings) -> None:
        """
        Args:
            bench: of the run.
            cell: whose method gets an instance for each place.
            load: of its task.
            seatings: of the run's engine.
        """
        run = bench.run
        self._bench, self._load = bench, load
        self._cells = [run.bind(cell, place) for place in range(load.most)]
        self._batch = Continuous(run.engine, [one.method for one in self._cells], seatings)
        self.hash = self._cells[0].hash

    def ask(self, prompts: Sequence[Prompt]) -> list[Record]:
        """The records of all requests, in the order of the prompts."""
        there = [prompt.on(self._bench.run.device) for prompt in prompts]
        try:
            self._warm_up([prompt.request for prompt in there])
            return attempted(self._bench, self._cells[0], there, lambda: self._served(there))
        finally:
            with suppress(Exception):
                self._batch.end()
            for cell in self._cells:
                release(cell.method)

    def _warm_up(self, requests: Sequence[Request]) -> None:
        """A prefill of each length, then steps of every number of requests: whatever is recorded is recorded here."""
        # Out of memory, or a fault of the method: the load itself will find that out.
        with suppress(Exception):
            for request in {len(request.prompt): request for request in requests}.values():
                self._batch.leave(self._batch.join(request))
            # The longest first: seats for them serve all.
            longest = sorted(requests, key=lambda request: len(request.prompt), reverse=True)
            for request in longest[: min(REHEARSALS, self._load.most)]:
                if not self._batch.join(request).done:
                    self._batch.record()
                    self._batch.step()
        with suppress(Exception):
            self._batch.end()

    def _served(self, prompts: Sequence[Prompt]) -> list[Record]:
        run, found = self._bench.run, dict[int, Record]()
        seconds = self._load.arrivals(len(prompts), run.spec.seed)
        coming = [
            Arriving(second, prompt.request, stop_texts(run, prompt))
            for second, prompt in zip(seconds, prompts, strict=True)
        ]

        def leaves(visit: Visit, measured: Measured) -> None:
            found[visit.number] = self._record(prompts[visit.number], visit, measured)

        joules = serve(self._batch, coming, WallClock(), leaves, self._bench.meter)
        share = {"energy_j": None if joules is None else joules / len(prompts)}
        return [found[number].model_copy(update=share) for number in range(len(prompts))]

    def _record(self, prompt: Prompt, visit: Visit, measured: Measured) -> Record:
        (cell,) = (cell for cell in self._cells if cell.method is visit.slot.method)
        values = answer(self._bench, cell, prompt, measured)
        return Record(**values | _NEVER_MEASURED | {"arrival": _arrival(self._load, visit)})


def _arrival(load: Load, visit: Visit) -> dict[str, Any]:
    return Arrival(
        rate=load.rate if math.isfinite(load.rate) else None,
        most=load.most,
        arrival_s=visit.arrived,
        start_s=visit.start,
        first_token_s=visit.tokens[0],
        last_token_s=visit.tokens[-1],
        batch_sizes=visit.sizes,
        replayed=visit.replayed,
        captures=visit.slot.work.captures,
    ).model_dump()
