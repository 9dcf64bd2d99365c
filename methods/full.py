"""Full attention: every token, every layer. The baseline that all others are measured against."""

from __future__ import annotations

from harness.engine.method import Method
from harness.engine.replay.replay import Replay


class Full(Method):
    """The base class, unchanged, under its own name."""

    name = "full"
    summary = "full attention, nothing pruned: the baseline"
    parallel = True

    def replay(self) -> Replay:
        """Every token attends to everything."""
        return self.dense_replay
