"""What was found out as a table and a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib.figure import Figure

from harness.capacity.accuracy import Accuracy, Judged
from harness.capacity.held import Capacity, Held
from harness.errors import InputError
from harness.report import formats
from harness.report.figures import canvas, colour_of, legend, marker_of, names_of, save, tidy
from harness.report.plots import pareto
from harness.report.summary import BASELINE
from harness.report.table import Cell, Table, label, number, to_csv, to_markdown


def write(
    found: Capacity, methods: Sequence[str], folder: Path, scores: Judged | None = None
) -> tuple[str, list[Path]]:
    """Writes `capacity.md`, `capacity.csv` and, where something was decoded, `capacity.png` and `.svg`.

    Where a run has scores of such methods, also `capacity-accuracy.png` and `.svg`.

    Args:
        found: what is known.
        methods: labels, in the order of rows.
        folder: where the files go.
        scores: of a run.

    Returns:
        The page and the files.

    Raises:
        InputError: a file cannot be written.
    """
    by_label = {held.method: held for held in found.methods}
    held = [by_label[method] for method in methods if method in by_label]
    table = capacity_table(found, held, scores)
    text = to_markdown(table)
    figures = {
        "capacity": capacity_figure(found, held),
        "capacity-accuracy": None if scores is None else accuracy_figure(found, held, scores),
    }
    try:
        for name, content in (("capacity.md", text), ("capacity.csv", to_csv(table))):
            (folder / name).write_text(content, encoding="utf-8")
        plots = [path for name, one in figures.items() if one is not None for path in save(one, folder, name)]
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from None
    return text, [folder / "capacity.md", folder / "capacity.csv", *plots]


def capacity_table(found: Capacity, held: Sequence[Held], scores: Judged | None = None) -> Table:
    """One row a method; what it scores comes last, where there is a run that says so."""
    full = next((one for one in held if one.method == BASELINE), None)
    head = [
        "method", "kept", "KV a request", "on the host", "largest batch", f"times {BASELINE}", "predicted", "tokens/s",
        f"times {BASELINE}, tokens/s", "step", "of the floor", "TTFT", "peak memory",
    ]  # fmt: skip
    note = (
        f"Requests of {found.length} tokens and {found.new_tokens} new ones each, prefilled one after the other until "
        f"the {formats.size(found.memory_bytes)} of memory were full, and decoded together; behind a + `--most` ended "
        "it, not memory. Predicted: the same, by what the first request left of the memory. Step: median of the decode "
        "steps, which bring one token of each request; its floor reads the weights once and every cache. Ratios "
        f"compare with {BASELINE} at its own largest batch."
    )
    title = f"Capacity: `{found.model}` on {device(found)}"
    rows = [_row(one, full) for one in held]
    if scores is not None:
        note += f" Accuracy: mean over the tasks of {scores.words}; beside it the paired difference from {BASELINE}."
        head += ["accuracy", f"against {BASELINE}, points"]
        rows = [row + _scores(scores.methods.get(one.method)) for row, one in zip(rows, held, strict=True)]
    return Table("capacity", title, note, head, rows)


def _scores(one: Accuracy | None) -> list[Cell]:
    if one is None:
        return _nothing(2)
    difference = one.difference, one.low, one.high
    return [
        number(one.score, f"{one.score:.1f} %"),
        number(one.difference, formats.points(*difference), *difference[1:]),
    ]


def device(found: Capacity) -> str:
    """The GPU's name."""
    gpus = found.environment.get("cuda") or [{}]
    return str(gpus[0].get("name") or "CUDA")


def _row(held: Held, full: Held | None) -> list[Cell]:
    if held.failed is not None:
        return [label(held.method), *[Cell(formats.NOTHING)] * 3, Cell(f"failed: {held.failed}"), *_nothing(8)]
    larger = held.batch / full.batch if full is not None and full.batch else math.nan
    rates = (held.tokens_per_s, full.tokens_per_s if full is not None else None)
    faster = rates[0] / rates[1] if rates[0] and rates[1] else math.nan
    reached = held.floor_s / held.step_s if held.floor_s and held.step_s else math.nan
    return [
        label(held.method),
        number(held.kept, formats.percent(_nan(held.kept))),
        *(number(size, formats.size(_nan(size))) for size in (held.kv_bytes, held.kv_bytes_host)),
        number(held.batch, f"{held.batch}{'+' if held.bound == 'most' else ''}"),
        number(larger, formats.times(larger)),
        number(held.predicted, formats.NOTHING if held.predicted is None else str(held.predicted)),
        number(held.tokens_per_s, formats.rate(_nan(held.tokens_per_s))),
        number(faster, formats.times(faster)),
        number(held.step_s, formats.seconds(_nan(held.step_s))),
        number(reached, formats.percent(reached)),
        number(held.ttft_s, formats.seconds(_nan(held.ttft_s))),
        number(held.peak_bytes, formats.size(_nan(held.peak_bytes))),
    ]


def _nothing(count: int) -> list[Cell]:
    return [Cell(formats.NOTHING)] * count


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def capacity_figure(found: Capacity, held: Sequence[Held]) -> Figure | None:
    """Decode throughput over batch size, each method at its largest batch; None where nothing was decoded."""
    names = names_of([one.method for one in held])
    known = [(index, one, one.tokens_per_s) for index, one in enumerate(held) if one.batch and one.tokens_per_s]
    if not known:
        return None
    figure = canvas(6.4, 4.8)
    axes = figure.subplots()
    for index, one, rate in known:
        name = names[one.method] + (" (more fit)" if one.bound == "most" else "")
        axes.scatter(one.batch, rate, s=55, color=colour_of(index), marker=marker_of(index), label=name)
    axes.set(xscale="log", yscale="log", xlabel="largest batch", ylabel="new tokens a second, all requests")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.tick_params(which="both", labelsize=8)
    axes.set_title(f"{found.model} on {device(found)}, {found.length} tokens a request", fontsize=11)
    tidy(axes)
    legend(figure)
    return figure


def accuracy_figure(found: Capacity, held: Sequence[Held], scores: Judged) -> Figure | None:
    """Accuracy over decode throughput, each method at its largest batch; None where no method has both.

    Bars are paired 95 % intervals; the line joins whom nobody beats in both.
    """
    names = names_of([one.method for one in held])
    known = [
        (index, one.method, one.tokens_per_s, scores.methods[one.method])
        for index, one in enumerate(held)
        if one.tokens_per_s and one.method in scores.methods
    ]
    if not known:
        return None
    figure = canvas(6.4, 4.8)
    axes = figure.subplots()
    for index, method, rate, accuracy in known:
        axes.plot((rate, rate), accuracy.ends, color=colour_of(index), linewidth=1.2)
        axes.scatter(rate, accuracy.score, s=55, color=colour_of(index), marker=marker_of(index), label=names[method])
    points = [(rate, accuracy.score) for _, _, rate, accuracy in known]
    front = [points[index] for index in pareto([(-rate, score) for rate, score in points])]
    # Steps, not slopes: between two methods there is nothing that anyone could choose.
    style: dict[str, Any] = {"color": "#888888", "linestyle": "--", "linewidth": 1, "zorder": 1}
    axes.plot([x for x, _ in front], [y for _, y in front], drawstyle="steps-post", **style)
    axes.set(xscale="log", xlabel="new tokens a second, all requests (log)", ylabel="accuracy in %")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(which="both", labelsize=8)
    figure.suptitle(f"{found.model} on {device(found)}, {found.length} tokens a request", fontsize=11)
    whose = scores.words.replace("`", "")
    words = f"accuracy: {whose}; bars: 95 %, paired with {BASELINE}; dashed: nobody is better in both"
    axes.set_title("\n".join(wrap(words, 90)), fontsize=8, color="#555555")
    tidy(axes)
    legend(figure)
    return figure
