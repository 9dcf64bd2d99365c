"""Runs a specification from the terminal: progress on standard error, tables beside the records, Ctrl-C handled."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from pydantic import ValidationError
from rich.console import Console

from harness.errors import InputError
from harness.report.render import render
from harness.run.execute import plan, run
from harness.run.progress import Progress
from harness.run.spec import RunSpec

INTERRUPTED = 130


def read_spec(given: dict[str, Any]) -> RunSpec:
    """The specification of a run.

    Raises:
        InputError: a value that does not fit, named as an option of the command line.
    """
    try:
        return RunSpec(**given)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise InputError(f"{option}: {first['msg']} (got {first['input']!r})") from None


def carry_out(spec: RunSpec, folder: Path) -> None:
    """Runs, or resumes, `spec` in `folder` and writes its tables; see `to_the_end`."""
    planned = plan(spec)
    to_the_end(folder, lambda progress: run(planned, folder, progress))
    render(folder)


def to_the_end(folder: Path, work: Callable[[Progress], None]) -> None:
    """Does work that records into `folder`, showing its progress.

    Raises:
        InputError: bad input.
        typer.Exit: interrupted; what was recorded stays, and the same command goes on.
    """
    try:
        work(Progress(Console(stderr=True)))
    except KeyboardInterrupt:
        print(f"harness: interrupted; the same command goes on in {folder}", file=sys.stderr, flush=True)
        raise typer.Exit(INTERRUPTED) from None
