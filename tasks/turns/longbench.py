"""LongBench's questions about the same document, asked one after the other, with official prompts and scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from harness.errors import InputError
from harness.grammar import Item, parse_item
from harness.options import OptionSet
from tasks.base import DataNote, Sample, TaskContext, Tokenizer
from tasks.longbench.prompts import E_MEMBERS, MEMBERS, base_name
from tasks.longbench.task import LongBench
from tasks.turns.conversation import Conversations, turn_id

QUESTIONS = tuple(
    name for name in (*MEMBERS, *E_MEMBERS) if MEMBERS[base_name(name)].category in ("single-doc-qa", "multi-doc-qa")
)
"""Data sets in which several records may share a context."""


class SharedDocuments(Conversations):
    """The first question stands in the official prompt; what follows its context there is asked again in later turns.

    Attributes:
        metric: LongBench's.
    """

    summary: ClassVar[str] = "questions about the same document, one after the other; official prompts and scores"
    data: ClassVar[DataNote] = LongBench.data

    class Options(Conversations.Options):
        """Where the records are, and how many of a document are asked."""

        turns: Annotated[int, Field(ge=2)] = Field(4, description="questions about a document, at most")
        source: Literal["local", "hub"] = Field("local", description="as for `longbench`")

    options: Options

    def __init__(self, label: str, options: OptionSet, context: TaskContext) -> None:
        """As `Task`; the label's member is LongBench's.

        Raises:
            InputError: missing data or packages, or a bad first record.
        """
        super().__init__(label, options, context)
        item = Item("longbench", parse_item(label).member, {"source": self.options.source})
        (self._longbench,) = LongBench.expand(item, replace(context, limit=None))
        self.metric = self._longbench.metric

    def contexts(self, tokenizer: Tokenizer) -> Iterator[Sequence[Sample]]:
        """Documents with two questions or more, in the order of their first."""
        groups: dict[str, list[Sample]] = defaultdict(list)
        for sample in self._longbench.samples(tokenizer):
            groups[sample.extra["context_hash"]].append(sample)
        shared = [group[: self.options.turns] for group in groups.values() if len(group) > 1]
        if not shared:
            raise InputError(f"{self.label}: no two records of {self._longbench.member} share a context")
        for group in shared:
            yield [self._turn(sample, group[0].id, number) for number, sample in enumerate(group, 1)]

    def _turn(self, sample: Sample, first: str, number: int) -> Sample:
        return replace(sample, id=turn_id(first, number), extra={**sample.extra, "record": sample.id})

    def score(self, sample: Sample, prediction: str) -> float:
        """Official score of one answer, 0 to 1."""
        return self._longbench.score(sample, prediction)
