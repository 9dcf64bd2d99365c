"""Where methods of earlier versions look for `harness.engine.shape`."""

from harness.engine.shape import ModelShape

__all__ = ["ModelShape"]
