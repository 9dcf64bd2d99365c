"""How far a run is: a bar with the time left on a terminal, a plain line a record elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from harness.report.formats import duration
from harness.storage.record import FAILED, NOT_SCORED, OUT_OF_MEMORY, Record

Advance = Callable[[Record], None]


class Progress:
    """Prints on the console it is given; decides for itself whether that is a terminal."""

    def __init__(self, console: Console) -> None:
        """Args:
        console: where to print.
        """
        self.console = console

    def say(self, line: str) -> None:
        """Prints a line, above whatever bar there is."""
        if not self.console.quiet:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def loading(self, model: str) -> None:
        """Says what the first request waits for."""
        self.say(f"loading {Path(model).name} ...")

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        """Shows one task's progress; call what it yields with every record."""
        if not self.console.is_terminal:
            yield self._plain(label, total)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console) as bar:
            line = bar.add_task(label, total=total)
            yield lambda record: bar.update(line, advance=1, description=f"{label} [dim]{_method(record)}[/]")

    def _plain(self, label: str, total: int) -> Advance:
        done, began = 0, time.monotonic()

        def advance(record: Record) -> None:
            nonlocal done
            done += 1
            left = (time.monotonic() - began) * (total - done) / done
            rest = f"; {duration(left)} left" if done < total else ""
            line = f"{label} {done}/{total} {record.method}: {outcome(record)}{rest}"
            if not self.console.quiet:
                print(line, file=self.console.file, flush=True)

        return advance


def _method(record: Record) -> str:
    return record.method.partition(":")[0]


def outcome(record: Record) -> str:
    """How a request ended, in a few words."""
    if OUT_OF_MEMORY in record.extra:
        return f"out of memory, {record.prompt_tokens} tokens"
    if FAILED in record.extra:
        return f"failed in {record.extra[FAILED]}"
    if NOT_SCORED in record.extra:
        return f"not scored: {record.extra[NOT_SCORED]}"
    score = "" if record.score is None else f"score {record.score:.2f}, "
    ttft = "not timed" if record.ttft_s is None else f"TTFT {record.ttft_s:.3f} s"
    return f"{score}{ttft}, {record.prompt_tokens} + {record.new_tokens} tokens"
