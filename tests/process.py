"""Commands in processes of their own, to be interrupted and killed; forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.command import run

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["harness.runner.terminal", "harness.runner.loaded", "transformers.models.llama.modeling_llama"]
)


def start(*arguments: object, errors: Path = Path(os.devnull)) -> BaseProcess:
    """Starts `harness ARGUMENTS`, whose standard error goes to a file."""
    process = FORKS.Process(target=_command, args=(arguments, errors))
    process.start()
    return process


def _command(arguments: tuple[object, ...], errors: Path) -> None:
    # What runs the tests in the background may ignore the signal, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Path(os.devnull).open("w") as sys.stdout, errors.open("w") as sys.stderr:
        sys.exit(run(*arguments))
