"""The command `harness study`: parses and prints."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.errors import INTERRUPTED, InputError
from harness.flags import OUTPUT, MethodFiles, Redo, TaskFiles

if TYPE_CHECKING:
    from harness.study.runs import StudyRun
    from harness.study.study_file import StudyFile


def study_command(
    file: Annotated[Path, typer.Argument(help="YAML file: parts, and methods by budget (docs/study.md)")],
    model: Annotated[str | None, typer.Option(help="instead of the file's, for parts that name none")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            *OUTPUT, help="folder of the runs, results/NAME of the file by default; with --from, of the pages"
        ),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="folder of data sets; what lacks its data is left out")] = (
        None
    ),
    only: Annotated[str, typer.Option(help="runs to do, as patterns of their folders: 'ruler/kept=0.25-*'")] = "*",
    samples: Annotated[int | None, typer.Option(min=1, help="samples a task at most, if fewer than the file's")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="stop behind the request in which they end; the same command goes on")
    ] = None,
    redo: Redo = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print runs, matched options and samples; ask nothing")] = (
        False
    ),
    source: Annotated[
        Path | None, typer.Option("--from", help="draw what this folder has recorded of the study; runs nothing")
    ] = None,
    method_file: MethodFiles = None,
    task_file: TaskFiles = None,
) -> None:
    """Run methods at matched budgets, in portions.

    Balanced whenever it stops; one page says which to use when.
    """
    from harness.runner.catalog import load_files
    from harness.study.changed import check_code, with_redo
    from harness.study.runs import check_runs, study_runs
    from harness.study.study_file import read_study

    began = time.monotonic()
    _warn_once()
    load_files(method_file, task_file)
    study = read_study(file, model)
    if source is not None:
        if dry_run or redo or any(given is not None for given in (minutes, samples)):
            raise InputError("--from draws what is recorded: no --dry-run, no --minutes, no --samples, no --redo")
        return _draw(study, source, only, output)
    runs, left_out = check_runs(study_runs(study, data_dir, only))
    folder = output or Path("results") / file.stem
    runs = with_redo(runs, redo)
    try:
        left_out += check_code(runs, folder, samples)
    except InputError as error:
        if not dry_run:
            raise
        left_out.append(str(error))
    for line in left_out:
        print(f"harness: {line}", file=sys.stderr, flush=True)
    if dry_run:
        from harness.study.outlook import outlook

        return print(outlook(study, runs, folder, samples), flush=True)
    deadline = math.inf if minutes is None else began + 60 * minutes
    whole, failures = _run(runs, folder, deadline, samples)
    if not whole:
        return print(f"time is up: {folder} is balanced so far; the same command goes on, --from {folder} draws")
    _draw(study, folder, only)
    if failures:
        raise typer.Exit(1)


def _warn_once() -> None:
    """The runs of a part ask the same tasks, which would each say what they lack, again and again."""
    said: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in said:
            said.add(str(message))
            print(f"harness: {message}", file=sys.stderr, flush=True)

    warnings.showwarning = show


def _run(runs: Sequence[StudyRun], folder: Path, deadline: float, samples: int | None) -> tuple[bool, list[str]]:
    """Everything, or what fits; what is not whole is not drawn: that takes time of a device that others wait for."""
    from rich.console import Console

    from harness.study.execute import Timed, run_study

    try:
        whole, failures = run_study(runs, folder, Timed(Console(stderr=True), deadline), samples)
    except KeyboardInterrupt:
        print(f"harness: interrupted; the same command goes on, --from {folder} draws", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    for failure in failures:
        print(f"harness: {failure}", file=sys.stderr, flush=True)
    return whole, failures


def _draw(study: StudyFile, folder: Path, only: str, output: Path | None = None) -> None:
    from harness.runner.terminal import show
    from harness.study.page import write

    show(*write(study, folder, only, output))
