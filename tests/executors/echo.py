"""Orders that say who carries them out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

ASKED: list[bytes] = []
AHEAD: list[tuple[int, bytes]] = []
LONG = b"x" * 2**24
ECHO = f"{__name__}:answer"
PREPARED = f"{__name__}:prepared"


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


class Prepared:
    """Says which process has prepared which orders for it."""

    def ahead(self, order: bytes) -> bool:
        """Notes an order."""
        if order == b"raise\n":
            raise ValueError("raised ahead of an order")
        AHEAD.append((os.getpid(), order))
        return True

    def __call__(self, order: bytes) -> Iterator[bytes]:
        """Its parent, and what that one has noted."""
        yield b"%d" % os.getppid()
        for process, noted in AHEAD:
            yield b"%d %s" % (process, noted.strip())


prepared = Prepared()
