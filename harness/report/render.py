"""All files of a run that are for people, made from its records alone."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from harness.report import markdown, plots
from harness.report.arrivals import arrivals
from harness.report.caveats import caveats
from harness.report.energy import energy
from harness.report.markdown import MARKED, Comparison
from harness.report.means import as_table, mean_scores
from harness.report.summary import ordered, summarise
from harness.report.tails import tails
from harness.statistics.noise import TWIN, noise_floor
from harness.statistics.paired import compare, leaders, verdicts
from harness.storage.cells import harmless_frame
from harness.storage.store import Manifest, load, load_manifest


def render(run: Path | str) -> list[Path]:
    """Writes `summary.csv`, `comparison.csv` and `table.md`.

    Also, where methods have scores and times, `accuracy_ttft.png`, and where the run has tasks of means that papers
    name, `means.csv`.

    Returns:
        The files written, in that order.

    Raises:
        InputError: the folder is not a run, or is corrupt.
    """
    folder, manifest, records = Path(run), load_manifest(run), load(run)
    summary, comparison = summarise(records, manifest.methods, manifest.tasks), compared(manifest, records)
    names = ("summary.csv", "comparison.csv", "table.md", "accuracy_ttft.png")
    csv, other_csv, table, plot = (folder / name for name in names)
    harmless_frame(summary).to_csv(csv, index=False, lineterminator="\n")
    harmless_frame(comparison.rows).to_csv(other_csv, index=False, lineterminator="\n", float_format="%.6g")
    warnings = [f"**{caveat.title}**{caveat.text}" for caveat in caveats(records)]
    more = [tails(summary), energy(summary, comparison, records), arrivals(records, manifest.methods)]
    page = markdown.markdown(manifest, summary, comparison, folder.resolve().name, warnings, more)
    table.write_text(page, encoding="utf-8")
    drawn = plots.accuracy_ttft(manifest, summary, plot)
    means = _write_means(summary, folder / "means.csv")
    return [csv, other_csv, table, *([plot] if drawn else []), *means]


def _write_means(summary: pd.DataFrame, path: Path) -> list[Path]:
    table = as_table(mean_scores(summary[summary["method"] != TWIN]))
    if table.empty:
        return []
    harmless_frame(table).to_csv(path, index=False, lineterminator="\n", float_format="%.6g")
    return [path]


def compared(manifest: Manifest, records: pd.DataFrame, by: str = "task") -> Comparison:
    """All that any table says about methods against each other.

    Args:
        manifest: says the order of methods and tasks.
        records: one row a record.
        by: what rows are for, see `harness.statistics.paired.compare`.
    """
    floors = noise_floor(records, by=by)
    rows = ordered(verdicts(compare(records, by=by), floors), manifest.methods, manifest.tasks)
    contenders = records[records["method"] != TWIN]
    marks = {measure: leaders(contenders, measure, by=by) - _within_noise(rows, measure) for measure in MARKED}
    return Comparison(rows, floors, marks)


def _within_noise(rows: pd.DataFrame, measure: str) -> set[tuple[str, str]]:
    """(task, method) whose ratio full attention has to itself: no gain, and so no mark in any table."""
    if measure == "score":
        return set()
    floor, ratio = rows[f"{measure}_floor"], rows[f"{measure}_ratio"]
    quiet = rows[(1 / floor <= ratio) & (ratio <= floor)]
    return set(zip(quiet["task"].astype(str), quiet["method"].astype(str), strict=True))
