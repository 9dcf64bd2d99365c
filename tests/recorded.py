"""Runs on disk for tests: made-up records, and a manifest that fits them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.storage.record import Record
from harness.storage.samples import SAMPLES
from harness.storage.store import Manifest, RunStore


def save(
    folder: Path, manifest: Manifest, records: Sequence[Record], environment: dict[str, Any] | None = None
) -> Path:
    """A complete run of these records, all written at once; their labels follow those that the manifest names."""
    labels = {
        "methods": [*dict.fromkeys([*manifest.methods, *(one.method for one in records)])],
        "tasks": [*dict.fromkeys([*manifest.tasks, *(one.task for one in records)])],
    }
    with RunStore(folder, manifest.model_copy(update=labels), environment) as store:
        (folder / SAMPLES).write_text("".join(one.model_dump_json() + "\n" for one in records), encoding="utf-8")
        store.finish()
    return folder
