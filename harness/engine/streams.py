"""Not waiting: what the device does beside other work, and what the host asks of it ahead of needing it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def sent(x: Tensor) -> Callable[[], Tensor]:
    """Sends a tensor to the host; returns what waits for it, and for nothing that is launched later."""
    there = x.to("cpu", non_blocking=True)
    if not x.is_cuda:
        return lambda: there
    arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def wait() -> Tensor:
        arrived.synchronize()
        return there

    return wait


def brought(x: Tensor, device: torch.device) -> Tensor:
    """Brings a tensor from the host to the device, which waits for it; the host does not."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def beside(work: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    """Does work on a stream of its own, beside what is launched next; returns what lets the device wait for it.

    The result is a tensor, or a tuple with tensors.

    The work's first kernel gets its multiprocessors ahead of all that comes next. Elsewhere than on CUDA the work is
    done when it is waited for.
    """
    if device.type != "cuda":
        return work
    here, there = torch.cuda.current_stream(device), _other(device)
    there.wait_stream(here)
    begun = there.record_event()
    with torch.cuda.stream(there):
        result = work()
    here.wait_event(begun)

    # What the kernels read is not given back before.
    def wait(_: object = work) -> Result:
        here.wait_stream(there)
        for one in result if isinstance(result, tuple) else (result,):
            if isinstance(one, Tensor):
                one.record_stream(here)
        return result

    return wait


@cache
def _other(device: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
    return stream
