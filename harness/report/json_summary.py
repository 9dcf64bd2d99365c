"""What a run measured, for programs: `harness run --json`."""

from __future__ import annotations

import json
from pathlib import Path

from harness.report.summary import COLUMNS, summarise
from harness.report.table import plain
from harness.storage.record import FAILED, NOT_SCORED, OUT_OF_MEMORY
from harness.storage.store import load, load_manifest

_FAULTS = {OUT_OF_MEMORY, FAILED, NOT_SCORED}


def json_summary(folder: Path) -> str:
    """One JSON object: the run, and for each method and task the columns of `summary.csv` and how many `failed`.

    Scores are percent, times seconds, memory bytes; what was not measured is null.

    Raises:
        InputError: the folder is not a run, or is corrupt.
    """
    manifest, records = load_manifest(folder), load(folder)
    failed = records.assign(failed=[not _FAULTS.isdisjoint(extra) for extra in records["extra"]])
    counts = failed.groupby(["method", "task"])["failed"].sum().to_dict()
    rows = [
        {name: plain(row[name]) for name in COLUMNS} | {"failed": int(counts[row["method"], row["task"]])}
        for row in summarise(records, manifest.methods, manifest.tasks).to_dict("records")
    ]
    about = {"folder": str(folder), "model": manifest.model, "device": manifest.device, "status": manifest.status}
    return json.dumps(about | {"results": rows}, indent=2)
