"""Fills a device's memory with requests under one method, and decodes them together.

Requests are prefilled one after the other into caches that stay, so memory is what the last of them found. One that
finds no room ends it; what it had begun is released. Whether the batch can be decoded is then tried: if not, all of it
is done again with one request fewer.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from harness.capacity.held import Held
from harness.engine.batch import Batch
from harness.engine.engine import Engine
from harness.engine.method import Method
from harness.engine.request import Request
from harness.errors import InputError
from harness.measuring.clock import synchronize
from harness.measuring.roofline import decode_bytes
from harness.runner.catalog import MethodSpec
from harness.runner.faults import comes_from, ran_out, told
from harness.runner.request import check_device, release


class Memory(Protocol):
    """A device's memory, in bytes."""

    size: int

    def allocated(self) -> int:
        """What is allocated now."""

    def peak(self) -> int:
        """Most that was since `restart`."""

    def restart(self) -> None:
        """Gives back what is not allocated; the peak counts from here on."""


class CudaMemory:
    """Of a CUDA device, as PyTorch's allocator counts.

    Attributes:
        size: of the device, or what PyTorch is limited to.
    """

    def __init__(self, device: torch.device, limit_gib: float | None) -> None:
        """
        Args:
            device: a CUDA device.
            limit_gib: of `--memory-limit`.
        """
        self._device = device
        whole = torch.cuda.get_device_properties(device).total_memory
        self.size = whole if limit_gib is None else int(limit_gib * 2**30)

    def allocated(self) -> int:
        """As `Memory`."""
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        """As `Memory`."""
        return torch.cuda.max_memory_allocated(self._device)

    def restart(self) -> None:
        """As `Memory`."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)


@dataclass(frozen=True)
class Demand:
    """What is asked of every method.

    Attributes:
        engine: around the model.
        prompt: number of a request -> its token ids, [length] int64, on the model's device.
        new_tokens: that each request generates.
        most: requests to stop at.
        memory: of the device.
        copy_bytes_per_s: that the device reaches.
    """

    engine: Engine
    prompt: Callable[[int], Tensor]
    new_tokens: int
    most: int
    memory: Memory
    copy_bytes_per_s: float


@dataclass
class _Filling:
    """A batch that grows."""

    demand: Demand
    spec: MethodSpec
    methods: list[Method] = field(default_factory=list)
    ttfts: list[float] = field(default_factory=list)
    predicted: int | None = None

    def __post_init__(self) -> None:
        self.batch = Batch(self.demand.engine, self.methods)
        self.demand.memory.restart()
        self.begun = self.demand.memory.allocated()

    def fill(self, most: int) -> bool:
        """Prefills requests until there are so many, or memory is full; whether it is."""
        while len(self.batch.slots) < most:
            if not self._add():
                return True
            if self.predicted is None:
                self.predicted = self._predicted()
        return False

    def _add(self) -> bool:
        demand, number = self.demand, len(self.batch.slots)
        try:
            self.methods.append(self.spec.build(demand.engine.context))
            request = Request(demand.prompt(number), demand.new_tokens)
            synchronize(request.prompt.device)
            start = time.perf_counter()
            self.batch.add(request, demand.new_tokens)
            self.ttfts.append(time.perf_counter() - start)
        except Exception as error:
            if not ran_out(error):
                raise
            release(self.methods.pop())
            return False
        return True

    def _predicted(self) -> int:
        """Requests that fit, if each leaves as much behind as the first one and needs as much while it is prefilled."""
        memory, now = self.demand.memory, self.demand.memory.allocated()
        return max(0, (memory.size - memory.peak()) // max(1, now - self.begun)) + 1

    def decode(self) -> list[float] | None:
        """Seconds of each step; None where memory does not suffice."""
        steps: list[float] = []
        try:
            synchronize(self.demand.engine.embed.weight.device)
            before = time.perf_counter()
            for _ in self.batch.steps():
                steps.append((now := time.perf_counter()) - before)
                before = now
        except Exception as error:
            if not ran_out(error):
                raise
            return None
        return steps

    def release(self) -> None:
        """Gives all memory back."""
        with suppress(Exception):
            self.batch.end()
        for method in self.methods:
            release(method)


def hold(demand: Demand, spec: MethodSpec, key: str) -> Held:
    """The largest batch under a method.

    Args:
        demand: what is asked.
        spec: the method.
        key: see `Held`.

    Raises:
        InputError: it is not the method's fault.
    """
    most = demand.most
    try:
        while most:
            found, is_full, batch = _tried(demand, spec, most)
            if found is not None:
                is_full = is_full or most < demand.most
                return Held(key=key, method=spec.label, bound="memory" if is_full else "most", **found)
            most = batch
        return Held(key=key, method=spec.label, batch=0, bound="memory")
    except InputError as error:
        if not comes_from(spec.kind, error):
            raise
        reason = told(spec.kind, error)
    except Exception as error:  # whatever a third party's code raises
        reason = told(spec.kind, error)
    check_device(f"{spec.label}: {reason}")
    return Held(key=key, method=spec.label, batch=0, bound="memory", failed=reason)


def _tried(demand: Demand, spec: MethodSpec, most: int) -> tuple[dict[str, Any] | None, bool, int]:
    """What is known of the batch that at most so many requests come to, whether memory was full, and what to try next.

    Nothing is known where it could not be decoded, or was empty.
    """
    filling = _Filling(demand, spec)
    try:
        is_full = filling.fill(most)
        size = len(filling.batch.slots)
        if not size:
            return None, is_full, 0
        facts = _kept(filling)
        peak = demand.memory.peak()
        demand.memory.restart()
        steps = filling.decode()
        if steps is None:
            return None, is_full, size - 1
        peak = max(peak, demand.memory.peak())
        return facts | _rates(steps, size) | {"peak_bytes": peak}, is_full, size
    finally:
        filling.release()


def _kept(filling: _Filling) -> dict[str, Any]:
    """What the requests left behind, ahead of the first step."""
    slots, demand = filling.batch.slots, filling.demand
    methods = [slot.method for slot in slots]
    read = decode_bytes(demand.engine.decode_weight_bytes, sum(method.decode_bytes() for method in methods))
    kept = [statistics.fmean(slot.method.tokens_kept()) / len(slot.request.prompt) for slot in slots]
    return {
        "batch": len(slots),
        "predicted": filling.predicted,
        "floor_s": read / demand.copy_bytes_per_s,
        "ttft_s": statistics.median(filling.ttfts),
        "kv_bytes": statistics.fmean(method.kv_bytes() for method in methods),
        "kv_bytes_host": statistics.fmean(method.kv_bytes_host() for method in methods),
        "extra_bytes": statistics.fmean(method.extra_bytes() for method in methods),
        "kept": statistics.fmean(kept),
    }


def _rates(steps: Sequence[float], size: int) -> dict[str, Any]:
    """The first step is left out: it may have been recorded, too."""
    if len(steps) < 2:
        return {}
    median = statistics.median(steps[1:])
    return {"step_s": median, "tokens_per_s": size / median}
