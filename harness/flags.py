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
