"""What a sweep leaves beside its runs: `sweep.md`, `sweep.csv`, and a plot for each axis."""

from __future__ import annotations

from pathlib import Path

from harness.errors import InputError
from harness.report import formats
from harness.report.figures import save
from harness.report.table import to_csv, to_markdown
from harness.report.throughput import throughput, throughput_figure
from harness.sweep.cells import Sweep
from harness.sweep.plots import axis_figure, file_name
from harness.sweep.results import Axis, Results, collect, table


def write(sweep: Sweep, folder: Path) -> list[Path]:
    """Writes table and plots of what is recorded, the page first.

    Returns:
        The files; none where there are no records.

    Raises:
        InputError: a run is corrupt, or a file cannot be written.
    """
    results = collect(sweep, folder)
    if not results.recorded:
        return []
    axes, runs = list(results.axes()), [found for _, found in results.recorded]
    try:
        plots = [path for axis in axes for path in _plot(axis, sweep, folder)]
        figure = throughput_figure(runs)
        plots += save(figure, folder, "throughput") if figure is not None else []
        page, numbers = folder / "sweep.md", folder / "sweep.csv"
        page.write_text(_page(results, plots), encoding="utf-8")
        numbers.write_text(to_csv(table(results)), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: cannot write the sweep's table: {error.strerror}") from None
    return [page, numbers, *plots]


def _plot(axis: Axis, sweep: Sweep, folder: Path) -> list[Path]:
    figure = axis_figure(axis, sweep.grid.name)
    return save(figure, folder, file_name(axis)) if figure is not None else []


def _page(results: Results, plots: list[Path]) -> str:
    parts = [f"# {results.sweep.grid.name}", *_circumstances(results), to_markdown(table(results)).rstrip()]
    together = throughput([found for _, found in results.recorded])
    parts += [to_markdown(together).rstrip()] if together.rows else []
    names = [f"`{path.name}`" for path in plots if path.suffix == ".png"]
    return "\n\n".join([*parts, *([f"Plots: {', '.join(names)}."] if names else [])]) + "\n"


def _circumstances(results: Results) -> list[str]:
    """Where each run was made, and what is missing."""
    lines = []
    for run, found in results.recorded:
        status = formats.status(found.manifest)
        where = f"Run `{run.folder}`: `{found.manifest.model}` on {formats.device(found.manifest)}."
        lines.append(where + (f" **{status}**" if status else ""))
    absent = len(results.sweep.runs) - len(results.recorded)
    return [*lines, *([f"**{absent} runs have no records yet.**"] if absent else [])]
