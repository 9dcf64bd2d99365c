"""Methods x tasks x samples: what happens to one request, and to ten thousand.

`plan` turns a specification into checked methods and tasks without loading a model, so bad input costs nothing. `run`
loads the model, asks every method the same samples one after the other, and hands each record to the store before the
next request starts. The order of methods turns around with every sample (A B, B A, ...), so that slow drifts of the
machine fall on all of them alike.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.engine import Engine, Request
from harness.errors import InputError
from harness.measure import Measured, measure
from harness.models import LoadedModel, describe, load, resolve_device
from harness.progress import Progress
from harness.prompts import encode_with_question
from harness.provenance import environment, source_hash
from harness.record import Record
from harness.shape import ModelShape
from harness.spec import RunSpec, cell_hash
from harness.store import Manifest, RunStore
from methods.base import Method
from methods.registry import MethodSpec, parse_methods
from tasks.base import Sample, Task, TaskContext
from tasks.registry import build_tasks


@dataclass(frozen=True)
class Plan:
    """A run that has been checked as far as it can be without weights."""

    spec: RunSpec
    shape: ModelShape
    methods: list[MethodSpec]
    tasks: list[Task]

    def manifest(self) -> Manifest:
        """What the store keeps of it."""
        return Manifest(
            run_hash=self.spec.run_hash(),
            model=self.spec.model,
            device=resolve_device(self.spec.device).type,
            latency_only=self.spec.model.startswith("random:"),
            methods=[method.label for method in self.methods],
            tasks=[task.label for task in self.tasks],
            spec=self.spec.identity(),
        )


@dataclass(frozen=True)
class Cell:
    """One method of one task, ready to answer."""

    hash: str
    label: str
    method: Method
    task: Task


@dataclass(frozen=True)
class Prompt:
    """A sample as the model sees it; ids are [n] int64 on the model's device."""

    sample: Sample
    request: Request
    hash: str


def plan(spec: RunSpec) -> Plan:
    """Checks everything that can be checked without loading the model.

    Raises:
        InputError: whatever is wrong, in one line.
    """
    resolve_device(spec.device)
    context = TaskContext(spec.data_dir, spec.limit, spec.max_length, spec.seed)
    methods = parse_methods(spec.methods)
    # Groups may overlap; each task is asked once.
    tasks = list({task.label: task for task in build_tasks(spec.tasks, context)}.values())
    shape = describe(spec.model)
    for method in methods:
        method.check(shape)
    _check_lengths(spec, tasks, shape)
    return Plan(spec, shape, methods, tasks)


def _check_lengths(spec: RunSpec, tasks: Sequence[Task], shape: ModelShape) -> None:
    asked = {task.label: task.longest_prompt() or 0 for task in tasks} | {"--max-length": spec.max_length or 0}
    for source, tokens in asked.items():
        if tokens > shape.max_context:
            raise InputError(f"{source} asks for {tokens} tokens; {spec.model} has a context of {shape.max_context}")


def run(plan: Plan, folder: Path, progress: Progress) -> None:
    """Runs, or resumes, a plan and leaves `folder` complete, or marked incomplete if it is stopped.

    Raises:
        InputError: the folder is of another run, or data turns out bad.
    """
    with RunStore(folder, plan.manifest(), environment()) as store:
        model = load(plan.spec.model, plan.spec.device, plan.spec.dtype)
        engine = Engine(model.model, model.shape)
        store.describe(**_facts(plan, model, engine))
        for task in plan.tasks:
            _run_task(plan, task, model, engine, store, progress)
        store.finish()


def _facts(plan: Plan, model: LoadedModel, engine: Engine) -> dict[str, Any]:
    return {
        "weights_hash": model.weights_hash,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "attention": engine.context.attention.kernel,
        "context": model.shape.max_context,
        "method_sources": {method.label: source_hash(method.kind) for method in plan.methods},
    }


def _run_task(plan: Plan, task: Task, model: LoadedModel, engine: Engine, store: RunStore, progress: Progress) -> None:
    cells = [_cell(plan, method, task, model, engine) for method in plan.methods]
    prompts = _prompts(task, model, plan.spec)
    todo = sum((cell.hash, prompt.sample.id) not in store.done for prompt in prompts for cell in cells)
    with progress.task(task.label, todo) as advance:
        warm = False
        for prompt, cell in _interleaved(prompts, cells):
            if (cell.hash, prompt.sample.id) in store.done:
                continue
            if not warm:
                _warm_up(engine, cells, prompt)
                warm = True
            record = _answer(engine, cell, prompt, model)
            store.append(record)
            advance(record)


def _cell(plan: Plan, method: MethodSpec, task: Task, model: LoadedModel, engine: Engine) -> Cell:
    dtype, kernel = str(model.model.dtype), engine.context.attention.kernel
    identity = cell_hash(plan.spec, method, task, model.weights_hash, dtype, kernel)
    return Cell(identity, method.label, method.build(engine.context), task)


def _interleaved(prompts: Sequence[Prompt], cells: Sequence[Cell]) -> Iterator[tuple[Prompt, Cell]]:
    for number, prompt in enumerate(prompts):
        for cell in cells if number % 2 == 0 else reversed(cells):
            yield prompt, cell


def _warm_up(engine: Engine, cells: Sequence[Cell], prompt: Prompt) -> None:
    """One unrecorded prefill and decode step a method: kernels are loaded, pages are mapped."""
    for cell in cells:
        list(engine.stream(cell.method, Request(prompt.request.prompt, 2)))


def _prompts(task: Task, model: LoadedModel, spec: RunSpec) -> list[Prompt]:
    """All prompts of a task, read and checked before its first request."""
    prompts = [_prompt(sample, task, model, spec) for sample in task.samples(model.tokenizer)]
    for name, count in Counter(prompt.sample.id for prompt in prompts).items():
        if count > 1:
            raise InputError(f"{task.label}: two samples have the id {name!r}")
    return prompts


def _prompt(sample: Sample, task: Task, model: LoadedModel, spec: RunSpec) -> Prompt:
    window = model.shape.max_context
    longest = task.context.max_length or window - sample.max_new_tokens - TEMPLATE_ROOM
    ids, question = encode_with_question(sample, model.tokenizer, longest)
    after = spec.question == "after"
    if after and not 0 < question < len(ids):
        raise InputError(f"{task.label}, sample {sample.id}: --question after needs a context and a question")
    if len(ids) + sample.max_new_tokens > window:
        raise InputError(
            f"{task.label}, sample {sample.id}: {len(ids)} prompt tokens and {sample.max_new_tokens} new ones "
            f"exceed the context of {window}; set --max-length"
        )
    stop = model.eos_ids | {model.tokenizer.encode(text, add_special_tokens=False)[-1] for text in sample.stop}
    prompt = torch.tensor(ids, device=model.model.device)
    request = Request(prompt, sample.max_new_tokens, frozenset(stop), sample.min_new_tokens, question, after)
    return Prompt(sample, request, hashlib.sha256(str(ids).encode()).hexdigest())


TEMPLATE_ROOM = 128
"""Tokens left free for the chat template where the model's window decides how long a prompt may be."""


def _answer(engine: Engine, cell: Cell, prompt: Prompt, model: LoadedModel) -> Record:
    measured = measure(engine, cell.method, prompt.request)
    prediction = None
    if not model.latency_only:
        prediction = model.tokenizer.decode(measured.tokens, skip_special_tokens=True)
    return _record(cell, prompt, measured, prediction)


def _record(cell: Cell, prompt: Prompt, measured: Measured, prediction: str | None) -> Record:
    method, sample, task = cell.method, prompt.sample, cell.task
    real = not method.simulated
    return Record(
        cell=cell.hash,
        method=cell.label,
        task=task.label,
        sample=sample.id,
        prompt_hash=prompt.hash,
        prompt_tokens=prompt.request.prompt.shape[0],
        context_tokens=len(prompt.request.prompt) - prompt.request.late_tokens(method),
        question="after" if prompt.request.question_after else "prompt",
        new_tokens=len(measured.tokens),
        prediction=prediction,
        score=None if prediction is None else task.score(sample, prediction),
        metric=task.metric,
        answers=list(sample.answers),
        ttft_s=measured.ttft_s if real else None,
        tpot_s=measured.tpot_s if real else None,
        e2e_s=measured.e2e_s if real else None,
        peak_memory_bytes=measured.peak_memory_bytes if real else None,
        kv_bytes=method.kv_bytes() if real else None,
        kv_bytes_host=method.kv_bytes_host() if real else None,
        extra_bytes=method.extra_bytes() if real else None,
        tokens_requested=method.tokens_requested(),
        tokens_kept=measured.tokens_kept,
        tokens_recomputed=method.tokens_recomputed(),
        extra=dict(sample.extra),
    )
