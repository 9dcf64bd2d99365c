"""One request: a method is asked one prompt, and all that is measured of it goes into one record."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from harness.engine.method import Method
from harness.measuring.clock import Measured, measure
from harness.measuring.gpu import GpuMonitor
from harness.measuring.ledger import ledger
from harness.measuring.roofline import Ceilings
from harness.run.loaded import Cell, LoadedRun
from harness.run.loglikelihood import rate_choices
from harness.run.records import UNTIMED, counts, identity, out_of_memory, times
from harness.run.samples import Prompt
from harness.storage.record import Record


@dataclass(frozen=True)
class Bench:
    """A loaded run and the instruments that its requests are measured with."""

    run: LoadedRun
    ceilings: Ceilings
    monitor: GpuMonitor | None


def run_request(bench: Bench, cell: Cell, prompt: Prompt) -> Record:
    """Runs one request and measures it; one that the device's memory cannot hold is recorded as that."""
    try:
        return _measured(bench, cell, prompt)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
    release(cell.method)
    return out_of_memory(cell, prompt, bench.run.model.shape, reason)


def release(method: Method) -> None:
    """Frees what a request left behind that did not end."""
    method.begin(1, 1)
    torch.cuda.empty_cache()


def _measured(bench: Bench, cell: Cell, prompt: Prompt) -> Record:
    run, method = bench.run, cell.method
    measured = measure(run.engine, method, prompt.request, parts=run.spec.parts)
    values = UNTIMED | {"device_state": bench.monitor.sample() if bench.monitor is not None else None}
    # What the method says of itself is about this request: it is read before the method is asked for anything else.
    values |= identity(cell, prompt) | counts(method, measured)
    values["extra"] |= measured.survivors | _notes(method, measured)
    if not method.simulated:
        values |= times(run.engine, method, measured, bench.ceilings, values["context_tokens"])
    values |= _score(run, cell, prompt, measured)
    if run.spec.ledger and not method.simulated:
        values["ledger"] = asdict(ledger(run.engine, method, prompt.request))
    method.end()
    return Record(**values)


def _notes(method: Method, measured: Measured) -> dict[str, Any]:
    beside = method.sparse.notes() if method.sparse is not None else {}
    overlap = {"decode_overlap": measured.overlap} if measured.overlap is not None else {}
    return method.notes() | beside | overlap


def _score(run: LoadedRun, cell: Cell, prompt: Prompt, measured: Measured) -> dict[str, Any]:
    """The answer and what it is worth; null where random weights gave it."""
    if run.model.latency_only:
        return {"prediction": None, "score": None}
    sample, tokenizer = prompt.sample, run.model.tokenizer
    if not sample.choices:
        prediction = tokenizer.decode(measured.tokens, skip_special_tokens=True)
        return {"prediction": prediction, "score": cell.task.score(sample, prediction)}
    rated = rate_choices(run.engine, cell.method, sample, tokenizer, run.spec.max_length)
    likeliest = max(range(len(rated)), key=lambda index: rated[index].total)
    return {"prediction": sample.choices[likeliest], "score": cell.task.score_choices(sample, rated)}
