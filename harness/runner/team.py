"""The processes that share a model: how they start, what they say to each other, and how they end.

All run the same requests in step (`harness.engine.parallel`). The first rank is the process of the run: it starts the
others, and tells them what comes next. They end with it, and it does when one of them ends.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from threading import Thread, Timer
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, Field, TypeAdapter

from harness.engine.parallel import RankGroup, meeting_place
from harness.errors import InputError
from harness.executors.local import LocalExecutor
from harness.measuring.provenance import usable_cpus, worker
from harness.runner.catalog import METHODS, TASKS
from harness.runner.execute import Job
from harness.runner.orders import Answered, Fault, Order, guarded, planned
from harness.runner.plan import Plan
from harness.runner.worker import MethodWorker
from harness.storage.record import Record

Value = TypeVar("Value")
FOLLOW = "harness.runner.team:follow"
NOTICED = 2.0
"""Seconds between a connection that breaks and the news that the process behind it has ended."""
GRACE = 15.0
"""Seconds that the first rank has to notice that another has ended, before it is ended too: it may be waiting, on the
device, for what will not come."""


class RankOrder(BaseModel):
    """What a rank is told when it is started.

    Attributes:
        rank, size: its number, and how many there are.
        port: where they meet.
        order: whose run; of which requests, it is told as they come.
    """

    rank: int
    size: int
    port: int
    order: Order


class Here(BaseModel):
    """A rank has planned the run, or loaded its part of the model: see `harness.measuring.provenance.worker`."""

    kind: Literal["here"] = "here"
    worker: dict[str, Any]


class Ended(BaseModel):
    """A rank's process has ended."""

    kind: Literal["ended"] = "ended"
    why: str


Said = Here | Answered | Fault | Ended
_SAID: TypeAdapter[Said] = TypeAdapter(Annotated[Said, Field(discriminator="kind")])


class Team:
    """The other ranks, seen from the first.

    Attributes:
        who: `harness.measuring.provenance.worker` of every rank.
    """

    def __init__(self, plan: Plan) -> None:
        """Starts them, and waits until all have planned the run.

        Raises:
            InputError: one of them cannot, or their devices are of several kinds.
        """
        device, self._size = plan.device.type, plan.spec.tensor_parallel
        self._store = meeting_place(self._size)
        self._others = LocalExecutor(FOLLOW, device, _places(device, self._size))
        self._heard: dict[int, SimpleQueue[Said]] = {rank: SimpleQueue() for rank in range(1, self._size)}
        self._group: RankGroup | None = None
        self._lost, self._over = "", False
        threads = max(1, (usable_cpus() or 1) // self._size) if device == "cpu" else None
        order = Order(
            worker=MethodWorker, spec=plan.spec, method_files=METHODS.files, task_files=TASKS.files,
            folder=Path.cwd(), threads=threads,
        )  # fmt: skip
        for rank in self._heard:
            told = RankOrder(rank=rank, size=self._size, port=self._store.port, order=order)
            self._others.start(rank, told.model_dump_json().encode())
        Thread(target=self._listen, daemon=True).start()
        self.who = self.during(lambda: _of_one_kind([worker(device), *self._here()]))

    def load(self, plan: Plan) -> MethodWorker:
        """This rank's part of the model, when all ranks have theirs.

        Raises:
            InputError: one of them cannot load it.
        """

        def together() -> MethodWorker:
            self._group = join(0, self._size, self._store, plan.device)
            own = MethodWorker(plan, self._group)
            self._here()
            return own

        return self.during(together)

    def tell(self, what: Any) -> None:
        """Says to all ranks what comes next."""
        assert self._group is not None
        self._group.send(what)

    def records(self) -> list[Record]:
        """The other ranks' records of the request that they were told."""
        return [said.record for said in self._next(Answered)]

    def during(self, work: Callable[[], Value]) -> Value:
        """Does something in step with the others. If it fails all of them end, and if one had ended, that is why.

        Raises:
            InputError: says which one, and why.
        """
        try:
            return work()
        except BaseException as error:
            reason = self._reason() if isinstance(error, Exception) else ""
            self.close()
            if reason:
                raise InputError(reason) from None
            raise

    def close(self) -> None:
        """Ends the other ranks; may be called twice."""
        self._over = True
        self._others.close()
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def _here(self) -> list[dict[str, Any]]:
        return [said.worker for said in self._next(Here)]

    def _next(self, kind: type[Value]) -> list[Value]:
        """The next message of every rank."""
        found: list[Value] = []
        for queue in self._heard.values():
            said = queue.get()
            if not isinstance(said, kind):
                raise InputError(self._reason() or "a rank said what it was not asked")
            found.append(said)
        return found

    def _reason(self) -> str:
        """Why another rank has ended; a broken connection is noticed before its end is."""
        end = time.monotonic() + NOTICED
        while not (self._lost or self._over) and time.monotonic() < end:
            time.sleep(0.1)
        return self._lost

    def _listen(self) -> None:
        running = set(self._heard)
        while running:
            rank, line, death = self._others.next()
            said: Said = Ended(why=death or "it left") if line is None else _SAID.validate_json(line)
            if isinstance(said, Ended):
                running.discard(rank)
            if isinstance(said, Fault | Ended) and not (self._lost or self._over):
                self._lose(rank, said)
            self._heard[rank].put(said)

    def _lose(self, rank: int, said: Fault | Ended) -> None:
        why = said.text if isinstance(said, Fault) else f"it was {said.why}"
        own = isinstance(said, Fault) and said.whose == "input"
        self._lost = why if own else f"rank {rank} of {self._size}: {why}; 'harness resume' goes on"
        timer = Timer(GRACE, self._give_up)
        timer.daemon = True
        timer.start()

    def _give_up(self) -> None:
        if not self._over:
            print(f"harness: {self._lost}", file=sys.stderr, flush=True)
            self._others.close()
            os._exit(1)


def _of_one_kind(workers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kinds = sorted({str(each["device"]) for each in workers})
    if len(kinds) > 1:
        raise InputError(f"--tensor-parallel: the first {len(workers)} visible devices are {' and '.join(kinds)}")
    return workers


def join(rank: int, size: int, store: Any, device: torch.device) -> RankGroup:
    """Makes this process one of the ranks."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(0)
    return RankGroup(rank, size, store, backend)


def _places(device: str, size: int) -> list[str | None]:
    """What each further rank has in `CUDA_VISIBLE_DEVICES`: its own device first, the others for the links to them."""
    if device == "cpu":
        return [None] * (size - 1)
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
    return [",".join(names[rank:size] + names[:rank]) for rank in range(1, size)]


def follow(line: bytes) -> Iterator[bytes]:
    """What a rank does that is not the first (`harness.executors.executor.Answer`)."""
    order = RankOrder.model_validate_json(line)
    for message in guarded(order.order, _followed(order)):
        yield message.model_dump_json().encode()


def _followed(order: RankOrder) -> Iterator[Here | Answered]:
    plan = planned(order.order)
    here = Here(worker=worker(plan.device.type))
    yield here
    ranks = join(order.rank, order.size, meeting_place(order.size, order.port), plan.device)
    own = MethodWorker(plan, ranks)
    yield here
    jobs, cells, count = dict[int, Job](), {cells[0].task: cells for cells in plan.cells()}, 0
    while True:
        told = ranks.send(None)
        if isinstance(told, int):
            yield Answered(record=jobs.pop(told)())
            continue
        task, done = told
        found = own.jobs(cells[task], frozenset(done))
        jobs |= dict(enumerate(found, count))
        count += len(found)
