"""Ranks that are threads of one process and take turns: what a model spread over devices does, in milliseconds."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from harness.engine.parallel import RankGroup, Ranks
from harness.models.division import cut_head, part_config, part_of
from harness.models.weightless import empty_model, finish

Value = TypeVar("Value")


class _Meeting:
    """Where threads exchange values; one at a time runs, so that nothing they share need be fit for several."""

    def __init__(self, size: int) -> None:
        self.barrier, self.turn = threading.Barrier(size, timeout=60), threading.Lock()
        self.slots: list[list[Any]] = [[None] * size, [None] * size]


class ThreadRanks(RankGroup):
    """A `RankGroup` whose sums are those of threads."""

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        self.rank, self.size, self._meeting, self._met = rank, size, meeting, 0

    def objects(self, value: Value) -> list[Value]:
        meeting, slots = self._meeting, self._meeting.slots[self._met % 2]
        self._met += 1
        slots[self.rank] = value
        meeting.turn.release()
        try:
            meeting.barrier.wait()
        finally:
            meeting.turn.acquire()
        return list(slots)

    def sum_(self, x: Tensor) -> Tensor:
        return x.copy_(reduce(torch.add, self.objects(x.clone())))

    def max(self, x: Tensor) -> Tensor:
        return x.copy_(reduce(torch.maximum, self.objects(x.clone())))

    def gather(self, x: Tensor, dim: int = 0) -> Tensor:
        return torch.cat(self.objects(x.clone()), dim)

    def any(self, flag: bool) -> bool:
        return max(self.objects(flag))

    def barrier(self) -> None:
        self.objects(None)


def on_ranks(size: int, work: Callable[[Ranks], Value]) -> Sequence[Value]:
    """What each of so many ranks returns."""
    meeting = _Meeting(size)

    def run(rank: int) -> Value:
        with meeting.turn:
            try:
                return work(ThreadRanks(rank, size, meeting))
            except BaseException:
                meeting.barrier.abort()
                raise

    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


def divided(model: Any, ranks: Ranks) -> Any:
    """A rank's part of a model that is all there."""
    state = {name: part_of(name, tensor, ranks).clone() for name, tensor in model.state_dict().items()}
    own = empty_model(part_config(copy.deepcopy(model.config), ranks), model.dtype)
    own.load_state_dict(state, assign=True)
    return cut_head(finish(own, model.device), ranks)
