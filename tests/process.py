"""Commands in processes of their own, to be interrupted and killed; forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from harness.executors import process
from tests.command import run

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "harness.runner.terminal",
        "harness.runner.loaded",
        "harness.runner.orders",
        "transformers.models.llama.modeling_llama",
    ]  # fmt: skip
)


def start(*arguments: object, errors: Path = Path(os.devnull)) -> BaseProcess:
    """Starts `harness ARGUMENTS`, whose standard error goes to a file."""
    started = FORKS.Process(target=_command, args=(arguments, errors))
    started.start()
    return started


def _command(arguments: tuple[object, ...], errors: Path) -> None:
    # What runs the tests in the background may ignore the signal, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Path(os.devnull).open("w") as sys.stdout, errors.open("w") as sys.stderr:
        sys.exit(run(*arguments))


class Forked:
    """What a `Place` forks its orders from, which takes this for `subprocess.Popen`: ready at once, where a real one
    imports for five seconds of CPU time."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], **_: int) -> None:
        order, self._order = FORKS.Pipe(duplex=False)
        self._messages, messages = FORKS.Pipe(duplex=False)
        self._process = FORKS.Process(target=_worker, args=(command[-1], dict(env), order, messages))
        self._process.start()
        order.close()
        messages.close()
        self.stdin = os.fdopen(os.dup(self._order.fileno()), "wb")
        self.stdout = os.fdopen(os.dup(self._messages.fileno()), "rb")
        self._order.close()
        self._messages.close()
        assert self._process.pid is not None
        self.pid = self._process.pid
        while os.getpgid(self.pid) != self.pid:  # it has a session of its own, as it would have of the real one
            time.sleep(0.001)

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def _worker(answer: str, environment: dict[str, str], order: Connection, messages: Connection) -> None:
    os.setsid()
    os.environ.update(environment)
    os.dup2(order.fileno(), 0)
    os.dup2(messages.fileno(), 1)
    order.close()
    messages.close()
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    process.main(answer)
