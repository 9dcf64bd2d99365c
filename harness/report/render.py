"""All files of a run that are for people, made from its records alone."""

from __future__ import annotations

from pathlib import Path

from harness.report import plots, tables
from harness.report.summary import summarise
from harness.store import load, load_manifest


def render(run: Path | str) -> list[Path]:
    """Writes `summary.csv`, `table.md` and, where methods have scores and times, `accuracy_ttft.png` into a run.

    Returns:
        The files written, in that order.

    Raises:
        InputError: the folder is not a run, or is corrupt.
    """
    folder, manifest = Path(run), load_manifest(run)
    summary = summarise(load(run), manifest.methods, manifest.tasks)
    csv, table, plot = (folder / name for name in ("summary.csv", "table.md", "accuracy_ttft.png"))
    summary.to_csv(csv, index=False, lineterminator="\n")
    table.write_text(tables.markdown(manifest, summary, title=folder.resolve().name), encoding="utf-8")
    return [csv, table, plot] if plots.accuracy_ttft(manifest, summary, plot) else [csv, table]
