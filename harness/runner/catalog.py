"""What can be asked for by name: methods and tasks, with their options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from harness.engine.method import FirstLayers, Method, ModelContext
from harness.engine.shape import ModelShape
from harness.errors import InputError, missing_together
from harness.grammar import Item, parse_items, parse_sums, sum_without_paths, without_paths
from harness.options import OptionSet
from harness.registry import Registry
from harness.runner.faults import Fault, blamed, told
from methods.common.sparse_prefill import SparsePrefill
from tasks.base import Task, TaskContext

METHODS: Registry[Method] = Registry("method", "methods", Method)
TASKS: Registry[Task] = Registry("task", "tasks", Task)


def load_files(methods: Sequence[Path] | None = None, tasks: Sequence[Path] | None = None) -> None:
    """Makes known what is defined in Python files anywhere.

    Raises:
        InputError: a file that cannot be loaded, or a name that is taken.
    """
    for path in methods or ():
        METHODS.load_file(path)
    for path in tasks or ():
        TASKS.load_file(path)


@dataclass(frozen=True)
class MethodSpec:
    """A method with its options, not yet tied to a model.

    Attributes:
        label: how the user wrote it, without paths; its row in the results table.
        kind: the class.
        options: validated options.
        sparse: the sparse prefill of what it keeps, if there is one.
    """

    label: str
    kind: type[Method]
    options: OptionSet
    sparse: MethodSpec | None = None

    def check(self, shape: ModelShape) -> None:
        """Raises `InputError` where the options do not fit the model, or the method cannot tell."""
        with blamed(self.kind, f"method {self.label}"):
            self.kind.check(self.options, shape)
        if self.sparse is not None:
            self.sparse.check(shape)

    def check_parallel(self) -> None:
        """Raises `InputError` where the method is not for several ranks."""
        for spec in (self, self.sparse):
            if spec is not None:
                spec.kind.check_parallel()

    def build(self, model: ModelContext) -> Method:
        """The method, ready for requests to that model; one that cannot be made fails at each of them.

        Raises:
            InputError: the options do not fit the model.
        """
        try:
            method = self.kind(self.options, model)
        except InputError:
            raise
        except Exception as error:  # whatever a third party's code raises
            return Unmade(model, told(self.kind, error))
        method.sparse = None if self.sparse is None else self.sparse.build(model)
        return method


class Unmade(Method):
    """Stands for a method that could not be made."""

    def __init__(self, model: ModelContext, reason: str) -> None:
        """
        Args:
            model: that it was to be made for.
            reason: why it was not.
        """
        super().__init__(Method.Options(), model)
        self._reason = reason

    def prompt(self, ids: Tensor, run: FirstLayers) -> Tensor:
        """Fails."""
        raise Fault(self._reason)


def parse_methods(text: str) -> list[MethodSpec]:
    """Every method of a `--methods` value.

    Raises:
        InputError: an unknown method or option, a member where there are none, a sum of what does not go together, or
            files of one name in different places.
    """
    specs = [_sum(items) for items in parse_sums(text)]
    labels = [spec.label for spec in specs]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"two different methods are called {label!r}; rename one of the files")
    return specs


def _sum(items: list[Item]) -> MethodSpec:
    spec, *beside = map(_spec, items)
    for one in beside:
        if not issubclass(one.kind, SparsePrefill) or len(beside) > 1:
            raise InputError(f"{sum_without_paths(items)}: behind the + comes one sparse prefill")
        if not spec.kind.takes_sparse:
            raise InputError(f"{sum_without_paths(items)}: the prefill of {spec.kind.name} cannot be made sparse")
    return replace(spec, label=sum_without_paths(items), sparse=beside[0] if beside else None)


def _spec(item: Item) -> MethodSpec:
    kind = METHODS.get(f"{item.name}/{item.member}" if item.member else item.name)
    with blamed(kind, f"method {kind.name}"):
        return MethodSpec(kind.name, kind, kind.Options.read(f"method {kind.name}", item.options))


def build_tasks(text: str, context: TaskContext) -> list[Task]:
    """Every task that a `--tasks` value stands for, groups expanded.

    Raises:
        InputError: an unknown task, member or option, missing data, or a task that fails.
        MissingPackage: all that the tasks lack.
    """
    tasks: list[Task] = []
    with missing_together() as noted:
        for item in parse_items(text):
            with noted():
                tasks += _expanded(item, context)
    for task in tasks:
        task.label = without_paths(task.label)
    return tasks


def _expanded(item: Item, context: TaskContext) -> Sequence[Task]:
    kind = TASKS.get(item.name)
    with blamed(kind, f"task {item}"):
        return kind.expand(item, context)
