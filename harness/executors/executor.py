"""What an executor is: it carries out orders, each in a fresh process of its own, and hands on what they say.

An order is a text, and what carries it out is a function that is named: `answer(order: bytes) -> Iterator[bytes]`. So
nothing but text moves between processes and machines, and executors know nothing of what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pkgutil import resolve_name
from typing import NamedTuple, Protocol, cast

Answer = Callable[[bytes], Iterator[bytes]]
"""Carries out an order; what it yields are messages of one line each, without its end.

One that has `ahead(order: bytes) -> bool` does in it what orders share, in the process that they are forked from, and
says whether there was something to do.
"""


class Event(NamedTuple):
    """Something about an order that was started.

    Attributes:
        number: of the order.
        message: that it sent; None where it has ended.
        death: how its process died; empty where it ended by itself.
    """

    number: int
    message: bytes | None
    death: str = ""


class Executor(Protocol):
    """Carries out orders side by side.

    Attributes:
        device: "cpu" or "cuda", where the processes compute.
        threads: that each of them may compute with on a CPU; None where that is settled elsewhere.
        note: what a user might not expect of it, in a line; empty where there is nothing.
    """

    device: str
    threads: int | None
    note: str

    def slots(self) -> int:
        """How many orders run at a time; may change when machines come and go."""

    def start(self, number: int, order: bytes) -> None:
        """Starts an order, in a place that is free, or as soon as one is.

        Args:
            number: which no other running order has.
            order: one line.
        """

    def next(self) -> Event:
        """Waits for the next event of the orders that are running.

        Raises:
            InputError: there is nowhere left to run them.
        """

    def avoid(self, number: int) -> None:
        """Gives no more orders to the machine that this one last ran on, if there are others."""

    def close(self) -> None:
        """Ends what is running."""


def answer_of(name: str) -> Answer:
    """The function behind `package.module:function`."""
    return cast(Answer, resolve_name(name))
