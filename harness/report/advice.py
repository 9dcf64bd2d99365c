"""What the first screen says in words: which method to choose, and what speaks against the numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from harness.report import formats
from harness.report.caveats import caveats
from harness.report.recorded import Recorded
from harness.report.summary import BASELINE
from harness.statistics.paired import ALL

_FEW = 30


def advice(run: Recorded) -> str:
    """The fastest method whose accuracy is shown to hold, else the fastest that is not shown to lose any.

    It says which of the two it is, and how large a loss is possible.
    """
    if BASELINE not in run.methods:
        return f"This run has no {BASELINE}, so nothing can be said of gains and losses."
    rows = [(method, run.effects.get((ALL, method), {})) for method in run.methods if method != BASELINE]
    faster = [(method, row) for method, row in rows if row.get("ttft_verdict") == "better"]
    safe = [(method, row) for method, row in faster if row["score_verdict"] != "worse"]
    if not run.scored:
        return _fastest(faster) + " Accuracy was not measured." if faster else _NONE
    if not safe:
        return f"{_NONE} {_losers(faster)}".strip()
    sure = [one for one in safe if one[1]["score_verdict"] in ("no difference", "better")]
    method, row = max(sure or safe, key=lambda one: float(one[1]["ttft_ratio"]))
    text = f"{_gain(row)}; {_accuracy(row)}."
    if sure:
        return f"{method} is the fastest of the methods shown to be about as accurate as {BASELINE} or better: {text}"
    return f"Undecided: no method is shown to be both sooner and as accurate as {BASELINE}. Fastest is {method}: {text}"


_NONE = f"No method is shown to start answering sooner than {BASELINE} without a loss of accuracy."


def warnings(run: Recorded) -> Iterator[str]:
    """What a reader has to know before believing the numbers."""
    status = formats.status(run.manifest)
    if status:
        yield status
    if run.manifest.latency_only:
        yield "Random weights: answers mean nothing and are not scored."
    if len(run.manifest.environments) > 1:
        yield "The machine or the software changed while this run was made; times may not compare."
    if run.comparison.floors.empty:
        yield "No noise floor: full attention was not run against itself (--noise-floor)."
    yield from map(str, caveats(run.records))
    counts = run.summary.loc[run.summary["n"] > 0, "n"]
    if len(counts) and int(counts.min()) < _FEW:
        yield f"Some tasks have only {int(counts.min())} samples: only large differences would show."


def _fastest(faster: list[tuple[str, dict[str, Any]]]) -> str:
    method, row = max(faster, key=lambda one: float(one[1]["ttft_ratio"]))
    return f"{method} is the fastest: {_gain(row)}."


def _losers(faster: list[tuple[str, dict[str, Any]]]) -> str:
    shown = [f"{method}: {_gain(row)}, {_points(row)}" for method, row in faster]
    return f"Sooner at a price: {'; '.join(shown)}." if shown else ""


def _gain(row: dict[str, Any]) -> str:
    return f"first token {formats.times(row['ttft_ratio'])} sooner{formats.interval(row['ttft_low'], row['ttft_high'])}"


def _points(row: dict[str, Any]) -> str:
    return f"accuracy {formats.points(row['score_difference'], row['score_low'], row['score_high'])} points"


def _accuracy(row: dict[str, Any]) -> str:
    word = row["score_verdict"]
    if word == "undecided" and math.isfinite(row["score_low"]):
        return f"{_points(row)}, which is undecided: a loss of {max(0.0, -row['score_low']):.1f} points is possible"
    return f"{_points(row)} ({word})"
