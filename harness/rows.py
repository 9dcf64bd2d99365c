"""Where methods of earlier versions look for `harness.engine.step`."""

from harness.engine.step import Heads, Rows, Step

__all__ = ["Heads", "Rows", "Step"]
