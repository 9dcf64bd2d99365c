"""The A/A noise floor: how much full attention differs from itself in the very run that others are judged in."""

from __future__ import annotations

import numpy as np
import pandas as pd

from harness.statistics.estimators import ALPHA
from harness.statistics.paired import COSTS, REFERENCE, compare

TWIN = f"{REFERENCE}#aa"
COLUMNS = [
    *("task", "n", "score_flips", "score_floor"),
    *(f"{name}_{field}" for name in COSTS for field in ("ratio", "low", "high", "floor")),
]


def noise_floor(
    records: pd.DataFrame,
    reference: str = REFERENCE,
    twin: str = TWIN,
    confidence: float = 1 - ALPHA,
    seed: int = 0,
    by: str = "task",
) -> pd.DataFrame:
    """Compares two cells of the same method, so that whatever is found is noise.

    An effect of another method below the floor is not shown as a gain. A floor near 1 does **not** mean that small
    effects are true: it holds what differs between two runs of the same code (clocks, caches, neighbours, kernels),
    not what differs by accident between two programs, such as where their memory lies (Mytkowicz et al. 2009).

    Args:
        records: one row a record (`harness.storage.store.load`), both cells among them.
        reference, twin: labels of the two cells.
        confidence: of the intervals.
        seed: of resampling.
        by: see `harness.statistics.paired.compare`.

    Returns:
        `COLUMNS`, one row a task and `all`; empty where the run has no such cells. Ratios are reference over twin with
        their interval; `*_floor` is the end of it that is farther from 1, as a factor above 1, NaN where there is no
        interval. `score_flips` counts answers whose score changed, `score_floor` is their share in points: the most
        that the mean can have moved by chance alone.
    """
    cells = records[records["method"].isin([reference, twin])]
    found = compare(cells, reference, confidence, seed, by)
    table = found[["task", "n"]].copy()
    flips = _flips(cells, reference, twin)
    table["score_flips"] = [sum(flips.values()) if task not in flips else flips[task] for task in found["task"]]
    table["score_floor"] = 100 * table["score_flips"] / found["score_n"].where(found["score_n"] > 0)
    for name in COSTS:
        for field in ("ratio", "low", "high"):
            table[f"{name}_{field}"] = found[f"{name}_{field}"]
        table[f"{name}_floor"] = np.maximum(found[f"{name}_high"], 1 / found[f"{name}_low"])
    return table[COLUMNS]


def _flips(cells: pd.DataFrame, reference: str, twin: str) -> dict[str, int]:
    """Answers of each task whose score is not the same in both cells."""
    wide = cells.pivot(index=["task", "sample"], columns="method", values="score")
    if not {reference, twin} <= set(wide.columns):
        return {}
    changed = (wide[twin] - wide[reference]).abs() > 1e-12
    return {str(task): int(number) for task, number in changed.groupby(level="task").sum().items()}
