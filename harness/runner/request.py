"""One request: a method is asked one prompt, and all that is measured of it goes into one record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

from harness.engine import promises
from harness.engine.method import Method
from harness.engine.session import Session
from harness.errors import InputError
from harness.measuring.clock import Measured, measure
from harness.measuring.energy import EnergyMeter
from harness.measuring.gpu import GpuMonitor
from harness.measuring.ledger import ledger
from harness.measuring.roofline import Ceilings
from harness.runner.faults import comes_from, ran_out, told
from harness.runner.grades import Graded, grade
from harness.runner.loaded import Cell, LoadedRun
from harness.runner.loglikelihood import rate_choices
from harness.runner.records import LATENCIES, UNTIMED, counts, identity, times, unanswered
from harness.runner.samples import Prompt
from harness.runner.stops import StopTexts
from harness.storage.record import FAILED, NOT_SCORED, OUT_OF_MEMORY, Record


@dataclass(frozen=True)
class Bench:
    """A loaded run and the instruments that its requests are measured with."""

    run: LoadedRun
    ceilings: Ceilings
    monitor: GpuMonitor | None
    meter: EnergyMeter

    def device_state(self) -> dict[str, Any] | None:
        """The GPU now, and at rest; None where nothing is known of one."""
        state = self.monitor.sample() if self.monitor is not None else None
        return None if state is None else state | self.meter.facts()


def run_request(bench: Bench, cell: Cell, prompt: Prompt, session: Session, *, last: bool) -> Record:
    """Runs one request and measures it; one that ends without an answer is recorded as that.

    Args:
        bench: the run.
        cell: that is asked.
        prompt: what it is asked, on the model's device.
        session: of the cell's method, new unless the prompt is a later turn.
        last: nothing is asked behind it, so the method's caches go.

    Raises:
        InputError: it is not the method's fault, or the device cannot go on after it.
    """
    return attempted(bench, cell, [prompt], lambda: [_measured(bench, cell, prompt, session, last)])[0]


def attempted(bench: Bench, cell: Cell, prompts: Sequence[Prompt], ask: Callable[[], list[Record]]) -> list[Record]:
    """The records of prompts that are asked at once; where that ends without answers, records that say so.

    Raises:
        InputError: as `run_request`.
    """
    try:
        return ask()
    except InputError as error:
        if not comes_from(type(cell.method), error):
            raise
        fact, reason = FAILED, told(type(cell.method), error)
    except Exception as error:  # whatever a third party's code raises
        fact, reason = _ended(type(cell.method), error)
    release(cell.method)
    bench.run.engine.context.ranks.regroup(f"{cell.label}: {reason}")
    check_device(f"{cell.label}: {reason}")
    return [unanswered(cell, prompt, bench.run.model.shape, fact, reason) for prompt in prompts]


def _ended(kind: type[Method], error: Exception) -> tuple[str, str]:
    """The fact that a request has no answer, and why."""
    if ran_out(error):
        return OUT_OF_MEMORY, str(error).partition(". ")[0]
    return FAILED, told(kind, error)


def release(method: Method) -> None:
    """Frees what a request left behind that did not end."""
    with suppress(Exception):
        method.begin(1, 1)


def check_device(reason: str) -> None:
    """A kernel that reads where nothing is ends all work of the process on a GPU, the other methods' too.

    Args:
        reason: what it may have been.

    Raises:
        InputError: that is so.
    """
    try:
        torch.cuda.empty_cache()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
    except RuntimeError:
        raise InputError(f"{reason}; the GPU does no more work in this process, 'harness resume' goes on") from None


def _measured(bench: Bench, cell: Cell, prompt: Prompt, session: Session, last: bool) -> Record:
    run, method = bench.run, cell.method
    ended = stop_texts(run, prompt)
    measured = measure(
        run.engine, method, prompt.request, parts=run.spec.parts, ended=ended, meter=bench.meter, session=session
    )
    values = answer(bench, cell, prompt, measured)
    # In a pass of its own, which a conversation would not outlive.
    if run.spec.ledger and not method.simulated and prompt.turn is None:
        values["ledger"] = asdict(ledger(run.engine, method, prompt.request))
    if last:
        method.end()
    return Record(**values)


def stop_texts(run: LoadedRun, prompt: Prompt) -> StopTexts | None:
    """What ends the answer beside stop tokens."""
    sample = prompt.sample
    return StopTexts(sample.stop, run.model.tokenizer, sample.min_new_tokens) if sample.stop else None


def answer(bench: Bench, cell: Cell, prompt: Prompt, measured: Measured) -> dict[str, Any]:
    """All that a record holds of an answer, while the method still has the request's caches."""
    run, method = bench.run, cell.method
    values = UNTIMED | {"device_state": bench.device_state()}
    # What the method says of itself is about this request: it is read before the method is asked for anything else.
    values |= identity(cell, prompt) | counts(method, measured)
    values["extra"] |= measured.survivors | _notes(method, measured)
    if not method.simulated:
        values |= times(run.engine, method, measured, bench.ceilings, values["context_tokens"])
    if not run.spec.timing:
        values |= LATENCIES
    graded = _score(run, cell, prompt, measured)
    values |= {"prediction": graded.prediction, "score": graded.score}
    values["extra"] |= {} if graded.problem is None else {NOT_SCORED: graded.problem}
    return values


def _notes(method: Method, measured: Measured) -> dict[str, Any]:
    beside = method.sparse.notes() if method.sparse is not None else {}
    overlap = {"decode_overlap": measured.overlap} if measured.overlap is not None else {}
    return promises.notes(method.notes()) | beside | overlap


def _score(run: LoadedRun, cell: Cell, prompt: Prompt, measured: Measured) -> Graded:
    """The answer and what it is worth; null where random weights gave it."""
    if run.model.latency_only:
        return Graded(None, None)
    sample, tokenizer = prompt.sample, run.model.tokenizer
    if not sample.choices:
        prediction = tokenizer.decode(measured.tokens, skip_special_tokens=True)
        return grade(cell.task, prediction, lambda: cell.task.score(sample, prediction))
    rated = rate_choices(run.engine, cell.method, sample, tokenizer, run.spec.max_length)
    likeliest = max(range(len(rated)), key=lambda index: rated[index].total)
    return grade(cell.task, sample.choices[likeliest], lambda: cell.task.score_choices(sample, rated))
