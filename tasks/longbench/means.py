"""LongBench's averages: the flat mean that most KV-cache papers report, and the category means of its own paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from tasks.common.means import NamedMean, Suite
from tasks.longbench.prompts import CATEGORIES, E_MEMBERS, ENGLISH_16, MEMBERS, base_name


def english16_mean(scores: Mapping[str, float]) -> float | None:
    """Flat mean of the 16 English and code tasks: "the LongBench average" of most KV-cache papers.

    Args:
        scores: task name -> score; other tasks are ignored.

    Returns:
        None unless all 16 are there: a mean of fewer is another number.
    """
    return _flat("", ENGLISH_16).of(scores)


def category_means(scores: Mapping[str, float], members: Iterable[str] = MEMBERS) -> dict[str, float | None]:
    """Flat mean of each of the six categories.

    Args:
        scores: task name -> score.
        members: tasks that count: all 21, or `ENGLISH_16` for the English column.

    Returns:
        category -> mean, None where a task of it has no score.
    """
    return {kind: _flat("", names).of(scores) for kind, names in _by_category(members).items()}


def category_mean(scores: Mapping[str, float], members: Iterable[str] = MEMBERS) -> float | None:
    """Mean over the six category means, as the LongBench paper averages; None where a task is missing."""
    return _over_categories("", members).of(scores)


class LongBenchMeans(Suite):
    """LongBench's categories and totals.

    Categories are LongBench's own, of all 21 tasks, where the run has a Chinese task, and else those of the 16 English
    and code tasks; LongBench-E has its own.
    """

    name: ClassVar[str] = "longbench"

    @classmethod
    def means(cls, members: Sequence[str]) -> list[NamedMean]:
        """The means worth showing where a run has these tasks."""
        own = [name for name in members if name in MEMBERS]
        found: list[NamedMean] = []
        if any(MEMBERS[name].language == "zh" for name in own):
            found += [*_suite("LongBench", tuple(MEMBERS)), *_totals("LongBench English-16", ENGLISH_16)]
        elif own:
            found += _suite("LongBench English-16", ENGLISH_16)
        return found + (_suite("LongBench-E", E_MEMBERS) if set(members) & set(E_MEMBERS) else [])


def _suite(name: str, members: Sequence[str]) -> list[NamedMean]:
    """Each category's mean, then both means over all."""
    kinds = [_flat(f"{name} {kind} mean", names) for kind, names in _by_category(members).items()]
    return [*kinds, *_totals(name, members)]


def _totals(name: str, members: Sequence[str]) -> list[NamedMean]:
    return [_flat(f"{name} flat mean", members), _over_categories(f"{name} category mean", members)]


def _flat(name: str, members: Sequence[str]) -> NamedMean:
    return NamedMean(name, (tuple(members),))


def _over_categories(name: str, members: Iterable[str]) -> NamedMean:
    return NamedMean(name, tuple(_by_category(members).values()))


def _by_category(members: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Category -> its members; all six categories are in LongBench, in its English part and in LongBench-E."""
    counted = list(members)
    kinds = {name: MEMBERS[base_name(name)].category for name in counted}
    return {kind: tuple(name for name in counted if kinds[name] == kind) for kind in CATEGORIES}
