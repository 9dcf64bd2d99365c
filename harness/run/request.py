"""One sample under one method: from the sample to the model's prompt, and from the measured answer to its record."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from harness.engine.engine import Engine
from harness.engine.method import Method
from harness.engine.request import Request
from harness.errors import InputError
from harness.measuring.clock import Measured, measure
from harness.measuring.gpu import GpuMonitor
from harness.measuring.ledger import ledger
from harness.measuring.roofline import Ceilings, dense_prefill_flops, fractions, prefill_flops
from harness.models.load import LoadedModel
from harness.run.loglikelihood import encode_pair, rate_choices
from harness.run.prompts import encode_with_question
from harness.run.spec import RunSpec
from harness.storage.record import OUT_OF_MEMORY, Record
from tasks.base import Sample, Task

TEMPLATE_ROOM = 128
"""Tokens left free for the chat template where the model's window decides how long a prompt may be."""


@dataclass(frozen=True)
class Prompt:
    """A sample as the model sees it.

    Attributes:
        sample: the sample.
        request: its token ids, on the model's device, and how generation ends.
        hash: sha256 of the ids.
    """

    sample: Sample
    request: Request
    hash: str


@dataclass(frozen=True)
class Cell:
    """One method of one task, ready to answer.

    Attributes:
        hash: content hash of everything that shapes its answers.
        label: the method's row in tables.
        method: bound to the model.
        task: which scores.
    """

    hash: str
    label: str
    method: Method
    task: Task


@dataclass(frozen=True)
class Bench:
    """What all answers of a run share: the loaded model and the instruments."""

    spec: RunSpec
    model: LoadedModel
    engine: Engine
    ceilings: Ceilings
    monitor: GpuMonitor | None


def read_prompts(task: Task, model: LoadedModel, spec: RunSpec) -> list[Prompt]:
    """All prompts of a task, read and checked before its first request.

    Raises:
        InputError: bad data, two samples with one id, or a prompt beyond the model's context.
    """
    prompts = [_prompt(sample, task, model, spec) for sample in task.samples(model.tokenizer)]
    for name, count in Counter(prompt.sample.id for prompt in prompts).items():
        if count > 1:
            raise InputError(f"{task.label}: two samples have the id {name!r}")
    return prompts


def _prompt(sample: Sample, task: Task, model: LoadedModel, spec: RunSpec) -> Prompt:
    where, window = f"{task.label}, sample {sample.id}", model.shape.max_context
    ids, question = _encode(sample, task, model)
    after = spec.question == "after"
    if after and not 0 < question < len(ids):
        raise InputError(f"{where}: --question after needs a context and a question")
    if len(ids) + sample.max_new_tokens > window:
        tokens = f"{len(ids)} prompt tokens and {sample.max_new_tokens} new ones"
        raise InputError(f"{where}: {tokens} exceed the context of {window}; set --max-length")
    request = Request(
        torch.tensor(ids, device=model.model.device),
        sample.max_new_tokens,
        _stop_ids(sample, model),
        sample.min_new_tokens,
        question,
        after,
    )
    return Prompt(sample, request, hashlib.sha256(str(ids).encode()).hexdigest())


def _encode(sample: Sample, task: Task, model: LoadedModel) -> tuple[list[int], int]:
    """Token ids of the prompt, and how many of the last ones are its question."""
    window, longest = model.shape.max_context, task.context.max_length
    if sample.choices:
        first = replace(sample, prompt=sample.choice_prompts[0]) if sample.choice_prompts else sample
        return encode_pair(first, sample.choices[0], model.tokenizer, longest, window)[0], 0
    return encode_with_question(sample, model.tokenizer, longest or window - sample.max_new_tokens - TEMPLATE_ROOM)


def _stop_ids(sample: Sample, model: LoadedModel) -> frozenset[int]:
    if sample.ignore_end:
        return frozenset()
    return model.eos_ids | {model.tokenizer.encode(text, add_special_tokens=False)[-1] for text in sample.stop}


def answer(bench: Bench, cell: Cell, prompt: Prompt) -> Record:
    """Asks one method one question and measures it; a request that the device's memory cannot hold is recorded so."""
    try:
        return _answer(bench, cell, prompt)
    except torch.OutOfMemoryError as error:
        needed = str(error).partition(". ")[0]
    let_go(cell.method)
    return _unanswered(bench, cell, prompt, needed)


def let_go(method: Method) -> None:
    """Frees what a request left behind that did not end."""
    method.begin(1, 1)
    torch.cuda.empty_cache()


def _answer(bench: Bench, cell: Cell, prompt: Prompt) -> Record:
    measured = measure(bench.engine, cell.method, prompt.request, parts=bench.spec.parts)
    state = bench.monitor.sample() if bench.monitor is not None else None
    record = _record(bench, cell, prompt, measured) | {"device_state": state}
    if bench.spec.ledger and not cell.method.simulated:
        record["ledger"] = asdict(ledger(bench.engine, cell.method, prompt.request))
    cell.method.end()
    return Record(**record)


def _unanswered(bench: Bench, cell: Cell, prompt: Prompt, reason: str) -> Record:
    nothing: dict[str, Any] = dict.fromkeys(("prediction", "score", "device_state", *_TIMES))
    layers = [0] * bench.model.shape.layers
    counts = {"new_tokens": 0, "tokens_requested": layers, "tokens_kept": layers, "tokens_recomputed": 0}
    said = {"metric": cell.task.metric, "answers": list(prompt.sample.answers)}
    identity = _identity(bench, cell, prompt, {OUT_OF_MEMORY: reason})
    return Record(**(identity | nothing | counts | said))


def _identity(bench: Bench, cell: Cell, prompt: Prompt, extra: dict[str, Any]) -> dict[str, Any]:
    request = prompt.request
    return {
        "cell": cell.hash,
        "method": cell.label,
        "task": cell.task.label,
        "sample": prompt.sample.id,
        "prompt_hash": prompt.hash,
        "prompt_tokens": len(request.prompt),
        "context_tokens": len(request.prompt) - request.late_tokens(cell.method),
        "question": bench.spec.question,
        "extra": dict(prompt.sample.extra) | extra,
    }


def _record(bench: Bench, cell: Cell, prompt: Prompt, measured: Measured) -> dict[str, Any]:
    method = cell.method
    identity = _identity(bench, cell, prompt, {"kept_spans": measured.spans} | _notes(measured, method))
    tokens = {
        "new_tokens": len(measured.tokens),
        "tokens_requested": method.tokens_requested(),
        "tokens_kept": measured.kept,
        "tokens_recomputed": method.tokens_recomputed(),
    }
    times = _times(bench, method, measured) if not method.simulated else {}
    return identity | tokens | _score(bench, cell, prompt, measured) | dict.fromkeys(_TIMES) | times


def _notes(measured: Measured, method: Method) -> dict[str, Any]:
    overlap = measured.overlap
    return method.notes() if overlap is None else method.notes() | {"decode_overlap": overlap}


def _score(bench: Bench, cell: Cell, prompt: Prompt, measured: Measured) -> dict[str, Any]:
    sample, tokenizer = prompt.sample, bench.model.tokenizer
    prediction = score = None
    if bench.model.latency_only:
        pass
    elif sample.choices:
        rated = rate_choices(bench.engine, cell.method, sample, tokenizer, bench.spec.max_length)
        prediction = sample.choices[max(range(len(rated)), key=lambda index: rated[index].total)]
        score = cell.task.score_choices(sample, rated)
    else:
        prediction = tokenizer.decode(measured.tokens, skip_special_tokens=True)
        score = cell.task.score(sample, prediction)
    return {"prediction": prediction, "score": score, "metric": cell.task.metric, "answers": list(sample.answers)}


_TIMES = (
    "ttft_s", "tpot_s", "token_s", "e2e_s", "parts_s", "peak_memory_bytes", "kv_bytes", "kv_bytes_host", "extra_bytes",
    "ledger", "prefill_flops", "dense_flops", "decode_read_bytes", "prefill_floor_s",
    "prefill_lasting_floor_s", "decode_floor_s",
)  # fmt: skip
"""What is null for a method that only simulates pruning."""


def _times(bench: Bench, method: Method, measured: Measured) -> dict[str, Any]:
    shape, ceilings = bench.model.shape, bench.ceilings
    pairs = [method.prefill_pairs(rows) for rows in measured.work.projected]
    flops = prefill_flops(shape, measured.work.projected, measured.work.fed, pairs)
    weights, read = bench.engine.decode_weight_bytes, measured.decode_bytes
    near = fractions(ceilings, flops, weights, read, measured.ttft_s, measured.tpot_s)
    return {
        "ttft_s": measured.ttft_s,
        "tpot_s": measured.tpot_s,
        "token_s": measured.token_s,
        "e2e_s": measured.e2e_s,
        "parts_s": measured.parts_s,
        "peak_memory_bytes": measured.peak_memory_bytes,
        "kv_bytes": method.kv_bytes(),
        "kv_bytes_host": method.kv_bytes_host(),
        "extra_bytes": method.extra_bytes(),
        "prefill_flops": flops,
        "dense_flops": dense_prefill_flops(shape, method.prompt_len),
        "decode_read_bytes": weights + read,
        "prefill_floor_s": near.prefill_floor_s,
        "prefill_lasting_floor_s": near.prefill_lasting_floor_s,
        "decode_floor_s": near.decode_floor_s,
    }
