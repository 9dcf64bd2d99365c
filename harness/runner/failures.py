"""Which requests of a session failed, told by cell."""

from __future__ import annotations

from collections import Counter

from harness.storage.record import FAILED, NOT_SCORED, Record


class Failures:
    """Counts them."""

    def __init__(self) -> None:
        """None yet."""
        self._asked: Counter[tuple[str, str]] = Counter()
        self._failed: Counter[tuple[str, str]] = Counter()
        self._reasons: dict[tuple[str, str], str] = {}

    def count(self, record: Record) -> None:
        """Takes note of a record."""
        cell = record.method, record.task
        self._asked[cell] += 1
        if record.failed:
            self._failed[cell] += 1
            self._reasons.setdefault(cell, record.extra.get(FAILED) or f"not scored: {record.extra[NOT_SCORED]}")

    def lines(self) -> list[str]:
        """One for each cell with failures: how many, and what went wrong in the first."""
        return [
            f"{method} on {task} failed, {count} of {self._asked[method, task]} requests: {self._reasons[method, task]}"
            for (method, task), count in self._failed.items()
        ]
