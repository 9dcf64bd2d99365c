"""What travels between who gives out a run's requests and the processes that answer them: values, as lines of JSON.

An `Order` names samples of the run. All methods of the run answer each of them, in the same process and in the order
that they would have without executors (`harness.runner.order` goes by the sample's number in its task). Messages come
back: one about the worker, a record a request, and at most one about what ended the order.
"""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ImportString, TypeAdapter

from harness.errors import InputError
from harness.measuring.provenance import environment, worker
from harness.runner.catalog import METHODS, TASKS
from harness.runner.execute import Key, Worker, answered_by
from harness.runner.faults import told
from harness.runner.plan import Made, Plan
from harness.runner.spec import RunSpec
from harness.storage.record import Record

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


class Terms(BaseModel):
    """What all workers of a run have in common.

    Attributes:
        software: name -> version, Python among them.
        facts: `Worker.facts` of the first one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    software: dict[str, str | None]
    facts: dict[str, Any]


class Order(BaseModel):
    """Some samples of a run, for all of its methods.

    Attributes:
        worker: who answers.
        spec: of the run.
        method_files, task_files: Python files that define some of its methods and tasks.
        folder: relative paths begin there.
        threads: to compute with on a CPU; None leaves that alone.
        terms: the worker has to meet; None for the first one, which sets them.
        samples: task -> ids; None asks what there is and answers nothing.
        done: requests of these samples that are answered.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    worker: ImportString[Any]
    spec: RunSpec
    method_files: list[Path] = []
    task_files: list[Path] = []
    folder: Path
    threads: int | None = None
    terms: Terms | None = None
    samples: dict[str, list[str]] | None = None
    done: list[Key] = []


class Hello(BaseModel):
    """The first message: who the worker is.

    Attributes:
        host: name of its machine; for the terminal, not recorded.
        worker: see `harness.measuring.provenance.worker`.
        environment: of its machine.
        terms: its own.
    """

    kind: Literal["hello"] = "hello"
    host: str
    worker: dict[str, Any]
    environment: dict[str, Any]
    terms: Terms


class Listing(BaseModel):
    """All requests of a run: (task, requests in their order)."""

    kind: Literal["listing"] = "listing"
    tasks: list[tuple[str, list[Key]]]


class Answered(BaseModel):
    """A request's record."""

    kind: Literal["record"] = "record"
    record: Record


class Fault(BaseModel):
    """What ended an order early.

    Attributes:
        text: in one line.
        whose: bad input; the machine, so that another may do better; or the code.
    """

    kind: Literal["fault"] = "fault"
    text: str
    whose: Literal["input", "machine", "code"]


Message = Hello | Listing | Answered | Fault
Step = TypeVar("Step")
_MESSAGE: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


class Refused(Exception):
    """The worker is not like the others."""


def read_message(line: bytes) -> Message:
    """The message that a line holds."""
    return _MESSAGE.validate_json(line)


def answer(line: bytes, made: Made) -> Iterator[bytes]:
    """What comes of the order of a line.

    Args:
        line: as `Order` is written.
        made: samples that need not be made any more.
    """
    order = Order.model_validate_json(line)
    for message in guarded(order, _carried_out(order, made)):
        yield message.model_dump_json().encode()


def guarded(order: Order, messages: Iterator[Step]) -> Iterator[Step | Fault]:
    """Whatever is raised is told: processes end by themselves unless their machine fails them.

    Args:
        order: that is carried out.
        messages: come of it.
    """
    try:
        yield from messages
    except InputError as error:
        yield Fault(text=str(error), whose="input")
    except Refused as error:
        yield Fault(text=f"{platform.node()} is refused: {error}", whose="machine")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        whose: Literal["machine", "code"] = "machine" if error.errno in _FULL else "code"
        yield Fault(text=f"{platform.node()}: {reason}" if whose == "machine" else told(order, error), whose=whose)
    except Exception as error:  # whatever third parties' code raises
        yield Fault(text=told(order, error), whose="code")


def _carried_out(order: Order, made: Made) -> Iterator[Message]:
    there, wanted = environment(), order.terms
    software = there["packages"] | {"python": there["python"]}
    if wanted is not None:
        _meets(software, wanted.software)
    plan = planned(order).with_made(made)
    answering: Worker = order.worker(plan)
    facts = answering.facts()
    if wanted is not None:
        _meets(facts, wanted.facts)
    who = worker(plan.device.type)
    yield Hello(host=platform.node(), worker=who, environment=there, terms=Terms(software=software, facts=facts))
    if order.samples is None:
        yield Listing(tasks=[(cells[0].task, _requests(answering, cells)) for cells in plan.cells()])
        return
    for cells in plan.cells():
        if samples := order.samples.get(cells[0].task):
            for job in answering.jobs(cells, Others(samples, order.done)):
                yield Answered(record=answered_by(who, job))


def planned(order: Order) -> Plan:
    """The plan of an order's run, made in this process as in the one that gave the order.

    Raises:
        InputError: what cannot be run here.
    """
    if order.threads is not None:
        torch.set_num_threads(order.threads)
    settled(order)
    for file in order.method_files:
        METHODS.load_file(file)
    kind: type[Worker] = order.worker
    plan = kind.plan(order.spec)
    if order.samples is None:
        return plan
    return replace(plan, samples={task: frozenset(samples) for task, samples in order.samples.items()})


def settled(order: Order) -> None:
    """Goes to an order's folder, and knows its tasks.

    Raises:
        InputError: a file of tasks is not there, or defines none.
    """
    with suppress(OSError):  # another machine need not have that folder
        os.chdir(order.folder)
    for file in order.task_files:
        if file not in TASKS.files:
            TASKS.load_file(file)


def _meets(own: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises `Refused` where something is not what the first worker had."""
    for name in dict.fromkeys([*own, *wanted]):
        if own.get(name) != wanted.get(name):
            raise Refused(f"{name} is {own.get(name)} there, and {wanted.get(name)} where the run began")


def _requests(worker: Worker, cells: Any) -> list[Key]:
    asked = Noted(Others(samples=[], done=[]))  # all are others': each is looked for, and none made
    worker.jobs(cells, asked)
    return asked.found


class Noted(Set[Key]):
    """Requests that are done; notes those that are looked for and found among them, in that order."""

    def __init__(self, done: Set[Key]) -> None:
        self._done = done
        self.found: list[Key] = []

    def __contains__(self, key: object) -> bool:
        if key not in self._done:
            return False
        self.found.append(key)  # type: ignore[arg-type]  # what is in a set of keys is a key
        return True

    def __iter__(self) -> Iterator[Key]:
        return iter(self._done)

    def __len__(self) -> int:
        return len(self._done)


class Others(Set[Key]):
    """The requests that an order does not ask: those of other samples, and those that are done.

    There is no end to the first; what is counted are the second.
    """

    def __init__(self, samples: list[str], done: list[Key]) -> None:
        self._samples, self._done = frozenset(samples), frozenset(done)

    def __contains__(self, key: object) -> bool:
        return key in self._done or not (isinstance(key, tuple) and key[1] in self._samples)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._done)

    def __len__(self) -> int:
        return len(self._done)
