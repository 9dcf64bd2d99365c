"""All conversations behind one word: `--tasks turns`, or `--tasks turns/qasper`, `--tasks turns/jsonl:file=FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from harness.errors import InputError, unknown
from harness.grammar import Item
from tasks.base import DataNote, Task, TaskContext
from tasks.turns.conversation import Conversations
from tasks.turns.facts import Facts
from tasks.turns.jsonl import OwnConversations
from tasks.turns.longbench import QUESTIONS, SharedDocuments

KINDS: dict[str, type[Conversations]] = {
    "facts": Facts,
    "jsonl": OwnConversations,
    **dict.fromkeys(QUESTIONS, SharedDocuments),
}


class Turns(Task):
    """The group; without a member it stands for the generated facts."""

    name: ClassVar[str] = "turns"
    summary: ClassVar[str] = "questions one after the other over one pruned context: generated, LongBench's, your own"
    metric = "by member"
    data: ClassVar[DataNote] = Facts.data

    class Options(Facts.Options):
        """Those of the facts."""

    @classmethod
    def expand(cls, item: Item, context: TaskContext) -> Sequence[Task]:
        """The member's tasks; one a length.

        Raises:
            InputError: an unknown member or option, or bad data.
        """
        kind = cls.of_member(item.member or Facts.member)
        if kind is OwnConversations and "file" not in item.options:
            raise InputError("turns/jsonl needs a file: turns/jsonl:file=PATH")
        owner = f"task turns/{item.member or Facts.member}"
        kind.Options.read(owner, item.options)
        return [kind(str(part), kind.Options.read(owner, part.options), context) for part in kind.by_length(item)]

    @classmethod
    def members(cls, context: TaskContext) -> list[str]:
        """Kinds of conversations."""
        return list(KINDS)

    @classmethod
    def of_member(cls, member: str) -> type[Conversations]:
        """The kind of that name.

        Raises:
            InputError: there is none.
        """
        if member not in KINDS:
            raise unknown("member of turns", member, KINDS)
        return KINDS[member]
