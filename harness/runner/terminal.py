"""The one way from a specification to records and their page, for every command: progress, drawing, Ctrl-C.

Progress goes to standard error. Ctrl-C leaves a valid folder that says it is incomplete; what it holds is drawn and
printed all the same, and the terminal says how to go on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import typer
from rich.console import Console

from harness.errors import INTERRUPTED, InputError
from harness.executors.fleet import Fleet
from harness.report.json_summary import json_summary
from harness.report.render import render
from harness.report.written import wrote
from harness.runner.execute import Worker
from harness.runner.fan_out import execute_with
from harness.runner.plan import Plan, plan
from harness.runner.progress import Progress
from harness.runner.ranks import worker_of
from harness.runner.spec import RunSpec, WrongOption
from harness.storage.store import load, load_manifest

Drawn = tuple[str, Sequence[Path]]
"""A page for people, and the files that were written."""
Ran = tuple[str, Sequence[Path], Sequence[str]]
"""The same of a run, and a line for each method that failed on a task."""


def run(spec: RunSpec, folder: Path, draw: Callable[[Path], Drawn] | None = None, fleet: Fleet | None = None) -> Ran:
    """Runs, or resumes, a specification and draws its table, or what `draw` draws; see `run_plan`."""
    go_on = f"the same command, or 'harness resume {folder}'"
    planned = plan(spec, elsewhere=fleet is not None)
    return run_plan(planned, folder, worker_of(spec), draw or draw_tables, go_on, fleet)


def resume(
    folder: Path,
    limit: int | None = None,
    data_dir: Path | None = None,
    model: str | None = None,
    fleet: Fleet | None = None,
    redo: str = "",
) -> Ran:
    """Goes on with the run that a folder holds; see `run_plan`.

    Args:
        folder: of the run.
        limit: samples a task, if not as many as before.
        data_dir: of LongBench; paths are not recorded.
        model: where it lies, if it is a path.
        fleet: where it runs, if not in this process.
        redo: see `harness.runner.changes`.
    """
    recorded = load_manifest(folder).spec
    changed = {key: value for key, value in {"limit": limit, "model": model}.items() if value is not None}
    try:
        spec = RunSpec.read(recorded | changed | {"data_dir": data_dir, "redo": redo})
    except WrongOption as error:
        raise WrongOption("samples", error.reason) if error.option == "limit" else error from None
    ran = run(spec, folder, fleet=fleet)
    for task in _exhausted(folder, limit) if limit is not None else ():
        print(f"harness: {task}: there are no more samples than these", file=sys.stderr, flush=True)
    return ran


def _exhausted(folder: Path, limit: int) -> list[str]:
    """Tasks of which a whole run has fewer samples than it was asked for."""
    counts = load(folder).groupby("task", sort=False)["sample"].nunique()
    return [str(task) for task, count in counts.items() if count < limit]


def run_plan(
    planned: Plan,
    folder: Path,
    start: type[Worker],
    draw: Callable[[Path], Drawn],
    go_on: str,
    fleet: Fleet | None = None,
) -> Ran:
    """Runs, or resumes, a plan and draws what is recorded.

    Args:
        planned: what to do.
        folder: where the records go.
        start: makes who answers.
        draw: writes what is for people from the folder's records.
        go_on: how to, if it is interrupted.
        fleet: where it runs, if not in this process.

    Raises:
        InputError: bad input.
        SystemExit: interrupted; what is recorded by then has been drawn and printed.
    """
    try:
        failures = execute_with(fleet, planned, folder, Progress(Console(stderr=True)), start)
    except KeyboardInterrupt:
        # There may be too little to draw.
        with suppress(InputError):
            show(*draw(folder))
        print(f"harness: interrupted; {folder} is marked incomplete; to go on: {go_on}", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    return *draw(folder), failures


def draw_tables(folder: Path) -> Drawn:
    """Writes a run's tables and its plot."""
    paths = render(folder)
    return (folder / "table.md").read_text(encoding="utf-8"), paths


def draw_json(folder: Path) -> Drawn:
    """Writes the same, and has a summary for programs as its page."""
    render(folder)
    return json_summary(folder), ()


def show(text: str, paths: Sequence[Path], failures: Sequence[str] = ()) -> None:
    """Prints a page, and where the files are.

    Raises:
        typer.Exit: there are failures, and they have been told.
    """
    print("\n".join([text, *([wrote(paths)] if paths else [])]), flush=True)
    for failure in failures:
        print(f"harness: {failure}", file=sys.stderr, flush=True)
    if failures:
        raise typer.Exit(1)
