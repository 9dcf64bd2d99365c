"""The process of one order on this machine: `python -m harness.executors.process package.module:function`.

The order is the first line of standard input, which stays open as long as who gave it lives: where it ends, so does the
process, in the middle of whatever it does. Messages go to standard output, one a line; what the order's own code prints
goes to standard error.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from harness.executors.executor import answer_of


def main(name: str) -> None:
    """Carries out one order with the function of that name."""
    # Ctrl-C reaches all processes of a terminal; the one that gave the order decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    order = sys.stdin.buffer.readline()
    threading.Thread(target=_end_with_the_driver, args=(sys.stdin.fileno(),), daemon=True).start()
    try:
        for message in answer_of(name)(order):
            messages.write(message + b"\n")
            messages.flush()
    except BrokenPipeError:
        os._exit(1)


def _end_with_the_driver(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
