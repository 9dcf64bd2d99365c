"""What orders of this machine are forked from: `python -m harness.executors.process package.module:function`.

It imports the function once, which takes seconds, and then forks a process for each order, which takes milliseconds.
No device is touched ahead of a fork, so each order has memory, a CUDA context and faults of its own.

Orders are the lines of standard input. Messages go to standard output, one a line; behind those of an order comes a
line that ends in a NUL and the exit code of its process. What the order's own code prints goes to standard error.
Standard input stays open as long as who gives the orders lives: where it ends, so does the order, in the middle of
whatever it does.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import traceback
from typing import BinaryIO

from harness.executors.executor import Answer, answer_of


def main(name: str) -> None:
    """Carries out one order after the other with the function of that name."""
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    answer = answer_of(name)
    # What is imported stays; pages that no garbage collection writes to are shared.
    gc.collect()
    gc.freeze()
    while order := sys.stdin.buffer.readline():
        process = os.fork()
        if not process:
            os._exit(_carry_out(answer, order, messages))
        _, status = os.waitpid(process, 0)
        try:
            messages.write(b"\0%d\n" % os.waitstatus_to_exitcode(status))
            messages.flush()
        except BrokenPipeError:
            os._exit(1)


def _carry_out(answer: Answer, order: bytes, messages: BinaryIO) -> int:
    """Carries out an order in this process, and returns its exit code."""
    threading.Thread(target=_end_with_the_driver, args=(sys.stdin.fileno(),), daemon=True).start()
    try:
        for message in answer(order):
            messages.write(message + b"\n")
            messages.flush()
        return 0
    except BrokenPipeError:
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _end_with_the_driver(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
