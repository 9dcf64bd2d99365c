"""What a run will do, checked before a model is loaded, so that bad input costs nothing.

A run is cells, each one method on one task. A cell is described by values alone: whoever is sent them, another process
or another machine, plans the same run and makes the same cell of it. What a cell becomes beside a loaded model is in
`harness.runner.loaded`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch

import torch
from pydantic import BaseModel, ConfigDict

from harness.engine.attention import check_attention
from harness.engine.engine import Engine
from harness.engine.fused import check_engine
from harness.engine.shape import ModelShape
from harness.errors import InputError, missing_together
from harness.models.load import describe, limit_memory, resolve_device
from harness.runner.catalog import MethodSpec, build_tasks, parse_methods
from harness.runner.exclusions import check_exclusions, check_turns
from harness.runner.faults import blamed
from harness.runner.spec import Code, RunSpec, WrongOption, method_source, public_name, source_of, versions
from harness.statistics.noise import TWIN
from harness.storage.store import Manifest
from tasks.base import Sample, Task, TaskContext, Tokenizer
from tasks.common.load import load_of
from tasks.turns.conversation import Conversations

Made = Mapping[str, tuple[Task, Sequence[Sample]]]
"""Tasks by label, each with all of its samples, made ahead of a plan."""


class CellSpec(BaseModel):
    """One method on one task of a run.

    Attributes:
        run: says all else: the model, the device, the protocol, the seed.
        method: label of one of the run's methods.
        task: label of one of its tasks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: RunSpec
    method: str
    task: str


@dataclass(frozen=True)
class Sources:
    """Hashes of the code that a run's answers depend on, read once for all of its cells.

    Attributes:
        engine: of the engine.
        methods, tasks: label -> hash.
        versions: package -> version.
    """

    engine: str
    methods: dict[str, str]
    tasks: dict[str, str]
    versions: Mapping[str, str]

    def of(self, method: str, task: str) -> Code:
        """Of a cell."""
        return Code(self.engine, self.methods[method], self.tasks[task], self.versions)


@dataclass(frozen=True)
class Plan:
    """A run that has been checked as far as it can be without weights.

    Attributes:
        spec: what the user asked for.
        shape: of the model.
        methods: each label once, in the order of the run.
        tasks: likewise.
        samples: task -> ids of the only ones that this process answers; None where it answers all.
        made: tasks whose samples have been made.
    """

    spec: RunSpec
    shape: ModelShape
    methods: list[MethodSpec]
    tasks: list[Task]
    samples: Mapping[str, Set[str]] | None = None
    made: Made = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where this process runs it."""
        return resolve_device(self.spec.device)

    def cells(self) -> list[list[CellSpec]]:
        """All cells, task by task: the methods of a task take turns at its samples, so they stay together."""
        return [
            [CellSpec(run=self.spec, method=method.label, task=task.label) for method in self.methods]
            for task in self.tasks
        ]

    def method(self, cell: CellSpec) -> MethodSpec:
        """The method of a cell of this run."""
        return next(method for method in self.methods if method.label == cell.method)

    def task(self, cell: CellSpec) -> Task:
        """The task of a cell of this run."""
        return next(task for task in self.tasks if task.label == cell.task)

    def with_made(self, made: Made) -> Plan:
        """The same with the tasks among them that are its own: what they noted while they made samples counts, too."""
        made = {task.label: made[task.label] for task in self.tasks if _same(task, made.get(task.label))}
        return replace(
            self, tasks=[made[task.label][0] if task.label in made else task for task in self.tasks], made=made
        )

    def samples_of(self, task: Task, tokenizer: Tokenizer) -> Sequence[Sample]:
        """All samples of one of its tasks."""
        return self.made[task.label][1] if task.label in self.made else list(task.samples(tokenizer))

    def sources(self, packages: Mapping[str, str | None] | None = None) -> Sources:
        """Of its methods and tasks, as they are now.

        Args:
            packages: name -> version where requests are answered, if that is not here.
        """
        methods = {method.label: method_source(method) for method in self.methods}
        tasks = {task.label: source_of(type(task)) for task in self.tasks}
        used = {name: (packages or {}).get(name) or here for name, here in versions().items()}
        return Sources(source_of(Engine), methods, tasks, used)

    def manifest(self, device: str | None = None) -> Manifest:
        """What the store keeps of it; `device` says where it runs, if not here: "cpu" or "cuda"."""
        return Manifest(
            run_hash=self.spec.run_hash(),
            model=public_name(self.spec.model),
            device=device or self.device.type,
            latency_only=self.spec.model.startswith("random:"),
            methods=[method.label for method in self.methods],
            tasks=[task.label for task in self.tasks],
            spec=self.spec.identity() | {"limit": self.spec.limit},
        )


def chosen(patterns: str, label: str) -> bool:
    """Whether patterns, with commas between them, fit a method's label or a name in it."""
    return any(fnmatch(name, one.strip()) for one in patterns.split(",") for name in (label, *names(label)))


def names(label: str) -> list[str]:
    """A method's, and its sparse prefill's if it has one; an A/A twin goes by the name of what it is compared with."""
    return [item.partition(":")[0].partition("#")[0] for item in label.split("+")]


def plan(spec: RunSpec, *, elsewhere: bool = False) -> Plan:
    """Checks everything that can be checked without loading the model.

    Args:
        spec: what the user asks for.
        elsewhere: other processes will do it, on their devices; this one's is not looked at.

    Raises:
        InputError: whatever is wrong, in one line.
    """
    if not elsewhere:
        _check_device(spec, resolve_device(spec.device))
    methods = _methods(spec)
    _check_redo(spec, methods)
    with missing_together() as noted:
        with noted():
            tasks = _distinct(build_tasks(spec.tasks, context_of(spec)))
        with noted():
            shape = describe(spec.model)
            _check_shapes(methods, shape)
    loaded = any(map(load_of, tasks))
    check_exclusions(spec, loaded=loaded, elsewhere=elsewhere)
    for task in tasks:
        check_turns(spec.batch, task.label, turns=isinstance(task, Conversations) and not task.options.apart)
    for method in methods:
        _check_method(spec, method, loaded=loaded)
    _check_shares(spec, shape)
    _check_lengths(spec, tasks, shape)
    return Plan(spec, shape, methods, tasks)


def _same(task: Task, made: tuple[Task, Sequence[Sample]] | None) -> bool:
    return made is not None and type(made[0]) is type(task) and made[0].options == task.options


def context_of(spec: RunSpec) -> TaskContext:
    """What a run's tasks are told of it."""
    return TaskContext(spec.data_dir, spec.limit, spec.max_length, spec.seed)


def _check_device(spec: RunSpec, device: torch.device) -> None:
    check_attention(spec.attention, device)
    check_engine(spec.engine, device)
    limit_memory(device, spec.memory_limit)
    if device.type == "cuda" and spec.tensor_parallel > torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise WrongOption("tensor_parallel", f"{spec.tensor_parallel} devices were asked for, {there} visible")


def _distinct(tasks: Sequence[Task]) -> list[Task]:
    """Each task once, since groups may overlap.

    Raises:
        InputError: two different tasks have one label.
    """
    by_label: dict[str, Task] = {}
    for task in tasks:
        with blamed(task, task.label):
            known, asked = by_label.setdefault(task.label, task).fingerprint(), task.fingerprint()
        if known != asked:
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


def _check_redo(spec: RunSpec, methods: Sequence[MethodSpec]) -> None:
    for one in filter(None, spec.redo.split(",")):
        if not any(chosen(one, method.label) for method in methods):
            raise WrongOption("redo", f"{one!r} fits none of the methods {', '.join(each.label for each in methods)}")


def _check_shapes(methods: Sequence[MethodSpec], shape: ModelShape) -> None:
    with missing_together() as noted:
        for method in methods:
            with noted():
                method.check(shape)


def _check_method(spec: RunSpec, method: MethodSpec, *, loaded: bool) -> None:
    """Raises `InputError` for a method that cannot be run as the specification wants."""
    if loaded and method.kind.simulated:
        raise InputError(f"{method.label}: only simulates pruning, so what it does under load says nothing")
    if spec.batch > 1 or loaded:
        method.kind.check_batch(method.options)
    if spec.tensor_parallel > 1:
        method.check_parallel()


def _check_shares(spec: RunSpec, shape: ModelShape) -> None:
    size = spec.tensor_parallel
    for count, what in ((shape.kv_heads, "key/value heads"), (shape.intermediate, "channels of the feed forward")):
        if count % size:
            raise WrongOption("tensor_parallel", f"the {count} {what} of {spec.model} do not share out among {size}")


def _check_lengths(spec: RunSpec, tasks: Sequence[Task], shape: ModelShape) -> None:
    asked = {"--max-length": spec.max_length or 0}
    for task in tasks:
        with blamed(task, task.label):
            asked[task.label] = int(task.longest_prompt() or 0)
    for source, tokens in asked.items():
        if tokens > shape.max_context:
            raise InputError(f"{source} asks for {tokens} tokens; {spec.model} has {shape.context_words}")
