"""Means that have a name outside this project: of which tasks, and weighed how.

A figure called "LongBench English-16" is comparable with a paper's only if it is over those 16 tasks. So a mean gets
its name only where all of its tasks are there; over fewer, it is called what it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import ClassVar, NamedTuple

from harness.errors import InputError
from harness.grammar import Item, parse_item
from harness.registry import Registry


class NamedMean(NamedTuple):
    """One mean of a family of tasks.

    Attributes:
        name: as papers call it.
        groups: members of the family; the mean is over the groups' means, so one group makes a flat mean.
    """

    name: str
    groups: tuple[tuple[str, ...], ...]

    @property
    def members(self) -> tuple[str, ...]:
        """All of them, in order."""
        return tuple(chain.from_iterable(self.groups))

    def of(self, scores: Mapping[str, float]) -> float | None:
        """The mean; None where a member has no score, or a group no member.

        Args:
            scores: member -> score; others are ignored.
        """
        if not all(self.groups) or any(name not in scores for name in self.members):
            return None
        means = [sum(scores[name] for name in group) / len(group) for group in self.groups]
        return sum(means) / len(means)


class Suite:
    """A family of tasks over which papers define means; a subclass has the family's name and says which means.

    It stands apart from the tasks' own code, so that another mean does not make their records those of other code.
    """

    name: ClassVar[str]

    @classmethod
    def means(cls, members: Sequence[str]) -> Sequence[NamedMean]:
        """The means worth showing where a run has these members."""
        raise NotImplementedError


SUITES: Registry[Suite] = Registry("suite", "tasks", Suite, group="harness.suites")


class FoundMean(NamedTuple):
    """A named mean of which a run has tasks.

    Attributes:
        name: the mean's name; where tasks are missing, with "n of m tasks".
        groups: the labels of the tasks that are there, as the mean weighs them.
    """

    name: str
    groups: tuple[tuple[str, ...], ...]


def found_means(tasks: Sequence[str]) -> list[FoundMean]:
    """The named means that a run can show, family by family.

    An incomplete mean is shown where it is flat and has two tasks or more. Tasks of other options are other tasks, and
    are never averaged together.

    Args:
        tasks: labels of the run's tasks.
    """
    variants: dict[tuple[str, str], dict[str, str]] = {}
    for label in tasks:
        item = _item(label)
        if item is not None and item.member is not None:
            options = str(item._replace(member=None)).partition(":")[2]
            variants.setdefault((item.name, options), {})[item.member] = label
    return [
        found
        for (family, options), labels in variants.items()
        for mean in family_means(family, tuple(labels))
        if (found := _found(mean, labels, options)) is not None
    ]


def family_means(family: str, members: Sequence[str]) -> Sequence[NamedMean]:
    """The means that a family of tasks defines, those worth showing for these members; none where it is no suite."""
    return SUITES.get(family).means(members) if family in SUITES.names() else ()


def _found(mean: NamedMean, labels: Mapping[str, str], options: str) -> FoundMean | None:
    groups = [tuple(labels[name] for name in group if name in labels) for group in mean.groups]
    present, wanted = sum(map(len, groups)), len(mean.members)
    if present < wanted and (len(groups) > 1 or present < 2):
        return None
    name = mean.name if present == wanted else f"{mean.name}, only {present} of {wanted} tasks"
    return FoundMean(f"{name} ({options})" if options else name, tuple(groups))


def _item(label: str) -> Item | None:
    """The label's parts; None for one that a record has and the grammar has not."""
    try:
        return parse_item(label)
    except InputError:
        return None
