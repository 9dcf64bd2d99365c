"""The table of joules, where a GPU counted them."""

from __future__ import annotations

import statistics
from typing import Any

import pandas as pd

from harness.measuring.energy import STEPS
from harness.report import formats
from harness.report.effects import ratio, verdict
from harness.report.markdown import Comparison
from harness.report.summary import BASELINE
from harness.report.table import Cell, Table, label, number
from harness.statistics.noise import TWIN


def energy(summary: pd.DataFrame, comparison: Comparison, records: pd.DataFrame) -> Table:
    """One row a task and method that has joules.

    Args:
        summary: `harness.report.summary.summarise` of the records.
        comparison: of the same records.
        records: one row a record.
    """
    known = summary[(summary["method"] != TWIN) & (summary["energy_n"] > 0)]
    rows = [_row(comparison, row) for row in known.to_dict("records")]
    head = ["task", "method", "n", "a request", "a new token", "less", "verdict"]
    note = (
        "Joules of the whole GPU from its own counter, medians over the n requests that have them; a new token's share "
        f"includes the prefill. Less: `{BASELINE}`'s joules over the method's on the same sample, with 95 % intervals. "
        f"{_counter(records)}"
    )
    return Table("energy", "Energy", note, head, rows, labels=2)


def _row(comparison: Comparison, row: dict[Any, Any]) -> list[Cell]:
    effect = comparison.effects.get((row["task"], row["method"]), {})
    return [
        label(row["task"]),
        label(row["method"]),
        number(row["energy_n"], str(row["energy_n"])),
        *(number(row[name], formats.joules(row[name])) for name in ("energy_j", "energy_per_token_j")),
        ratio(effect, "energy", False),
        verdict(effect, "energy"),
    ]


def _counter(records: pd.DataFrame) -> str:
    """How fine the counter is, and what the device takes at rest."""
    states = [state for state in records["device_state"] if isinstance(state, dict)]
    steps, watts = (
        [state[name] for state in states if state.get(name) is not None] for name in ("energy_step_s", "idle_power_w")
    )
    if not steps or not watts:
        return ""
    step = statistics.median(steps)
    return (
        f"The counter moves every {formats.seconds(step)}; requests below {formats.seconds(STEPS * step)} have no "
        f"joules. At rest the GPU takes {statistics.median(watts):.0f} W."
    )
