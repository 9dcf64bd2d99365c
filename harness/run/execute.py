"""Methods x tasks x samples: what happens to one request, and to ten thousand.

`plan` turns a specification into checked methods and tasks without loading a model, so bad input costs nothing. `run`
loads the model, asks every method the same samples one after the other, and hands each record to the store before the
next request starts. The order of methods changes with every sample (`harness.run.order`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from harness.engine.attention import check_attention
from harness.engine.engine import Engine, build_engine
from harness.engine.fused import check_engine
from harness.engine.request import Request
from harness.engine.shape import ModelShape
from harness.errors import InputError
from harness.measuring.gpu import GpuMonitor
from harness.measuring.provenance import environment, source_hash
from harness.measuring.roofline import ceilings
from harness.models.load import describe, limit_memory, load, resolve_device
from harness.run.catalog import MethodSpec, build_tasks, parse_methods
from harness.run.order import order
from harness.run.progress import Progress
from harness.run.request import Bench, Cell, Prompt, answer, let_go, read_prompts
from harness.run.spec import RunSpec, cell_hash, public_name
from harness.statistics.noise import TWIN
from harness.storage.store import Manifest, RunStore
from tasks.base import Task, TaskContext


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
            model=public_name(self.spec.model),
            device=resolve_device(self.spec.device).type,
            latency_only=self.spec.model.startswith("random:"),
            methods=[method.label for method in self.methods],
            tasks=[task.label for task in self.tasks],
            spec=self.spec.identity() | {"limit": self.spec.limit},
        )


def plan(spec: RunSpec) -> Plan:
    """Checks everything that can be checked without loading the model.

    Raises:
        InputError: whatever is wrong, in one line.
    """
    check_attention(spec.attention, resolve_device(spec.device))
    check_engine(spec.engine, resolve_device(spec.device))
    limit_memory(resolve_device(spec.device), spec.memory_limit)
    context = TaskContext(spec.data_dir, spec.limit, spec.max_length, spec.seed)
    methods = _methods(spec)
    tasks = _distinct(build_tasks(spec.tasks, context))
    shape = describe(spec.model)
    for method in methods:
        method.check(shape)
    _check_lengths(spec, tasks, shape)
    return Plan(spec, shape, methods, tasks)


def _distinct(tasks: Sequence[Task]) -> list[Task]:
    """Each task once, since groups may overlap.

    Raises:
        InputError: two different tasks have one label.
    """
    by_label: dict[str, Task] = {}
    for task in tasks:
        if by_label.setdefault(task.label, task).fingerprint() != task.fingerprint():
            raise InputError(f"two different tasks are called {task.label!r}; rename one of the files")
    return list(by_label.values())


def _methods(spec: RunSpec) -> list[MethodSpec]:
    methods = parse_methods(spec.methods)
    if not spec.noise_floor:
        return methods
    full = next((method for method in methods if method.label == "full"), None)
    if full is None:
        raise InputError("--noise-floor runs full attention against itself: add full to --methods")
    return [*methods, replace(full, label=TWIN)]


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
        bench = _bench(plan.spec)
        store.describe(**_facts(plan, bench))
        for task in plan.tasks:
            _run_task(plan, task, bench, store, progress)
        store.finish()


def _bench(spec: RunSpec) -> Bench:
    model = load(spec.model, spec.device, spec.dtype)
    device = model.model.device
    limits = ceilings(device, model.model.dtype)
    monitor = GpuMonitor(device.index or 0) if device.type == "cuda" else None
    engine = build_engine(model.model, model.shape, spec.attention, spec.engine)
    return Bench(spec, model, engine, limits, monitor)


def _facts(plan: Plan, bench: Bench) -> dict[str, Any]:
    return {
        "weights_hash": bench.model.weights_hash,
        "dtype": str(bench.model.model.dtype).removeprefix("torch."),
        "attention": bench.engine.context.attention.kernel,
        "engine": bench.engine.kind,
        "context": bench.model.shape.max_context,
        "method_sources": {method.label: source_hash(method.kind) for method in plan.methods},
        "task_sources": {task.label: source_hash(type(task)) for task in plan.tasks},
    }


def _run_task(plan: Plan, task: Task, bench: Bench, store: RunStore, progress: Progress) -> None:
    cells = [_cell(bench, method, task) for method in plan.methods]
    prompts = read_prompts(task, bench.model, plan.spec)
    todo = [
        (prompt, cell)
        for prompt, cell in _interleaved(prompts, cells)
        if (cell.hash, prompt.sample.id) not in store.done
    ]
    warm: list[int] = []
    with progress.task(task.label, len(todo)) as advance:
        for prompt, cell in todo:
            if _is_new_shape(len(prompt.request.prompt), warm):
                _warm_up(bench.engine, cells, prompt)
                warm.append(len(prompt.request.prompt))
            record = answer(bench, cell, prompt)
            store.append(record)
            advance(record)


def _cell(bench: Bench, method: MethodSpec, task: Task) -> Cell:
    dtype, kernel = str(bench.model.model.dtype), f"{bench.engine.context.attention.kernel}, {bench.engine.kind}"
    identity = cell_hash(bench.spec, method, task, bench.model.weights_hash, dtype, kernel)
    return Cell(identity, method.label, method.build(bench.engine.context), task)


def _interleaved(prompts: Sequence[Prompt], cells: Sequence[Cell]) -> Iterator[tuple[Prompt, Cell]]:
    for number, prompt in enumerate(prompts):
        for place in order(len(cells), number):
            yield prompt, cells[place]


def _is_new_shape(length: int, warm: Sequence[int]) -> bool:
    """Whether no prompt within an eighth of this length has been run: kernels and memory may be cold."""
    return all(abs(length - seen) > seen / 8 for seen in warm)


def _warm_up(engine: Engine, cells: Sequence[Cell], prompt: Prompt) -> None:
    """One unrecorded prefill and decode step a method: kernels are loaded, pages are mapped, and nothing stays."""
    for cell in cells:
        try:
            list(engine.stream(cell.method, Request(prompt.request.prompt, 2)))
            cell.method.end()
        except torch.OutOfMemoryError:
            # The request itself will find that out, and record it.
            let_go(cell.method)
