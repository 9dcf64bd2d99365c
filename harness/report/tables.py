"""The Markdown table of a run, for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd

from harness.report import words
from harness.report.summary import BASELINE, overall
from harness.store import Manifest

_Column = tuple[str, str, Callable[[Any], str]]

_MEASURES: list[_Column] = [
    ("score", "score %", words.score),
    ("ttft_s", "TTFT", words.seconds),
    ("ttft_speedup", "sooner", words.times),
    ("tpot_s", "TPOT", words.seconds),
    ("e2e_s", "E2E", words.seconds),
    ("e2e_speedup", "faster", words.times),
    ("peak_memory_bytes", "peak memory", words.size),
    ("kv_bytes", "KV", words.size),
    ("kept_fraction", "kept", words.percent),
]

_MEANING = (
    "Every method answers the same requests on the same kernels, loop and clock. "
    "TTFT: time from the prompt's token ids on the device to the first new token; TPOT: time per token after it; "
    "E2E: time to the last one. Times and bytes are medians over the n samples of a task. "
    "KV: keys and values on the device at the end; kept: share of the prompt's tokens x layers that they hold."
)
_SPEEDUPS = (
    f"Sooner (TTFT) and faster (E2E): median over samples of the time of `{BASELINE}` divided by the method's time on "
    "the same sample."
)
_NO_SPEEDUPS = f"No speed-ups: this run has no `{BASELINE}` to compare with."


def markdown(manifest: Manifest, summary: pd.DataFrame, title: str = "Results") -> str:
    """The whole page: circumstances, one row for each task and method, one row a method over all tasks.

    Args:
        manifest: what the run is.
        summary: `harness.report.summary.summarise` of its records.
        title: the heading.
    """
    parts = [f"# {title}", *_circumstances(manifest), _explanation(manifest, summary)]
    measures = [column for column in _MEASURES if not (manifest.latency_only and column[0] == "score")]
    if summary.empty:
        return _join([*parts, "No records."])
    parts.append(_table(summary, [("task", "task", _text), ("method", "method", _text), ("n", "n", str), *measures]))
    if summary["task"].nunique() > 1:
        parts += _all_tasks(summary, measures)
    return _join(parts)


def _circumstances(manifest: Manifest) -> Iterable[str]:
    status = words.status(manifest)
    if status:
        yield f"> **{status}** The numbers are of what was recorded until then."
    packages = manifest.environments[-1].get("packages", {}) if manifest.environments else {}
    torch = f", torch {packages['torch']}" if packages.get("torch") else ""
    started = f", {manifest.started[:10]}" if manifest.started else ""
    yield f"Model `{manifest.model}` on {words.device(manifest)}{torch}{started}."
    if manifest.latency_only:
        yield "**Random weights, latency only**: the answers mean nothing, so there are no scores."
    if len(manifest.environments) > 1:
        yield "**The machine or the software changed while this run was made**; times may not compare."


def _explanation(manifest: Manifest, summary: pd.DataFrame) -> str:
    score = "" if manifest.latency_only else " Score: mean over the samples, 100 is best."
    return f"{_MEANING}{score} {_SPEEDUPS if (summary['method'] == BASELINE).any() else _NO_SPEEDUPS}"


def _all_tasks(summary: pd.DataFrame, measures: list[_Column]) -> Iterable[str]:
    whole = overall(summary)
    yield "## All tasks"
    if whole.empty:
        yield "No task has records of every method."
        return
    yield (
        "Over the tasks that every method has records of: mean score, kept share and KV, geometric mean of times and "
        "speed-ups, largest peak memory. A dash where one of the tasks has none."
    )
    yield _table(whole, [("method", "method", _text), ("tasks", "tasks", str), *measures])


def _table(rows: pd.DataFrame, columns: list[_Column]) -> str:
    names = [name for name, _, _ in columns]
    head = [heading for _, heading, _ in columns]
    rule = [":---" if write is _text else "---:" for _, _, write in columns]
    body = [
        [write(value) for value, (_, _, write) in zip(row, columns, strict=True)]
        for row in rows[names].itertuples(index=False, name=None)
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))


def _text(value: object) -> str:
    return "`" + str(value).replace("|", "\\|") + "`"


def _join(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) + "\n"
