"""Full attention: every token, every layer. The baseline that all others are measured against."""

from __future__ import annotations

from harness.engine.method import Method


class Full(Method):
    """The base class, unchanged, under its own name."""

    name = "full"
    summary = "full attention, nothing pruned: the baseline"

    def static_decode(self) -> bool:
        """Every token attends to everything."""
        return True
