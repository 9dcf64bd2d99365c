"""Runs a plan in other processes, here or on other machines, and collects their records in one store.

A unit is some samples, and all methods of the run answer each of them in one process: what is compared was measured
side by side. Who gives the units out is the only one to write, and writes each record when it comes: whoever is killed,
what was answered is kept, and the same command asks what is missing. A unit whose process or machine died is given out
again, twice at most, without what it had answered; a record that comes a second time is not taken.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from harness.errors import InputError
from harness.executors.executor import Executor
from harness.executors.fleet import Fleet
from harness.runner.board import Board, shown
from harness.runner.catalog import METHODS, TASKS
from harness.runner.changes import check_code
from harness.runner.execute import Key, Worker, execute
from harness.runner.failures import Failures
from harness.runner.orders import Answered, Fault, Hello, Listing, Message, Order, Terms, read_message
from harness.runner.plan import Plan
from harness.runner.progress import Progress
from harness.storage.record import Record
from harness.storage.store import RunStore

ANSWER = "harness.runner.answering:answer"
RETRIES = 2
UNITS_A_SLOT, FEWEST = 4, 8
"""Each unit loads the model, which asks for few of them, with several samples at least; who is done first takes over
from the others, which asks for many."""

Samples = dict[str, list[str]]
"""Task -> ids of some of its samples."""


class Unit(NamedTuple):
    """Samples that are answered by one process, and their requests."""

    samples: Samples
    keys: list[Key]


class Lost(NamedTuple):
    """A unit has ended before its time: why, and whether it is given out again."""

    why: str
    again: bool


class Ended(NamedTuple):
    """A unit has ended."""


Ask = Callable[[], Order | None]
"""Asks for an order as it is now; None where nothing is left of it."""
Step = tuple[int, Message | Lost | Ended]
"""Of which unit, and what."""


def execute_with(fleet: Fleet | None, plan: Plan, folder: Path, progress: Progress, start: type[Worker]) -> list[str]:
    """`fan_out`, or, without a fleet, `harness.runner.execute.execute`."""

    def loading(plan: Plan) -> Worker:
        progress.loading(plan.spec.model)
        return start(plan)

    if fleet is None:
        return execute(plan, folder, progress, loading)
    return fan_out(plan, folder, progress, start, fleet)


def fan_out(plan: Plan, folder: Path, progress: Progress, start: type[Worker], fleet: Fleet) -> list[str]:
    """Runs, or resumes, a plan in the fleet's processes; see `harness.runner.execute.execute`.

    Returns:
        A line for each cell of which requests failed, and for each reason for which requests were given up.

    Raises:
        InputError: the folder is of another run, there is nowhere to run it, the model cannot be loaded, or data turns
            out bad.
    """
    executor = fleet.open(ANSWER, plan.spec.device, alone=plan.spec.timing)
    with closing(executor), RunStore(folder, plan.manifest(executor.device)) as store:
        order = Order(
            worker=start,
            spec=plan.spec,
            method_files=METHODS.files,
            task_files=TASKS.files,
            folder=Path.cwd(),
            threads=executor.threads,
        )
        return _Run(plan, store, executor, order, progress).run()


@dataclass
class _Run:
    """One session of a run.

    Attributes:
        plan: of the run.
        store: where records go.
        executor: carries out orders.
        order: what all of them have in common.
        progress: is told.
        failures: requests that failed.
        failed: which these are; they are not asked again before the next session.
        given_up: requests without an answer, by reason.
    """

    plan: Plan
    store: RunStore
    executor: Executor
    order: Order
    progress: Progress
    failures: Failures = field(default_factory=Failures)
    failed: set[Key] = field(default_factory=set)
    given_up: Counter[str] = field(default_factory=Counter)

    def run(self) -> list[str]:
        if self.executor.note:
            self.progress.say(self.executor.note)
        self.progress.loading(self.plan.spec.model)
        terms, listing = self._survey()
        self.order = self.order.model_copy(update={"terms": terms})
        missing = {key for _, keys in listing.tasks for key in keys} - self.store.done
        units = units_of(listing, missing, self.executor.slots(), self.order.spec.batch)
        with shown(self.progress, len(units), len(missing)) as board:
            self._answer(units, board)
        self.store.arrange([key for _, keys in listing.tasks for key in keys])
        self.store.finish(lines := self._lines())
        return lines

    def _survey(self) -> tuple[Terms, Listing]:
        """What the run's requests are, and what workers have to be like; read by a worker, since it takes a model."""
        terms: list[Terms] = []
        listings: list[Listing] = []
        for _, step in given_out(self.executor, {0: lambda: None if listings else self.order}):
            if isinstance(step, Hello):
                terms.append(step.terms)
                check_code(self.plan, self.store, self.progress, step.terms.software)
                self.store.describe(**step.terms.facts)
                self.store.made_in(step.environment)
            elif isinstance(step, Listing):
                listings.append(step)
            elif isinstance(step, Fault) and step.whose == "input":
                raise InputError(step.text)
            elif isinstance(step, Lost) and not step.again:
                raise InputError(f"no worker could begin: {step.why}")
        return terms[-1], listings[-1]

    def _answer(self, units: Sequence[Unit], board: Board) -> None:
        orders = {number: partial(self._order, unit) for number, unit in enumerate(units, start=1)}
        for number, step in given_out(self.executor, orders):
            if isinstance(step, Answered):
                self._take(step.record, board)
            elif isinstance(step, Hello):
                self.store.made_in(step.environment)
                board.started(number, where(step))
            elif isinstance(step, Lost):
                board.lost(number, step.why, step.again)
                if not step.again:
                    self.given_up[step.why] += sum(not self._is_done(key) for key in units[number - 1].keys)
            elif isinstance(step, Ended):
                board.ended(number)

    def _order(self, unit: Unit) -> Order | None:
        """The order of a unit as it is now."""
        done = [key for key in unit.keys if self._is_done(key)]
        if len(done) == len(unit.keys):
            return None
        return self.order.model_copy(update={"samples": unit.samples, "done": done})

    def _is_done(self, key: Key) -> bool:
        return key in self.store.done or key in self.failed

    def _take(self, record: Record, board: Board) -> None:
        """At least once is often enough: what is here already is not taken again."""
        key = (record.cell, record.sample)
        if self._is_done(key):
            return
        self.store.append(record)
        self.failures.count(record)
        if record.failed:
            self.failed.add(key)
        board.record(record)

    def _lines(self) -> list[str]:
        reasons = [f"{count} requests have no answer: {why}" for why, count in self.given_up.items() if count]
        return [*self.failures.lines(), *reasons]


def units_of(listing: Listing, missing: set[Key], slots: int, batch: int = 1) -> list[Unit]:
    """All samples with requests that are missing, cut into units of neighbours, as equal as can be.

    Args:
        listing: of the run.
        missing: requests without a record.
        slots: units that are answered at once.
        batch: neighbours of a task that are asked together, and so by one process.
    """
    keys: defaultdict[tuple[str, str], list[Key]] = defaultdict(list)
    for task, requests in listing.tasks:
        for key in requests:
            keys[task, key[1]].append(key)
    groups = [group for _, samples in groupby(keys, itemgetter(0)) for group in _batched(list(samples), batch)]
    todo = [group for group in groups if any(not missing.isdisjoint(keys[sample]) for sample in group)]
    slots, samples = max(1, slots), sum(map(len, todo))
    count = min(
        len(todo), slots * max(1, min(UNITS_A_SLOT, samples // (slots * FEWEST)))
    )  # none is left over at the end
    ends = [len(todo) * number // count for number in range(count + 1)] if count else []
    blocks = [list(chain(*todo[begin:end])) for begin, end in pairwise(ends)]
    return [Unit(_by_task(block), [key for sample in block for key in keys[sample]]) for block in blocks]


def _batched(samples: Sequence[tuple[str, str]], size: int) -> Iterator[Sequence[tuple[str, str]]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def _by_task(block: Sequence[tuple[str, str]]) -> Samples:
    samples: Samples = {}
    for task, sample in block:
        samples.setdefault(task, []).append(sample)
    return samples


def where(hello: Hello) -> str:
    """`node7, GPU-1b2c3d4e`, for people."""
    card = hello.worker.get("gpu_uuid")
    return f"{hello.host}, {card[:12]}" if card else f"{hello.host}, process {hello.worker['process']}"


def given_out(executor: Executor, orders: Mapping[int, Ask]) -> Iterator[Step]:
    """Gives orders out, as many at a time as there are slots, until all have ended.

    Args:
        executor: carries them out.
        orders: by number; each is asked for when it is given out, when it has ended, and when it is given out again.
    """
    waiting, running, tries, faults = deque(orders), set[int](), Counter[int](), dict[int, Fault]()
    while waiting or running:
        while waiting and len(running) < max(1, executor.slots()):
            if (order := orders[number := waiting.popleft()]()) is not None:
                running.add(number)
                executor.start(number, order.model_dump_json().encode())
        if not running:
            break
        number, line, death = executor.next()
        if line is not None:
            message = read_message(line)
            if isinstance(message, Fault):
                faults[number] = message
            yield number, message
            continue
        running.discard(number)
        fault = faults.pop(number, None)
        if orders[number]() is None:  # whatever became of its process when all was said
            yield number, Ended()
            continue
        tries[number] += 1
        again = tries[number] <= RETRIES and (fault is None or fault.whose == "machine")
        if fault is not None and fault.whose == "machine":
            executor.avoid(number)
        ended = f"its worker died: {death}" if death else "its worker left requests out"
        yield number, Lost(fault.text if fault else ended, again)
        if again:
            waiting.appendleft(number)
