"""The worker behind `harness run`: every method answers the same samples in turn, warmed up, timed and scored.

The order of methods changes with every sample (`harness.runner.order`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from harness.engine.engine import Engine
from harness.engine.parallel import ALONE, Ranks
from harness.engine.replay.seating import Seatings
from harness.engine.request import Request
from harness.engine.session import Session
from harness.measuring.clock import synchronize
from harness.measuring.energy import EnergyMeter
from harness.measuring.gpu import GpuMonitor
from harness.measuring.roofline import NO_CEILINGS, ceilings
from harness.runner.arrivals import arrival_jobs
from harness.runner.batches import batch_jobs
from harness.runner.conversation import Conversation
from harness.runner.execute import Job
from harness.runner.faults import told
from harness.runner.loaded import Cell, load_run
from harness.runner.order import order
from harness.runner.plan import CellSpec, Plan, plan
from harness.runner.request import Bench, release
from harness.runner.samples import Prompt, read_prompts
from harness.runner.spec import RunSpec
from tasks.common.load import load_of


class MethodWorker:
    """A `harness.runner.execute.Worker` that measures requests under methods."""

    @staticmethod
    def plan(spec: RunSpec) -> Plan:
        """Of `harness run`."""
        return plan(spec)

    def __init__(self, plan: Plan, ranks: Ranks = ALONE) -> None:
        """Loads the model, or this rank's part of it.

        Raises:
            InputError: it cannot be loaded, or the kernels that are asked for do not serve it.
        """
        run = load_run(plan, ranks)
        measured = run.spec.timing and ranks.rank == 0
        limits = ceilings(run.device, run.model.model.dtype) if measured else NO_CEILINGS
        monitor = gpu_monitor(run.device)
        synchronize(run.device)
        meter = EnergyMeter(monitor.energy_j if monitor is not None else lambda: None)
        self._bench, self._warm_up = Bench(run, limits, monitor, meter), WarmUp(run.engine, run.device)
        self._seatings = Seatings(run.engine)

    def under(self, plan: Plan) -> MethodWorker:
        """The worker of another plan of the same model and engine: nothing is loaded, recorded or warmed up again."""
        other = copy(self)
        other._bench = replace(self._bench, run=self._bench.run.under(plan))
        return other

    def facts(self) -> dict[str, Any]:
        """Of the loaded run."""
        return self._bench.run.facts()

    def jobs(self, cells: Sequence[CellSpec], done: Set[tuple[str, str]]) -> list[Job]:
        """Sample by sample, the methods in changing order."""
        run = self._bench.run
        if run.spec.batch > 1:
            return batch_jobs(self._bench, cells, done, self._seatings)
        if load := load_of(run.plan.task(cells[0])):
            return arrival_jobs(self._bench, cells, done, load, self._seatings)
        bound = [run.bind(cell) for cell in cells]
        prompts = read_prompts(bound[0].task, run.plan, run.model)
        return [job for prompt, cell in _in_turn(prompts, bound) for job in self._jobs(bound, cell, prompt, done)]

    def _jobs(self, cells: Sequence[Cell], cell: Cell, prompt: Prompt, done: Set[tuple[str, str]]) -> list[Job]:
        """One for each question of the prompt that has no record."""
        turns = enumerate((prompt, *prompt.later))
        wanted = [number for number, turn in turns if (cell.hash, turn.sample.id) not in done]
        conversation = Conversation(self._bench, cell, prompt, partial(self._ready, prompt, cells))
        return [partial(conversation.record, number, last=number == wanted[-1]) for number in wanted]

    def _ready(self, prompt: Prompt, cells: Sequence[Cell]) -> None:
        if self._bench.run.spec.timing:
            self._warm_up.before(prompt, cells)


def gpu_monitor(device: torch.device) -> GpuMonitor | None:
    """What is asked about the GPU of a run; None on a CPU."""
    return GpuMonitor(device.index or 0) if device.type == "cuda" else None


def _in_turn(prompts: Sequence[Prompt], cells: Sequence[Cell]) -> Iterator[tuple[Prompt, Cell]]:
    for prompt in prompts:
        for place in order(len(cells), prompt.number):
            yield prompt, cells[place]


class WarmUp:
    """Runs every method once, unrecorded, where prompts are of a new length: kernels and memory may be cold.

    Of a conversation also the second question, which comes in otherwise than the first.
    """

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._engine, self._device = engine, device
        self._seen: defaultdict[tuple[str, bool], list[int]] = defaultdict(list)

    def before(self, prompt: Prompt, cells: Sequence[Cell]) -> None:
        """Warms a method up unless it ran a prompt within an eighth of this one's length, in whichever task."""
        length = len(prompt.request.prompt)
        for cell in cells:
            lengths = self._seen[cell.label, bool(prompt.later)]
            if all(abs(length - seen) > seen / 8 for seen in lengths):
                lengths.append(length)
                self._warm(cell, prompt)

    def _warm(self, cell: Cell, prompt: Prompt) -> None:
        """One prefill and one decode step: kernels are loaded, pages are mapped, and nothing stays."""
        asked = [each.on(self._device).request.prompt for each in (prompt, *prompt.later[:1])]
        session, follows = Session(self._engine, cell.method), sum(len(ids) + 2 for ids in asked[1:])
        try:
            for ids in asked:
                list(session.stream(Request(ids, 2, follows=follows)))
            cell.method.end()
        except Exception as error:
            # Out of memory, or a fault of the method: the request itself will find that out, and record it.
            release(cell.method)
            self._engine.context.ranks.regroup(f"{cell.label}: {told(type(cell.method), error)}")
