"""Accuracy, latency and memory of long-context inference under pruning methods, in one record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.storage.store import load as load


def __getattr__(name: str) -> Any:
    """`harness.load`, imported when asked for: pandas takes half a second that other uses need not wait for."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from harness.storage.store import load

    return load
