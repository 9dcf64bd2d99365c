"""The tables of a report: accuracy, latency by length, memory, requested against achieved, roofline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from harness.report import formats
from harness.report.arrivals import arrivals
from harness.report.crossover import crossovers
from harness.report.density import mean_density
from harness.report.effects import ratio, verdict
from harness.report.energy import energy
from harness.report.goodput import goodput
from harness.report.means import MeanScores
from harness.report.recorded import Recorded, family
from harness.report.slo import Limit
from harness.report.summary import BASELINE, overall
from harness.report.table import Cell, Table, label, number
from harness.report.tails import tails
from harness.report.turns import turns
from harness.statistics.paired import ALL, leaders

_LEADS = "Bold: the best and all that the paired tests do not tell from it; nothing where they tell no two apart."
_LEDGER = ("weights", "activation_peak", "kv_after_prefill", "kv_steady", "kv_host", "extra", "total_steady")
_COLUMNS = ("peak_memory_bytes", "kv_bytes", "kv_bytes_host", "extra_bytes")


def tables(run: Recorded, slo: Sequence[Limit] = ()) -> list[Table]:
    """All tables that the run has numbers for, the one to decide by first; goodput where there are limits."""
    found = [decision(run)]
    found += [accuracy(run)] if run.scored else []
    found += [turns(run), latency(run), crossovers(run), tails(run.summary)]
    found += [energy(run.summary, run.comparison, run.records)]
    found += [memory(run), achieved(run), roofline(run)]
    found += [arrivals(run.records, run.methods), *([goodput(run, slo)] if slo else [])]
    return [table for table in found if table.rows]


def decision(run: Recorded) -> Table:
    """One row a method over all tasks: what it costs in accuracy and gives in time and memory, and how sure that is."""
    score_head = ["score %", "against full, points", "accuracy"] if run.scored else []
    energy_head = ["energy", "less energy"] if run.counted else []
    head = ["method", *score_head, "TTFT", "sooner", "TTFT verdict", "TPOT", "faster a token"]
    head += [*energy_head, "peak memory", "kept"]
    rows = [_decision_row(run, row) for row in run.whole.to_dict("records") if row["method"] in run.methods]
    note = (
        f"Over the tasks that all methods have. Differences and ratios are paired by sample against {BASELINE}, with "
        f"95 % intervals; above 1x is better. {_LEADS} Undecided does not mean equal."
    )
    return Table("decision", "Methods at a glance", note, head, rows)


def _decision_row(run: Recorded, row: dict[Any, Any]) -> list[Cell]:
    method = str(row["method"])
    effect = run.effects.get((ALL, method), {})
    cells = [label(method), *(_score_cells(run, row, effect) if run.scored else [])]
    first = (ALL, method) in run.comparison.leaders["ttft"]
    cells += [number(row["ttft_s"], formats.seconds(row["ttft_s"]), leads=first), ratio(effect, "ttft", first)]
    cells += [verdict(effect, "ttft"), number(row["tpot_s"], formats.seconds(row["tpot_s"]))]
    cells += [ratio(effect, "tpot", False)]
    if run.counted:
        cells += [number(row["energy_j"], formats.joules(row["energy_j"])), ratio(effect, "energy", False)]
    peak, kept = row["peak_memory_bytes"], row["kept_fraction"]
    return [*cells, number(peak, formats.size(peak)), number(kept, formats.percent(kept))]


def _score_cells(run: Recorded, row: dict[Any, Any], effect: dict[str, Any]) -> list[Cell]:
    method, score = str(row["method"]), row["score"]
    leads = (ALL, method) in run.comparison.leaders["score"]
    ends = [effect.get(f"score_{name}") for name in ("difference", "low", "high")]
    text = formats.NOTHING if ends[0] is None else formats.points(*ends)
    return [
        number(score, formats.score(score), leads=leads),
        number(ends[0], text, ends[1], ends[2]),
        verdict(effect, "score"),
    ]


def accuracy(run: Recorded) -> Table:
    """Tasks, the means that papers name, and means over families and over all tasks, for each method."""
    rows = []
    families: dict[str, list[str]] = {}
    for task in run.tasks:
        families.setdefault(family(task), []).append(task)
    for name, tasks in families.items():
        rows += [_task_row(run, task) for task in tasks]
        rows += [_named_row(run, mean) for mean in run.means if set(mean.tasks) <= set(tasks)]
        rows += [_mean_row(run, f"mean of {name}", tasks)] if len(tasks) > 1 and len(families) > 1 else []
    if len(run.tasks) > 1:
        rows.append(_mean_row(run, "mean of all", run.tasks))
    note = (
        "Mean scores, 100 is best; a mean weighs its tasks the same (a category mean: the categories) and needs them "
        f"all. {_LEADS}"
    )
    return Table("accuracy", "Accuracy by task", note, ["task", "n", *run.methods], rows)


def _task_row(run: Recorded, task: str) -> list[Cell]:
    found = run.summary[run.summary["task"] == task].set_index("method")
    counts = [int(found["n"].get(method, 0)) for method in run.methods]
    shown = f"{max(counts)}" if len(set(counts)) == 1 else f"{min(counts)}-{max(counts)}"
    scores = {str(method): score for method, score in found["score"].items()}
    return [label(task), Cell(shown, max(counts)), *_scores(run, scores, run.comparison.leaders["score"], task)]


def _named_row(run: Recorded, mean: MeanScores) -> list[Cell]:
    """The tests weigh tasks the same, so a mean that does not is not marked."""
    best = _best(run, mean.tasks) if mean.flat else set()
    return [label(mean.name), Cell(f"{len(mean.tasks)} tasks"), *_scores(run, mean.scores, best, ALL)]


def _mean_row(run: Recorded, name: str, tasks: Sequence[str]) -> list[Cell]:
    inside = run.summary[run.summary["task"].isin(tasks)]
    whole = overall(inside[inside["method"].isin(run.methods)]).set_index("method")
    scores = {str(method): score for method, score in whole["score"].items()}
    return [label(name), Cell(f"{len(tasks)} tasks"), *_scores(run, scores, _best(run, tasks), ALL)]


def _best(run: Recorded, tasks: Sequence[str]) -> set[tuple[str, str]]:
    """What leads over these tasks, under the task `all`."""
    if len(tasks) == len(run.tasks):
        return run.comparison.leaders["score"]
    return leaders(run.contenders[run.contenders["task"].isin(tasks)], "score")


def _scores(run: Recorded, scores: Mapping[str, Any], best: set[tuple[str, str]], task: str) -> list[Cell]:
    values = [(method, scores.get(method, math.nan)) for method in run.methods]
    return [number(value, formats.score(value), leads=(task, method) in best) for method, value in values]


def latency(run: Recorded) -> Table:
    """One row a length and method: times, speed-ups and their intervals."""
    rows = []
    for length, method, row in _each(run.by_length):
        effect = run.effects_by_length.get((str(length), method), {})
        best = run.comparison_by_length.leaders
        lead = {name: (str(length), method) in best.get(name, set()) for name in ("ttft", "e2e")}
        cells = [label(method), number(length, str(length)), number(row["n"], f"{row['n']:.0f}")]
        for name in ("ttft", "tpot", "e2e"):
            seconds = row[f"{name}_s"]
            cells.append(number(seconds, formats.seconds(seconds), leads=lead.get(name, False)))
            cells.append(ratio(effect, name, lead.get(name, False)))
        rows.append(cells)
    head = ["method", "tokens", "n", "TTFT", "sooner", "TPOT", "faster a token", "E2E", "faster in all"]
    note = (
        f"Medians over the samples of a task, geometric means over the tasks of a length; ratios are the time of "
        f"{BASELINE} over the method's on the same sample with 95 % intervals. Lengths no task asked for are rounded "
        f"to a power of two. {_LEADS}"
    )
    return Table("latency", "Latency by prompt length", note, head, _in_order(run, rows))


def memory(run: Recorded) -> Table:
    """One row a length and method: the ledger where it was measured, else what every record has."""
    if run.contenders["ledger"].notna().any():
        return _ledger(run)
    rows = []
    for length, method, row in _each(run.by_length):
        sizes = [number(row[name], formats.size(row[name])) for name in _COLUMNS]
        rows.append([label(method), number(length, str(length)), *sizes])
    note = "Medians over samples. Peak: the highest during the request, weights included; KV: when the request ended."
    head = ["method", "tokens", "peak", "KV", "KV on the host", "own stores"]
    return Table("memory", "Memory", note, head, _in_order(run, rows))


def _ledger(run: Recorded) -> Table:
    known = run.contenders[run.contenders["ledger"].notna()]
    fields = pd.DataFrame(list(known["ledger"]), index=known.index).reindex(columns=[*_LEDGER, "unexplained_share"])
    table = known[["length", "method"]].join(fields.apply(pd.to_numeric, errors="coerce"))
    rows = []
    for length, method, row in _each(table.groupby(["length", "method"]).median()):
        sizes = [number(row[name], formats.size(row[name])) for name in _LEDGER]
        share = number(row["unexplained_share"], formats.percent(row["unexplained_share"]))
        rows.append([label(method), number(length, str(length)), *sizes, share])
    head = ["weights", "activations, peak", "KV after prefill", "KV at the end", "KV on the host", "own stores"]
    note = "Medians of the memory ledger, measured in a pass of its own; unexplained: share of what the request holds."
    columns = ["method", "tokens", *head, "total at the end", "unexplained"]
    return Table("memory", "Memory ledger", note, columns, _in_order(run, rows))


def achieved(run: Recorded) -> Table:
    """One row a task and method: what the options asked for, and what was done."""
    frame = run.contenders
    layers = frame["tokens_kept"].map(len) * frame["context_tokens"]
    table = frame[["method", "task", "kept_fraction", "tokens_recomputed"]].copy()
    table["asked"] = frame["tokens_requested"].map(sum) / layers
    table["avoided"] = 1 - frame["prefill_flops"] / frame["dense_flops"]
    table["density"] = frame["extra"].map(mean_density).astype(float)
    shares = {"requested": "asked", "kept": "kept_fraction", "attended": "density", "FLOPs avoided": "avoided"}
    if table["density"].isna().all():
        del shares["attended"]
    means = table.groupby(["task", "method"], sort=False).mean()
    rows = []
    for task, method, row in _each(means):
        again, sooner = row["tokens_recomputed"], run.effects.get((task, method), {})
        cells = [number(row[name], formats.percent(row[name])) for name in shares.values()]
        rows.append([label(method), label(task), *cells, number(again, f"{again:.0f}"), ratio(sooner, "ttft", False)])
    note = (
        "Shares of prompt tokens x layers whose keys and values the options ask to keep and that were there after the "
        "prefill; FLOPs of the prefill that a dense one would have needed more; what decode computed. "
        + ("Attended: share of the causal pairs that a sparse prefill took. " if "attended" in shares else "")
        + "Means over samples."
    )
    head = ["method", "task", *shares, "recomputed", "sooner"]
    return Table("achieved", "Requested against achieved", note, head, _in_order(run, rows), labels=2)


def roofline(run: Recorded) -> Table:
    """One row a length and method: floor over measured time; empty where no floors were recorded."""
    rows = []
    known = run.by_length[run.by_length["prefill_floor_s"].notna() | run.by_length["decode_floor_s"].notna()]
    for length, method, row in _each(known):
        cells = [label(method), number(length, str(length))]
        for floor, seconds, *shares in _ROOFLINE:
            cells += [number(row[name], formats.seconds(row[name])) for name in (floor, seconds)]
            cells += [number(row[share], formats.percent(row[share])) for share in shares]
        rows.append(cells)
    note = (
        "Floor: the work over what this device reached in a large matrix product or copy; 100 % is perfect. The best "
        "single product is no measure for a long prefill where a device cannot keep that rate up, so beside it stands "
        "the share of what it keeps up for a second of nothing but products. Medians."
    )
    prefill, decode = (
        ["prefill floor", "TTFT", "reached", "of lasting rate"],
        ["decode floor", "TPOT", "reached, decode"],
    )
    head = ["method", "tokens", *prefill, *decode]
    return Table("roofline", "Fractions of the roofline", note, head, _in_order(run, rows))


_ROOFLINE = (
    ("prefill_floor_s", "ttft_s", "prefill_roofline", "prefill_lasting"),
    ("decode_floor_s", "tpot_s", "decode_roofline"),
)


def _each(table: pd.DataFrame) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """Both levels of the index and the columns of each row."""
    for (first, method), row in zip(table.index, table.to_dict("records"), strict=True):
        yield first, str(method), {str(name): value for name, value in row.items()}


def _in_order(run: Recorded, rows: list[list[Cell]]) -> list[list[Cell]]:
    """By the second column (length or task, as they come), methods in the order of the run."""
    rank = {method: index for index, method in enumerate(run.methods)}
    seen: dict[Any, int] = {}
    for row in rows:
        seen.setdefault(row[1].value, len(seen))
    return sorted(rows, key=lambda row: (seen[row[1].value], rank[row[0].text]))
