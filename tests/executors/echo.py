"""Orders that say who carries them out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

ASKED: list[bytes] = []
LONG = b"x" * 2**24
ECHO = f"{__name__}:answer"


def answer(order: bytes) -> Iterator[bytes]:
    """Its process, that one's parent, how many orders the process has had; then what the order is about."""
    ASKED.append(order)
    yield b"%d %d %d" % (os.getpid(), os.getppid(), len(ASKED))
    if order == b"long\n":
        yield LONG
    if order == b"slow\n":
        time.sleep(60)
    if order == b"raise\n":
        raise ValueError("raised by an order")
