"""The command `harness sweep`: parses and prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.errors import InputError
from harness.flags import OUTPUT, Accelerator, ExecutorName, MethodFiles, RayAddress, Redo, TaskFiles, Workers

if TYPE_CHECKING:
    from harness.executors.fleet import Fleet
    from harness.sweep.cells import Sweep


def sweep_command(
    grid: Annotated[Path, typer.Argument(help="YAML file: method options x tasks x lengths x models (docs/sweep.md)")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the cells and an estimate of time; ask nothing")] = (
        False
    ),
    output: Annotated[
        Path | None, typer.Option(*OUTPUT, help="folder of the runs; results/NAME if none is named")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="folder of data sets")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="draw what this folder has recorded of the grid; runs nothing")
    ] = None,
    redo: Redo = "",
    executor: ExecutorName = None,
    workers: Workers = None,
    ray_address: RayAddress = None,
    accelerator: Accelerator = None,
    method_file: MethodFiles = None,
    task_file: TaskFiles = None,
) -> None:
    """Run a grid of settings; the same command resumes. One table, and one plot an axis."""
    from harness.executors.fleet import Fleet
    from harness.runner.catalog import load_files
    from harness.sweep.cells import check, multiply
    from harness.sweep.grid_file import read_grid

    load_files(method_file, task_file)
    sweep = multiply(read_grid(grid), data_dir, redo)
    if source is not None:
        if dry_run or output is not None:
            raise InputError("--from draws in its folder what is recorded there: no --dry-run, no --output")
        return _draw(sweep, source)
    fleet = Fleet.read(executor, workers, ray_address, accelerator)
    check(sweep, elsewhere=fleet is not None)
    folder = output or Path("results") / grid.stem
    if not dry_run:
        return _run(sweep, folder, fleet)
    from harness.sweep.outlook import outlook

    print(outlook(sweep, folder), flush=True)


def _run(sweep: Sweep, folder: Path, fleet: Fleet | None) -> None:
    """Every run in turn; whatever ends them, what is recorded by then gets its table and plots."""
    from harness.runner.terminal import run, show
    from harness.sweep.pages import write

    failures: list[str] = []
    try:
        for index, one in enumerate(sweep.runs, start=1):
            print(f"run {index}/{len(sweep.runs)}: {one.folder}", file=sys.stderr, flush=True)
            failures += run(one.spec, folder / one.folder, fleet=fleet)[2]
    finally:
        if paths := write(sweep, folder):
            show(paths[0].read_text(encoding="utf-8"), paths, failures)


def _draw(sweep: Sweep, folder: Path) -> None:
    """The table and plots of records alone."""
    from harness.runner.terminal import show
    from harness.sweep.pages import write

    paths = write(sweep, folder)
    if not paths:
        runs = ", ".join(run.folder for run in sweep.runs)
        raise InputError(f"{folder} holds no records of {sweep.grid.path}: expected {runs} in it")
    show(paths[0].read_text(encoding="utf-8"), paths)
