"""Requests decoded together: new tokens a second for all of them, by how many they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from harness.report import formats
from harness.report.figures import canvas, colour_of, legend, marker_of, names_of, tidy
from harness.report.recorded import Recorded
from harness.report.summary import BASELINE
from harness.report.table import Cell, Table, label, number

_NOTE = (
    "New tokens a second of the decode steps, over all requests of a batch; beside it the rate of "
    f"{BASELINE} in batches of the same size and length. TTFT: of a request's own prefill, with nothing queued. TPOT: "
    "time of a step that all requests share; its floor reads the weights once and every cache of the batch. Peak "
    "memory: the whole batch's. Energy/token: joules of the GPU in prefills and steps of the batch over its new "
    "tokens, where the device counts them. Medians over requests."
)
_BUS_NOTE = (
    " Host link: bytes of keys and values that a step brings from host memory for all requests, and what they take at "
    "the rate of a large copy, beside what the device reads: no step is faster than the longer of both floors."
)
_BUS = ("decode_bus_bytes", "decode_bus_floor_s")
_MEDIANS = ("ttft_s", "tpot_s", "decode_floor_s", "rate", "peak_memory_bytes", "joules", *_BUS)


def throughput(runs: Sequence[Recorded]) -> Table:
    """One row a length, batch size and method; no rows where nothing was decoded together."""
    rates = batch_rates(runs)
    rows = [_row(rates, key, row) for key, row in rates.iterrows()] if together(rates) else []
    head = ["method", "tokens", "batch", "tokens/s", f"times {BASELINE}", "TTFT", "TPOT", "of the floor", "peak memory"]
    head.append("energy/token")
    if not rows or not rates["decode_bus_bytes"].max() > 0:
        return Table("throughput", "Decode throughput by batch", _NOTE, head, rows)
    rows = [row + _over_bus(medians) for row, (_, medians) in zip(rows, rates.iterrows(), strict=True)]
    head += ["host link, a step", "its floor"]
    return Table("throughput", "Decode throughput by batch", _NOTE + _BUS_NOTE, head, rows)


def batch_rates(runs: Sequence[Recorded]) -> pd.DataFrame:
    """Medians by length, batch size and method, in the order of the runs' methods; a request alone is a batch of 1."""
    frames = [_with_rate(run.contenders) for run in runs if not run.contenders.empty]
    records = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["length", "size", "method"])
    known = records[records["rate"].notna()] if frames else records
    if known.empty:
        return pd.DataFrame(columns=list(_MEDIANS))
    ranks = {method: rank for rank, method in enumerate(dict.fromkeys(known["method"]))}
    medians = known.groupby(["length", "size", "method"])[list(_MEDIANS)].median().astype(float)
    return medians.sort_index(level="method", key=lambda names: names.map(ranks), sort_remaining=False).sort_index(
        level=["length", "size"], sort_remaining=False, kind="stable"
    )


def together(rates: pd.DataFrame) -> bool:
    """Whether any requests were decoded together."""
    return not rates.empty and max(rates.index.get_level_values("size")) > 1


def throughput_figure(runs: Sequence[Recorded]) -> Figure | None:
    """Decode throughput over batch size, a panel a length; None where there is one batch size only."""
    rates = batch_rates(runs)
    if not together(rates) or rates.index.get_level_values("size").nunique() < 2:
        return None
    lengths = list(dict.fromkeys(rates.index.get_level_values("length")))
    figure = canvas(1.0 + 4.4 * len(lengths), 4.4)
    names = names_of(list(dict.fromkeys(method for run in runs for method in run.methods)))
    for axes, length in zip(figure.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True):
        for index, (method, name) in enumerate(names.items()):
            own = rates[(rates.index.get_level_values("method") == method)].xs(length, level="length")["rate"]
            sizes = own.index.get_level_values("size")
            axes.plot(list(sizes), list(own), color=colour_of(index), marker=marker_of(index), label=name)
        sizes = sorted(set(rates.xs(length, level="length").index.get_level_values("size")))
        axes.set(xscale="log", yscale="log", xlabel="requests decoded together", title=f"{length} tokens")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        tidy(axes)
    figure.axes[0].set_ylabel("new tokens a second, all requests")
    legend(figure)
    figure.suptitle(f"{runs[0].manifest.model} on {formats.device(runs[0].manifest)}", fontsize=11)
    return figure


def _with_rate(records: pd.DataFrame) -> pd.DataFrame:
    """With the batch's size, tokens a second and joules a token: of one alone its own."""
    gaps = [sum(gaps) if isinstance(gaps, list) else math.nan for gaps in records["token_s"]]
    alone = (records["new_tokens"] - 1) / pd.Series(gaps, index=records.index).where(lambda total: total > 0)
    joules = pd.to_numeric(records["own_energy_j"], errors="coerce") / records["new_tokens"]
    rates = records["batch_tokens_per_s"].fillna(alone)
    return records.assign(size=records["batch"].fillna(1).astype(int), rate=rates, joules=joules.astype(float))


def _over_bus(row: pd.Series[float]) -> list[Cell]:
    nbytes, floor = (row[name] for name in _BUS)
    return [number(nbytes, formats.size(nbytes)), number(floor, formats.seconds(floor))]


def _row(rates: pd.DataFrame, key: Any, row: pd.Series[float]) -> list[Cell]:
    length, size, method = key
    full = rates["rate"].get((length, size, BASELINE), math.nan)
    reached = row["decode_floor_s"] / row["tpot_s"] if row["tpot_s"] else math.nan
    return [
        label(method),
        number(length, str(length)),
        number(size, str(size)),
        number(row["rate"], formats.rate(row["rate"])),
        number(row["rate"] / full, formats.times(row["rate"] / full)),
        number(row["ttft_s"], formats.seconds(row["ttft_s"])),
        number(row["tpot_s"], formats.seconds(row["tpot_s"])),
        number(reached, formats.percent(reached)),
        number(row["peak_memory_bytes"], formats.size(row["peak_memory_bytes"])),
        number(row["joules"], formats.joules(row["joules"])),
    ]
