"""How far a run is that several workers share: units done, running where, failed; requests, and the time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from harness.runner.progress import Progress, outcome
from harness.storage.record import Record


class Board:
    """Is told what happens to units and requests, and shows it."""

    def __init__(self, progress: Progress, units: int, requests: int, bar: tuple[Bar, TaskID] | None) -> None:
        """
        Args:
            progress: prints.
            units, requests: how many there are.
            bar: on a terminal.
        """
        self._progress, self._units, self._requests, self._bar = progress, units, requests, bar
        self._running: dict[int, str] = {}
        self._answered = self._done = self._failed = 0

    def started(self, number: int, where: str) -> None:
        """A unit's worker has loaded the model."""
        self._running[number] = where
        self._show(f"unit {number} runs on {where}")

    def record(self, record: Record) -> None:
        """A request has been answered."""
        self._answered += 1
        if self._bar is None:
            count = f"{record.task} {self._answered}/{self._requests}"
            self._progress.say(f"{count} {record.method}: {outcome(record)}")
        else:
            self._bar[0].advance(self._bar[1])

    def ended(self, number: int) -> None:
        """A unit is done."""
        self._done += 1
        self._leave(number, f"unit {number} is done")

    def lost(self, number: int, why: str, again: bool) -> None:
        """A unit has ended before its time."""
        self._failed += not again
        place = f" on {self._running[number]}" if number in self._running else ""
        self._progress.say(f"unit {number}{place}: {why}; {'it starts again' if again else 'it is given up'}")
        self._leave(number)

    def summary(self) -> str:
        """`units 3/8, 1 failed; running: 4 (node7, GPU-1b2c3d4e), 5 (...)`."""
        failed = f", {self._failed} failed" if self._failed else ""
        running = ", ".join(f"{number} ({where})" for number, where in self._running.items())
        return f"units {self._done}/{self._units}{failed}" + (f"; running: {running}" if running else "")

    def _leave(self, number: int, event: str = "") -> None:
        self._running.pop(number, None)
        self._show(event)

    def _show(self, event: str) -> None:
        if self._bar is not None:
            self._bar[0].update(self._bar[1], description=self.summary())
        elif event:
            self._progress.say(f"{event}; {self.summary()}")


@contextmanager
def shown(progress: Progress, units: int, requests: int) -> Iterator[Board]:
    """A board on a terminal as a bar, elsewhere as lines."""
    if not progress.console.is_terminal:
        yield Board(progress, units, requests, None)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=progress.console) as bar:
        line = bar.add_task(f"units 0/{units}", total=requests)
        yield Board(progress, units, requests, (bar, line))
