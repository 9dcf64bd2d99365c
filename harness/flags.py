"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OUTPUT = ("--output", "-o", "--out")
"""Names of the folder that a command writes to."""

MethodFiles = Annotated[
    list[Path] | None, typer.Option("--method-file", help="Python file that defines methods; may be given repeatedly")
]
TaskFiles = Annotated[
    list[Path] | None, typer.Option("--task-file", help="Python file that defines tasks; may be given repeatedly")
]

ExecutorName = Annotated[
    str | None,
    typer.Option("--executor", help="local: a process a GPU; ray: a cluster's machines; this process if none"),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="processes a machine, if not one a GPU; timed ones have it to themselves otherwise"),
]
RayAddress = Annotated[str | None, typer.Option(help="auto or HOST:PORT of a Ray cluster; one is started if none")]
Accelerator = Annotated[str | None, typer.Option(help="kind of the GPUs to use, where there are several")]
"""Where a run's requests go (`harness.executors.fleet.Fleet`)."""

Redo = Annotated[
    str,
    typer.Option("--redo", help="methods to ask again as their code changed: 'snapkv,adakv', or '*' (docs/run.md)"),
]
