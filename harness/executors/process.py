"""What orders of this machine are forked from: `python -m harness.executors.process package.module:function`.

It imports the function once, which takes seconds, does with its `ahead` what orders share, and then forks a process for
each order, which takes milliseconds. No device is touched ahead of a fork, so each order has memory, a CUDA context and
faults of its own.

Orders are the lines of standard input; behind a NUL comes one that is to follow. Messages go to standard output, one a
line; behind those of an order comes a line that ends in a NUL and the exit code of its process. What the order's own
code prints goes to standard error.
Standard input stays open as long as who gives the orders lives: where it ends, so does the order, in the middle of
whatever it does.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import traceback
import warnings
from contextlib import suppress
from typing import BinaryIO

from harness.executors.executor import Answer, answer_of

_AHEAD = b"\0"


def main(name: str) -> None:
    """Carries out one order after the other with the function of that name."""
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Whoever asks whether there is CUDA, as modules do that are imported, would otherwise begin to use it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    answer = answer_of(name)
    # The threads here are pools and allocators of what was imported (OpenBLAS, Arrow), which know of forks.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    _share()
    while line := sys.stdin.buffer.readline():
        order = line.removeprefix(_AHEAD)
        _prepare(answer, order)
        if line.startswith(_AHEAD):
            continue
        process = os.fork()
        if not process:
            os._exit(_carry_out(answer, order, messages))
        _, status = os.waitpid(process, 0)
        try:
            messages.write(b"\0%d\n" % os.waitstatus_to_exitcode(status))
            messages.flush()
        except BrokenPipeError:
            os._exit(1)


def _prepare(answer: Answer, order: bytes) -> None:
    """Does what orders share; where it fails, each of them finds out for itself, and says so."""
    ahead = getattr(answer, "ahead", None)
    with suppress(Exception, SystemExit):
        if ahead is not None and ahead(order):
            _share()


def _share() -> None:
    """What is there stays; pages that no garbage collection writes to are shared."""
    gc.collect()
    gc.freeze()


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
