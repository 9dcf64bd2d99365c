"""What was found out as a table and a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from harness.capacity.held import Capacity, Held
from harness.errors import InputError
from harness.report import formats
from harness.report.figures import canvas, colour_of, marker_of, names_of, save, tidy
from harness.report.summary import BASELINE
from harness.report.table import Cell, Table, label, number, to_csv, to_markdown


def write(found: Capacity, methods: Sequence[str], folder: Path) -> tuple[str, list[Path]]:
    """Writes `capacity.md`, `capacity.csv` and, where something was decoded, `capacity.png` and `.svg`.

    Args:
        found: what is known.
        methods: labels, in the order of rows.
        folder: where the files go.

    Returns:
        The page and the files.

    Raises:
        InputError: a file cannot be written.
    """
    by_label = {held.method: held for held in found.methods}
    held = [by_label[method] for method in methods if method in by_label]
    table = capacity_table(found, held)
    text, figure = to_markdown(table), capacity_figure(found, held)
    try:
        for name, content in (("capacity.md", text), ("capacity.csv", to_csv(table))):
            (folder / name).write_text(content, encoding="utf-8")
        plots = save(figure, folder, "capacity") if figure is not None else []
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from None
    return text, [folder / "capacity.md", folder / "capacity.csv", *plots]


def capacity_table(found: Capacity, held: Sequence[Held]) -> Table:
    """One row a method."""
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
    return Table("capacity", title, note, head, [_row(one, full) for one in held])


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
    figure.legend(loc="outside lower center", ncols=min(4, len(known)), frameon=False, fontsize=8)
    return figure
