"""Scores of the means that papers name (`tasks.common.means`), for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import pandas as pd

from tasks.common.means import FoundMean, found_means

COLUMNS = ["mean", "method", "tasks", "score"]


@dataclass(frozen=True)
class MeanScores:
    """One named mean.

    Attributes:
        name: as papers call it, or with "only n of m tasks".
        tasks: labels that it is over.
        flat: whether it weighs these tasks the same.
        scores: method -> mean score in percent; methods that lack one of the tasks are left out.
    """

    name: str
    tasks: tuple[str, ...]
    flat: bool
    scores: Mapping[str, float]


def mean_scores(summary: pd.DataFrame) -> list[MeanScores]:
    """Every named mean that the scored tasks of a run make up.

    Args:
        summary: `harness.report.summary.summarise` of its records.
    """
    scored = summary[summary["score"].notna()]
    tasks = [str(task) for task in dict.fromkeys(scored["task"])]
    by_method = {
        str(method): {str(task): float(score) for task, score in zip(rows["task"], rows["score"], strict=True)}
        for method, rows in scored.groupby("method", sort=False)
    }
    return [_mean(found, by_method) for found in found_means(tasks)]


def as_table(means: Sequence[MeanScores]) -> pd.DataFrame:
    """One row a mean and method, of `COLUMNS`: `tasks` is how many it is over, `score` is in percent."""
    rows = [(one.name, method, len(one.tasks), score) for one in means for method, score in one.scores.items()]
    return pd.DataFrame(rows, columns=COLUMNS)


def _mean(found: FoundMean, by_method: Mapping[str, Mapping[str, float]]) -> MeanScores:
    tasks = tuple(chain.from_iterable(found.groups))
    holders = {method: scores for method, scores in by_method.items() if set(tasks) <= scores.keys()}
    values = {method: _of(found.groups, scores) for method, scores in holders.items()}
    return MeanScores(found.name, tasks, len(found.groups) == 1, values)


def _of(groups: Sequence[Sequence[str]], scores: Mapping[str, float]) -> float:
    means = [sum(scores[task] for task in group) / len(group) for group in groups]
    return sum(means) / len(means)
