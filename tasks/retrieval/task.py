"""All generated suites behind one word: `--tasks retrieval`, or one of them: `--tasks retrieval/multikey:keys=8`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from harness.errors import unknown
from harness.grammar import Item
from harness.options import OptionSet
from tasks.base import DataNote, Task, TaskContext
from tasks.common.haystack import SPEECHES
from tasks.retrieval.code import CodeCompletion
from tasks.retrieval.needles import MultiKey, MultiQuery, MultiValue, Tracking
from tasks.retrieval.passages import PassageCount, PassageRetrieval
from tasks.retrieval.suite import DeepSuite, Suite
from tasks.retrieval.words import CommonWords, FrequentWords

SUITES: dict[str, type[Suite]] = {
    suite.member: suite
    for suite in (
        MultiKey, MultiValue, MultiQuery, Tracking, CommonWords, FrequentWords, PassageRetrieval, PassageCount,
        CodeCompletion,
    )
}  # fmt: skip


class Retrieval(Task):
    """The group; its members are suites with options of their own."""

    name: ClassVar[str] = "retrieval"
    summary: ClassVar[str] = "nine generated suites: needles, tracking, counting, passages, code; any length, seeded"
    metric = "by member"
    data: ClassVar[DataNote] = DataNote(languages="English, Python", licence=f"{SPEECHES}; Python's library, PSF")

    class Options(DeepSuite.Options):
        """What the whole group understands; depths go to the members that have them."""

    @classmethod
    def expand(cls, item: Item, context: TaskContext) -> Sequence[Task]:
        """One suite, or all of them; one task a length.

        Raises:
            InputError: an unknown member, or an option that it, or none of the group, knows.
        """
        if item.member is not None:
            return _build(cls.of_member(item.member), item.options, context)
        options: type[OptionSet] = cls.Options
        options.read("task retrieval", item.options)
        suites = SUITES.values()
        return [task for suite in suites for task in _build(suite, _known(suite, item.options), context)]

    @classmethod
    def members(cls, context: TaskContext) -> list[str]:
        """Names of the suites."""
        return list(SUITES)

    @classmethod
    def of_member(cls, member: str) -> type[Suite]:
        """The suite of that name.

        Raises:
            InputError: there is none.
        """
        if member not in SUITES:
            raise unknown("member of retrieval", member, SUITES)
        return SUITES[member]


def _known(suite: type[Suite], options: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in options.items() if key in suite.Options.model_fields}


def _build(suite: type[Suite], options: dict[str, str], context: TaskContext) -> list[Task]:
    name = f"task retrieval/{suite.member}"
    suite.Options.read(name, options)
    parts = suite.by_length(Item("retrieval", suite.member, options))
    return [suite(str(part), suite.Options.read(name, part.options), context) for part in parts]
