"""`harness.run`: the command `harness run`, for Python."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from harness.errors import unknown
from harness.executors.fleet import Fleet
from harness.report.render import render
from harness.runner.catalog import load_files
from harness.runner.fan_out import execute_with
from harness.runner.plan import plan
from harness.runner.progress import Progress
from harness.runner.ranks import worker_of
from harness.runner.spec import RunSpec
from harness.storage.store import load

Paths = str | Path | Sequence[str | Path]


def run(
    methods: str | Sequence[str] = "full,slim,lazyllm",
    tasks: str | Sequence[str] = "needle",
    model: str = "smollm2",
    *,
    output: str | Path | None = None,
    method_file: Paths = (),
    task_file: Paths = (),
    progress: bool = True,
    executor: str | None = None,
    workers: int | None = None,
    ray_address: str | None = None,
    accelerator: str | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Runs methods on tasks, as `harness run` does, and returns the records.

    The records, tables and plot are in the results folder, whose name is `attrs["folder"]` of what is returned. The
    same call again asks nothing twice: it resumes what was interrupted, and reads what is complete.

    Args:
        methods: a list, or a text in the command line's grammar: `"full,slim:block=32"`.
        tasks: likewise.
        model: as for the command.
        output: results folder; chosen by what is asked if None.
        method_file: Python file, or files, that define methods; read anew with every call.
        task_file: likewise for tasks.
        progress: whether to say on standard error how far it is.
        executor, workers, ray_address, accelerator: where it runs, if not in this process; as for the command.
        options: every other option of the command, with underscores: `limit`, `max_length`, `device`, `seed`, ...

    Returns:
        One row a record (`harness.load`).

    Warns:
        UserWarning: of each method that failed on a task, by its own fault; its requests have no answers.

    Raises:
        InputError: what the command would refuse, before a model loads wherever that can be told.
    """
    for name in options:
        if name not in RunSpec.model_fields:
            where = ("executor", "workers", "ray_address", "accelerator")
            own = ("output", "method_file", "task_file", "progress", *where)
            raise unknown("option of harness.run", name, {*RunSpec.model_fields, *own})
    given = {"methods": _joined(methods), "tasks": _joined(tasks), "model": model, **options}
    spec, folder = prepare(given, output, _paths(method_file), _paths(task_file))
    fleet, shown = (
        Fleet.read(executor, workers, ray_address, accelerator),
        Progress(Console(stderr=True, quiet=not progress)),
    )
    planned = plan(spec, elsewhere=fleet is not None)
    for failure in execute_with(fleet, planned, folder, shown, worker_of(spec)):
        warnings.warn(failure, stacklevel=2)
    render(folder)
    records = load(folder)
    records.attrs["folder"] = str(folder)
    return records


def prepare(
    given: Mapping[str, Any], output: str | Path | None, method_files: Sequence[Path], task_files: Sequence[Path]
) -> tuple[RunSpec, Path]:
    """The specification that a user gives as option -> value, and the folder of its results.

    Raises:
        InputError: a file or a value that cannot be had.
    """
    load_files(method_files, task_files)
    spec = RunSpec.read(given)
    return spec, Path(output) if output is not None else spec.default_folder()


def _joined(items: str | Sequence[str]) -> str:
    return items if isinstance(items, str) else ",".join(items)


def _paths(files: Paths) -> list[Path]:
    return [Path(files)] if isinstance(files, str | Path) else [Path(file) for file in files]
