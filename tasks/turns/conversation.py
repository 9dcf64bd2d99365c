"""What the conversations have in common: how questions about one context become turns, or are asked apart.

A method that prunes by the question sees one at most: the first, with `--question prompt`, or none. The others find
what it has left. What asking on costs is told from what the questions are by the control `apart`, in which each of them
has a prompt, and a pruned cache, of its own. With `--question after` that cache is the same for all: prefilled from the
same tokens, it is what a conversation would find that went back to its context before every question.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import ClassVar

from pydantic import Field

from harness.options import OptionSet
from tasks.base import Sample, Task, Tokenizer


class Conversations(Task):
    """Questions that share a context; the limit of a run counts contexts.

    Attributes:
        member: its name within the group.
    """

    member: ClassVar[str]

    class Options(OptionSet):
        """How questions are asked."""

        apart: bool = Field(False, description="control: every question of a context that is read, and pruned, anew")

    options: Options

    @abstractmethod
    def contexts(self, tokenizer: Tokenizer) -> Iterator[Sequence[Sample]]:
        """The questions about each context, in their order: whole prompts, alike but for what their `question` says.

        Raises:
            InputError: bad data, with file, line and field.
        """

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        """One for each context, or, asked apart, for each question."""
        for asked in islice(self.contexts(tokenizer), self.context.limit):
            yield from self._apart(asked) if self.options.apart else [conversation(asked)]

    def _apart(self, asked: Sequence[Sample]) -> Iterator[Sample]:
        for number, sample in enumerate(asked, 1):
            yield replace(sample, extra={**sample.extra, "turn": number, "turns": len(asked), "apart": True})


def conversation(asked: Sequence[Sample]) -> Sample:
    """The first question with its context, and the others behind it."""
    first, *later = asked
    return replace(first, follow_ups=tuple(replace(sample, prompt=sample.question) for sample in later))


def turn_id(context: str, number: int) -> str:
    """Of a question, `number` from 1: `ctx/turn-2`."""
    return f"{context}/turn-{number}"


def context_hash(text: str) -> str:
    """16 hex digits that questions about one context share: their answers are not independent."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
