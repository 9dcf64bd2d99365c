"""Goes through the methods, one after the other; what is known of one already is not found out again."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.capacity.fill import CudaMemory, Demand, Memory, hold
from harness.capacity.held import Capacity, Held, resumed
from harness.errors import InputError
from harness.measuring.provenance import environment
from harness.measuring.roofline import ceilings
from harness.models.load import resolve_device
from harness.runner.loaded import LoadedRun, load_run
from harness.runner.plan import Plan, plan
from harness.runner.spec import RunSpec, cell_hash, public_name
from tasks.common.texts import running_text


def find(spec: RunSpec, length: int, new_tokens: int, most: int, folder: Path) -> tuple[Capacity, list[str]]:
    """The largest batch of each method.

    Args:
        spec: of a run over prompts of that length, whose requests are decoded together.
        length, new_tokens: tokens of each request.
        most: requests to stop at.
        folder: where what is found is kept, method by method.

    Returns:
        All that is known, and the methods' labels in their order.

    Raises:
        InputError: whatever is wrong, before a model loads where that can be told.
    """
    planned = _planned(spec)
    run = load_run(planned)
    memory = memory_of(run.device, spec.memory_limit)
    found = resumed(folder, _begun(run, length, new_tokens, memory))
    limits = ceilings(run.device, run.model.model.dtype)
    prompt = _prompts(run, length)
    demand = Demand(run.engine, prompt, new_tokens, most, memory, limits.copy_bytes_per_s)
    for method in planned.methods:
        key = _key(run, method.label)
        if found.known(key, most) is None:
            found = found.with_held(_told(hold(demand, method, key)))
            found.write(folder)
    return found, [method.label for method in planned.methods]


def _planned(spec: RunSpec) -> Plan:
    device = resolve_device(spec.device)
    if not can_be_full(device):
        raise InputError("harness capacity needs a CUDA device: nothing says when a CPU's memory is full")
    if device.type == "cuda":
        # In segments of fixed sizes what stays lies between what comes and goes, and holes count as full.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    planned = plan(spec)
    for method in planned.methods:
        if method.kind.simulated:
            raise InputError(f"{method.label}: only simulates pruning, so its memory says nothing")
    return planned


def can_be_full(device: torch.device) -> bool:
    """Whether a device refuses what it has no memory for, and goes on."""
    return device.type == "cuda"


def memory_of(device: torch.device, limit_gib: float | None) -> Memory:
    """The device's memory, down to the run's limit."""
    return CudaMemory(device, limit_gib)


def _begun(run: LoadedRun, length: int, new_tokens: int, memory: Memory) -> Capacity:
    asked: dict[str, Any] = run.spec.identity() | {"weights": run.model.weights_hash}
    del asked["methods"]
    return Capacity(
        model=public_name(run.spec.model),
        length=length,
        new_tokens=new_tokens,
        asked=asked,
        memory_bytes=memory.size,
        environment=environment(),
    )


def _prompts(run: LoadedRun, length: int) -> Callable[[int], Tensor]:
    """A text of its own for each request; the same ones for every method."""
    texts: list[Tensor] = []

    def prompt(number: int) -> Tensor:
        while len(texts) <= number:
            texts.append(torch.tensor(running_text(run.model.tokenizer, length, run.spec.seed + len(texts))))
        return texts[number].to(run.device)

    return prompt


def _key(run: LoadedRun, label: str) -> str:
    """Of everything that shapes answers: another version of the code, or of a library, finds out anew."""
    (method,) = (method for method in run.plan.methods if method.label == label)
    kernel = f"{run.engine.context.attention.kernel}, {run.engine.kind}"
    return cell_hash(run.spec, method, run.plan.tasks[0], run.model.weights_hash, str(run.model.model.dtype), kernel)


def _told(held: Held) -> Held:
    """Says on standard error how far it is."""
    what = f"failed in {held.failed}" if held.failed else f"{held.batch} requests"
    rate = "" if held.tokens_per_s is None else f", {held.tokens_per_s:.0f} tokens/s"
    print(f"{held.method}: {what}{rate}", file=sys.stderr, flush=True)
    return held
