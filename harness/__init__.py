"""Accuracy, latency and memory of long-context inference under pruning methods, in one record.

    import harness
    records = harness.run(methods=["full", "slim"], tasks="needle", model="smollm2", limit=5)
    records.groupby("method")[["score", "ttft_s"]].mean()
    records = harness.load(records.attrs["folder"])

Bad input is an `InputError` of one line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.api import run as run
    from harness.errors import InputError as InputError
    from harness.storage.store import load as load


def __getattr__(name: str) -> Any:
    """What the package offers, imported when asked for: PyTorch and pandas take seconds that other uses need not wait.

    Raises:
        AttributeError: it offers no such thing.
    """
    from importlib import import_module

    if name not in _offered():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_offered()[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_offered()})


def _offered() -> dict[str, str]:
    """Name -> the module that has it."""
    return {"run": "harness.api", "load": "harness.storage.store", "InputError": "harness.errors"}
