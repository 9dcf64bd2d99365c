"""Past runs: what lies below a folder of results."""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness.errors import InputError
from harness.storage.samples import PACKED, SAMPLES
from harness.storage.store import MANIFEST, Manifest, load_manifest


class PastRun(NamedTuple):
    """A run on disk; no manifest where it cannot be read.

    Attributes:
        folder: of the run.
        manifest: what it is.
        records: whole lines of its samples; None where they cannot be read.
    """

    folder: Path
    manifest: Manifest | None
    records: int | None

    def row(self) -> tuple[str, ...]:
        """For people: folder, start, model, methods, tasks (without options), records, and whether it is complete."""
        known, records = self.manifest, "-" if self.records is None else str(self.records)
        if known is None:
            return (str(self.folder), "", "", "", "", records, "no: the manifest cannot be read")
        started = known.started[:16].replace("T", " ")
        lists = (_bare(known.methods), _bare(known.tasks))
        return (str(self.folder), started, known.model, *lists, records, _complete(known, self.records))


def past_runs(root: Path) -> list[PastRun]:
    """Every run in a folder or below it, newest first; those that cannot be read are last.

    Raises:
        InputError: no such folder.
    """
    if not root.is_dir():
        raise InputError(f"{root} is no folder; 'harness run' makes results/ unless --output names another")
    found = [_past_run(path.parent) for path in sorted(root.rglob(MANIFEST))]
    return sorted(found, key=lambda run: run.manifest.started if run.manifest else "", reverse=True)


def run_folders(folders: Sequence[Path]) -> list[Path]:
    """The runs that folders are or hold, each once, in their order.

    Raises:
        InputError: a folder that is no run and holds none.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        inside = sorted(path.parent for path in folder.rglob(MANIFEST))
        if not inside:
            raise InputError(f"{folder} is not a run and holds none")
        found |= dict.fromkeys([folder] if folder in inside else inside)
    return list(found)


def _past_run(folder: Path) -> PastRun:
    try:
        return PastRun(folder, load_manifest(folder), _records(folder))
    except InputError:
        return PastRun(folder, None, _records(folder))


def _records(folder: Path) -> int | None:
    """Counted, not read: a line is a record unless a reader finds otherwise."""
    plain, packed = folder / SAMPLES, folder / PACKED
    if not plain.exists() and not packed.exists():
        return 0
    try:
        with plain.open("rb") if plain.exists() else gzip.open(packed) as lines:
            return sum(line.endswith(b"\n") for line in lines)
    except (EOFError, OSError, zlib.error):
        return None


def _bare(labels: list[str]) -> str:
    """`full, slim (3)`: names without options, and how many there are of each."""
    counts = Counter(label.partition(":")[0] for label in labels)
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items())


def _complete(manifest: Manifest, records: int | None) -> str:
    if manifest.status == "running":
        return "no: still running, or killed"
    if records is None or manifest.records and records != manifest.records.count:
        return "no: the records are not those that it ended with"
    return "yes" if manifest.status == "complete" else f"no: {'; '.join(manifest.reasons)}"
