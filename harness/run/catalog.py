"""What can be asked for by name: methods and tasks, with their options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from harness.engine.method import FirstLayers, Method, ModelContext
from harness.engine.shape import ModelShape
from harness.errors import InputError
from harness.grammar import Item, parse_items, without_paths
from harness.options import OptionSet
from harness.registry import Registry
from harness.run.faults import Fault, blamed, told
from tasks.base import Task, TaskContext

METHODS: Registry[Method] = Registry("method", "methods", Method)
TASKS: Registry[Task] = Registry("task", "tasks", Task)


@dataclass(frozen=True)
class MethodSpec:
    """A method with its options, not yet tied to a model.

    Attributes:
        label: how the user wrote it; its row in the results table.
        kind: the class.
        options: validated options.
    """

    label: str
    kind: type[Method]
    options: OptionSet

    def check(self, shape: ModelShape) -> None:
        """Raises `InputError` where the options do not fit the model, or the method cannot tell."""
        with blamed(self.kind, f"method {self.label}"):
            self.kind.check(self.options, shape)

    def build(self, model: ModelContext) -> Method:
        """The method, ready for requests to that model; one that cannot be made fails at each of them.

        Raises:
            InputError: the options do not fit the model.
        """
        try:
            return self.kind(self.options, model)
        except InputError:
            raise
        except Exception as error:  # whatever a third party's code raises
            return Unmade(model, told(self.kind, error))


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
        InputError: an unknown method or option, a member where there are none.
    """
    return [_spec(str(item), item.name, item.member, item.options) for item in parse_items(text)]


def _spec(label: str, name: str, member: str | None, options: dict[str, str]) -> MethodSpec:
    kind = METHODS.get(f"{name}/{member}" if member else name)
    with blamed(kind, f"method {kind.name}"):
        return MethodSpec(label, kind, kind.Options.read(f"method {kind.name}", options))


def build_tasks(text: str, context: TaskContext) -> list[Task]:
    """Every task that a `--tasks` value stands for, groups expanded.

    Raises:
        InputError: an unknown task, member or option, missing data, or a task that fails.
    """
    tasks = [task for item in parse_items(text) for task in _expanded(item, context)]
    for task in tasks:
        task.label = without_paths(task.label)
    return tasks


def _expanded(item: Item, context: TaskContext) -> Sequence[Task]:
    kind = TASKS.get(item.name)
    with blamed(kind, f"task {item}"):
        return kind.expand(item, context)
