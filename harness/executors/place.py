"""A place of this machine where one order after the other is carried out, each in a fresh process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress

_COMMAND = (sys.executable, "-m", "harness.executors.process")


class Died(Exception):
    """How the process of an order died."""


class Place:
    """Its process imports what carries orders out, and is forked for each (`harness.executors.process`).

    It ends with the process that made the place, and so does the order that it carries out.
    """

    def __init__(self, answer: str, environment: Mapping[str, str]) -> None:
        """
        Args:
            answer: `package.module:function`.
            environment: variables that orders find, beside those that are set here.
        """
        self.environment, self._answer = environment, answer
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, order: bytes) -> None:
        """Begins to import, and to do what orders like this one share, unless that is done."""
        if self._process is None:
            self._begin()
            self._write(b"\0" + order)

    def _begin(self) -> None:
        # What can be imported here can be imported there, whatever put it onto the path. Ctrl-C, which reaches all
        # processes of a terminal's session, is for the one that gives the orders.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **self.environment}
        self._process = subprocess.Popen(
            [*_COMMAND, self._answer],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )

    def carry_out(self, order: bytes) -> Iterator[bytes]:
        """What the order says, message by message.

        Raises:
            Died: its process died.
        """
        if self._process is None:
            self._begin()
        process, code = self._process, None
        assert process is not None and process.stdout is not None
        try:
            self._write(order)
            for line in process.stdout:
                _, ended, last = line.rpartition(
                    b"\0"
                )  # behind half a message, where it was killed in the middle of one
                if ended:
                    code = int(last)
                    break
                if line.endswith(b"\n"):
                    yield line[:-1]
        finally:
            if code is None:  # it has ended itself, or nobody listens any more
                self._process, code = None, _end(process)
        if code:
            raise Died(f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}")

    def _write(self, line: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """Ends what is running."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> int:
    """Ends a process and its orders, unless they have ended; returns its exit code."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()
