"""What can be asked for by name: methods and tasks, with their options."""

from __future__ import annotations

from dataclasses import dataclass

from harness.engine.method import Method, ModelContext
from harness.engine.shape import ModelShape
from harness.errors import InputError
from harness.grammar import parse_items, without_paths
from harness.options import OptionSet
from harness.registry import Registry
from tasks.base import Task, TaskContext

METHODS: Registry[Method] = Registry("method", "methods", Method)
TASKS: Registry[Task] = Registry("task", "tasks", Task)


@dataclass(frozen=True)
class MethodSpec:
    """A method with its options, not yet tied to a model.

    Attributes:
        label: how the user wrote it, without paths; its row in the results table.
        kind: the class.
        options: validated options.
    """

    label: str
    kind: type[Method]
    options: OptionSet

    def check(self, shape: ModelShape) -> None:
        """Raises `InputError` where the options do not fit the model."""
        self.kind.check(self.options, shape)

    def build(self, model: ModelContext) -> Method:
        """The method, ready for requests to that model."""
        return self.kind(self.options, model)


def parse_methods(text: str) -> list[MethodSpec]:
    """Every method of a `--methods` value.

    Raises:
        InputError: an unknown method or option, a member where there are none, files of one name in different places.
    """
    specs = [_spec(without_paths(str(item)), item.name, item.member, item.options) for item in parse_items(text)]
    labels = [spec.label for spec in specs]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"two different methods are called {label!r}; rename one of the files")
    return specs


def _spec(label: str, name: str, member: str | None, options: dict[str, str]) -> MethodSpec:
    kind = METHODS.get(f"{name}/{member}" if member else name)
    return MethodSpec(label, kind, kind.Options.read(f"method {kind.name}", options))


def build_tasks(text: str, context: TaskContext) -> list[Task]:
    """Every task that a `--tasks` value stands for, groups expanded.

    Raises:
        InputError: an unknown task, member or option, or missing data.
    """
    tasks = [task for item in parse_items(text) for task in TASKS.get(item.name).expand(item, context)]
    for task in tasks:
        task.label = without_paths(task.label)
    return tasks
