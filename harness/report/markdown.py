"""The Markdown table of a run, for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from harness.report import formats
from harness.report.means import MeanScores, mean_scores
from harness.report.summary import BASELINE, overall
from harness.report.table import Table, to_markdown
from harness.statistics.noise import TWIN
from harness.statistics.paired import ALL, COSTS, MARGIN_POINTS, MARGIN_RATIO, costs
from harness.storage.store import Manifest

# Measures of which the table marks the best.
MARKED = ("score", "ttft", "e2e")

_Row = Mapping[str, Any]
_Column = tuple[str, bool, Callable[[_Row], str]]


@dataclass(frozen=True)
class Comparison:
    """What is known of methods against each other.

    Attributes:
        rows: `harness.statistics.paired.verdicts`, one row a task and method.
        floors: `harness.statistics.noise.noise_floor`; empty where the run has no twin of full attention.
        leaders: measure -> (task, method) of `harness.statistics.paired.leaders` that are not within noise.
    """

    rows: pd.DataFrame
    floors: pd.DataFrame
    leaders: Mapping[str, set[tuple[str, str]]]

    @cached_property
    def effects(self) -> dict[tuple[str, str], dict[str, Any]]:
        """(task, method) -> its row."""
        return {(str(row["task"]), str(row["method"])): row for row in _records(self.rows)}


_MEANING = (
    "Every method answers the same requests on the same kernels, loop and clock. "
    "TTFT: time from the prompt's token ids on the device to the first new token; TPOT: time per token after it; "
    "E2E: time to the last one. Times and bytes are medians over the n samples of a task. "
    "KV: keys and values on the device at the end; kept: share of the prompt's tokens x layers that they hold."
)
_SPEEDUPS = (
    f"Sooner (TTFT) and faster (E2E): the time of `{BASELINE}` divided by the method's time on the same sample, "
    "trimmed geometric mean over samples, with its 95 % interval."
)
_BOLD = (
    "**Bold**: the best of a task and all that the paired tests do not tell from it; where they tell no two methods "
    "apart, nothing is bold."
)
_NO_SPEEDUPS = f"No speed-ups: this run has no `{BASELINE}` to compare with."
_COMPARED = (
    "Paired by sample, with 95 % intervals. p: exact McNemar or sign-flip test, adjusted over methods x tasks (Holm; "
    "over methods in rows `all`). A verdict is *better* or *worse* at 5 % (times at 1 %) after that adjustment; *no "
    f"difference*: the whole interval is within {MARGIN_POINTS:.0f} points, or {(MARGIN_RATIO - 1) * 100:.0f} % of the "
    "time, which does not mean that there is none; *undecided*: anything else, which does not mean that there is no "
    "difference. MDE: the smallest effect that this many samples would have shown four times out of five."
)


def markdown(
    manifest: Manifest,
    summary: pd.DataFrame,
    comparison: Comparison,
    title: str = "Results",
    warnings: Sequence[str] = (),
    tables: Sequence[Table] = (),
) -> str:
    """The whole page: circumstances, one row for each task and method, one row a method over all tasks.

    Args:
        manifest: what the run is.
        summary: `harness.report.summary.summarise` of its records.
        comparison: of the same records.
        title: the heading.
        warnings: what to know before reading the table, a paragraph each.
        tables: what else there is.
    """
    parts = [f"# {title}", *_circumstances(manifest), *warnings, _explanation(manifest, summary, comparison)]
    if summary.empty:
        return _join([*parts, "No records."])
    rows, measures = _rows(summary, comparison), _measures(manifest)
    parts.append(_table(rows, [_TASK, _METHOD, ("n", True, lambda row: str(row["n"])), *measures]))
    if summary["task"].nunique() > 1:
        parts += _all_tasks(summary, comparison, measures)
        parts += [] if manifest.latency_only else _named(mean_scores(summary[summary["method"] != TWIN]))
    if not comparison.rows.empty:
        parts += _compared(manifest, comparison)
    parts += [to_markdown(table).strip() for table in tables if table.rows]
    return _join(parts)


def _circumstances(manifest: Manifest) -> Iterable[str]:
    status = formats.status(manifest)
    if status:
        yield f"> **{status}** The numbers are of what was recorded until then."
    packages = manifest.environments[-1].get("packages", {}) if manifest.environments else {}
    torch = f", torch {packages['torch']}" if packages.get("torch") else ""
    started = f", {manifest.started[:10]}" if manifest.started else ""
    yield f"Model `{manifest.model}` on {formats.device(manifest)}{torch}{started}. {formats.protocol(manifest)}"
    if manifest.latency_only:
        yield "**Random weights, latency only**: the answers mean nothing, so there are no scores."
    if len(manifest.environments) > 1:
        yield "**The machine or the software changed while this run was made**; times may not compare."


def _explanation(manifest: Manifest, summary: pd.DataFrame, comparison: Comparison) -> str:
    score = "" if manifest.latency_only else " Score: mean over the samples, 100 is best."
    bold = f" {_BOLD}" if any(comparison.leaders.values()) else ""
    return f"{_MEANING}{score} {_SPEEDUPS if (summary['method'] == BASELINE).any() else _NO_SPEEDUPS}{bold}"


def _rows(summary: pd.DataFrame, comparison: Comparison) -> list[_Row]:
    """What is known of each row of the summary, and in which measures it leads."""
    rows = _records(summary.merge(comparison.rows.drop(columns=["n", "units"]), on=["task", "method"], how="left"))
    for row in rows:
        row["leads"] = {name for name, found in comparison.leaders.items() if (row["task"], row["method"]) in found}
    return list(rows)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _all_tasks(summary: pd.DataFrame, comparison: Comparison, measures: list[_Column]) -> Iterable[str]:
    whole = overall(summary)
    yield "## All tasks"
    if whole.empty:
        yield "No task has records of every method."
        return
    yield (
        "Over the tasks that every method has records of: mean score, kept share and KV, geometric mean of times and "
        "speed-ups, largest peak memory. A dash where one of the tasks has none."
    )
    rows = _rows(whole.assign(task=ALL), comparison)
    yield _table(rows, [_METHOD, ("tasks", True, lambda row: str(row["tasks"])), *measures])


def _named(means: Sequence[MeanScores]) -> Iterable[str]:
    """The means under which papers report their scores."""
    if not means:
        return
    yield "## Means by name"
    yield (
        "Scores in percent. A flat mean weighs tasks the same, a category mean the categories; a mean has its name "
        "only where all of its tasks are there."
    )
    methods = dict.fromkeys(method for mean in means for method in mean.scores)
    columns = [(_text(method), True, _score_of(method)) for method in methods]
    head: list[_Column] = [("mean", False, lambda row: row["name"]), ("tasks", True, lambda row: str(row["n"]))]
    rows: list[_Row] = [{"name": mean.name, "n": len(mean.tasks), "scores": mean.scores} for mean in means]
    yield _table(rows, [*head, *columns])


def _score_of(method: str) -> Callable[[_Row], str]:
    return lambda row: formats.score(row["scores"].get(method))


def _compared(manifest: Manifest, comparison: Comparison) -> Iterable[str]:
    yield f"## Compared with `{BASELINE}`"
    yield _COMPARED
    if not comparison.floors.empty:
        yield _noise(_records(comparison.floors)[-1])
    several = comparison.rows["task"].nunique() > 2
    rows = comparison.rows if several else comparison.rows[comparison.rows["task"] != ALL]
    scores = [] if manifest.latency_only else _SCORE_EFFECTS
    columns = [_TASK, _METHOD, ("pairs", True, lambda row: str(row["n"])), *scores, *map(_cost_verdict, costs(rows))]
    yield _table(_records(rows), columns)


def _noise(whole: _Row) -> str:
    """In words, what two runs of the same method differ by."""
    speeds = [
        f"{formats.cost(name)} {formats.excess(whole[f'{name}_floor'])}" for name in COSTS if whole[f"{name}_floor"] > 1
    ]
    return (
        f"Noise floor, over all tasks: `{TWIN}` is `{BASELINE}` once more; {whole['score_flips']} of {whole['n']} "
        f"scores changed, and times may differ by {', '.join(speeds) or 'what so few samples do not show'}. Effects "
        "of a task below its own floor are *within noise*."
    )


def _measures(manifest: Manifest) -> list[_Column]:
    score: _Column = ("score %", True, lambda row: _bold(row, "score", formats.score(row["score"])))
    columns: list[_Column] = [
        ("TTFT", True, lambda row: formats.seconds(row["ttft_s"])),
        ("sooner", True, lambda row: _speedup(row, "ttft")),
        ("TPOT", True, lambda row: formats.seconds(row["tpot_s"])),
        ("E2E", True, lambda row: formats.seconds(row["e2e_s"])),
        ("faster", True, lambda row: _speedup(row, "e2e")),
        ("peak memory", True, lambda row: formats.size(row["peak_memory_bytes"])),
        ("KV", True, lambda row: formats.size(row["kv_bytes"])),
        ("kept", True, lambda row: formats.percent(row["kept_fraction"])),
    ]
    return columns if manifest.latency_only else [score, *columns]


def _bold(row: _Row, measure: str, text: str) -> str:
    return f"**{text}**" if measure in row["leads"] and text != formats.NOTHING else text


def _speedup(row: _Row, measure: str) -> str:
    """`**1.53x** [1.45, 1.61]`; a ratio that full attention has to itself is neither bold nor a gain."""
    text = formats.times(row[f"{measure}_speedup"])
    ends = formats.interval(row[f"{measure}_low"], row[f"{measure}_high"])
    floor, ratio = row[f"{measure}_floor"], row[f"{measure}_ratio"]
    if 1 / floor <= ratio <= floor:
        return f"{text}{ends} within noise"
    return _bold(row, measure, text) + ends


def _cost_verdict(measure: str) -> _Column:
    def write(row: _Row) -> str:
        if pd.isna(row[f"{measure}_ratio"]):
            return formats.NOTHING
        return formats.called(row[f"{measure}_verdict"], row[f"{measure}_mde"], formats.excess)

    return formats.cost(measure), False, write


def _score_verdict(row: _Row) -> str:
    if pd.isna(row["score_difference"]):
        return formats.NOTHING
    return formats.called(row["score_verdict"], row["score_mde"], formats.score)


def _table(rows: Iterable[_Row], columns: list[_Column]) -> str:
    head = [heading for heading, _, _ in columns]
    rule = ["---:" if right else ":---" for _, right, _ in columns]
    body = [[write(row) for _, _, write in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))


def _text(value: object) -> str:
    return "`" + str(value).replace("|", "\\|") + "`"


def _join(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) + "\n"


_TASK: _Column = ("task", False, lambda row: _text(row["task"]))
_METHOD: _Column = ("method", False, lambda row: _text(row["method"]))
_SCORE_EFFECTS: list[_Column] = [
    ("score, points", True, lambda row: formats.points(row["score_difference"], row["score_low"], row["score_high"])),
    ("p", True, lambda row: formats.probability(row["score_p_holm"])),
    ("accuracy", False, _score_verdict),
]
