"""Task names -> task classes."""

from __future__ import annotations

from harness.grammar import parse_items, without_paths
from harness.registry import Registry
from tasks.base import Task, TaskContext

TASKS: Registry[Task] = Registry("task", "tasks", Task)


def build_tasks(text: str, context: TaskContext) -> list[Task]:
    """Every task that a `--tasks` value stands for, groups expanded.

    Raises:
        InputError: an unknown task, member or option, or missing data.
    """
    tasks = [task for item in parse_items(text) for task in TASKS.get(item.name).expand(item, context)]
    for task in tasks:
        task.label = without_paths(task.label)
    return tasks
