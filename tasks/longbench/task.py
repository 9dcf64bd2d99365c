"""LongBench v1 and LongBench-E as tasks: official prompts, lengths, decoding rules and scores."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from harness.errors import InputError, missing_together, unknown
from harness.grammar import Item, parse_item
from harness.options import OptionSet
from tasks.base import DataNote, Sample, Task, TaskContext, Tokenizer
from tasks.common.records import local_rows
from tasks.longbench.data import THREE_WAYS, Record, find_folder, hub_rows, read_records
from tasks.longbench.prompts import CATEGORIES, E_MEMBERS, ENGLISH_16, MEMBERS, base_name, fill, template
from tasks.longbench.scores import Fuzz, bucket, require, score_file, score_prediction


class LongBench(Task):
    """One LongBench task; the group expands to the 21 official ones, or to those that have a file.

    A label says everything about a task but the data's place: `longbench/trec_e:fuzz=difflib`.

    Attributes:
        member: name of the data set, with `_e` for LongBench-E.
        category: one of the paper's six.
        metric: name of the scorer.
    """

    name: ClassVar[str] = "longbench"
    summary: ClassVar[str] = "LongBench v1: 21 tasks on long texts, official prompts and scorers"
    metric = "by member"
    data: ClassVar[DataNote] = DataNote(
        "--data-dir, LONGBENCH_DIR or the hub", "English, Chinese, code", "MIT (LongBench), and its sources' own"
    )
    everything: ClassVar[tuple[str, ...]] = tuple(MEMBERS)
    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        **{kind: tuple(name for name in MEMBERS if MEMBERS[name].category == kind) for kind in CATEGORIES},
        "en": ENGLISH_16,
    }

    class Options(OptionSet):
        """Options of every LongBench task."""

        fuzz: Fuzz = Field("difflib", description="engine of code similarity; published scores use either")
        source: Literal["local", "hub"] = Field(
            "local", description="local: --data-dir or LONGBENCH_DIR; hub: the mirror, through `datasets`"
        )

    options: Options

    def __init__(self, label: str, options: OptionSet, context: TaskContext) -> None:
        """One task.

        Args:
            label: `longbench/MEMBER`, options in the grammar behind it.
            options: an `Options`.
            context: of the run.

        Raises:
            InputError: LongBench has no such member.
        """
        super().__init__(label, options, context)
        self.member = parse_item(label).member or ""
        if self.member not in (*MEMBERS, *E_MEMBERS):
            raise unknown("LongBench task", self.member, [*MEMBERS, *E_MEMBERS])
        self._rules = MEMBERS[base_name(self.member)]
        self.category, self.metric = self._rules.category, self._rules.metric

    @classmethod
    def expand(cls, item: Item, context: TaskContext) -> list[Self]:
        """The tasks of a member, a category, or everything; those without a file are left out of groups.

        Prompts, scorers and the first record are checked here, so that what is missing shows before a model loads.

        Raises:
            InputError: an unknown member or option, missing data or packages, or a bad first record.
        """
        options = cls.Options.read(f"task {cls.name}", item.options)
        names = cls._names(item.member)
        if options.source == "local":
            names = _with_files(item, names, context)
        tasks = [cls(str(Item("longbench", name, item.options)), options, context) for name in names]
        with missing_together() as noted:
            for task in tasks:
                with noted():
                    template(task.member)
                with noted():
                    require(task.metric)
        for task in tasks:
            task._check(read=options.source == "local" or task is tasks[0])
        return tasks

    @classmethod
    def members(cls, context: TaskContext) -> list[str]:
        """Groups first, then single tasks; whether the data is there does not matter."""
        return [*cls.groups, *cls._singles()]

    @classmethod
    def _singles(cls) -> tuple[str, ...]:
        return (*MEMBERS, *E_MEMBERS)

    @classmethod
    def _names(cls, member: str | None) -> tuple[str, ...]:
        if member is None:
            return cls.everything
        if member in cls.groups:
            return cls.groups[member]
        if member not in cls._singles():
            raise unknown(f"member of {cls.name}", member, [*cls.groups, *cls._singles()])
        return (member,)

    @classmethod
    def score_predictions(cls, path: Path, item: Item) -> dict[str, float]:
        """One file of one task; raises as `score_file`."""
        options = cls.Options.read(f"task {cls.name}", item.options)
        return {item.member or "": score_file(path, item.member or "", options.fuzz)}

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        """Samples in the file's order; reads no further than `context.limit`.

        Raises:
            InputError: bad data, with file, line and field.
        """
        return (self._sample(record) for record in islice(self._records(), self.context.limit))

    def score(self, sample: Sample, prediction: str) -> float:
        """Official score of one answer, 0 to 1."""
        classes = sample.extra.get("all_classes")
        return score_prediction(self.member, prediction, sample.answers, classes, self.options.fuzz)

    def _check(self, read: bool) -> None:
        if not read:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd about the data is said when the samples are read
            if next(self._records(), None) is None:
                raise InputError(f"{self.label}: the data holds no records")

    def _records(self) -> Iterator[Record]:
        if self.options.source == "hub":
            return read_records(hub_rows(self.member), self.member)
        path = find_folder(self.context.data_dir) / f"{self.member}.jsonl"
        return read_records(local_rows(path), self.member)

    def _sample(self, record: Record) -> Sample:
        # The official code ends samsum's answers at a newline: models go on inventing dialogues otherwise.
        one_line = base_name(self.member) == "samsum"
        text = template(self.member)
        return Sample(
            id=record.id,
            prompt=fill(text, record.context, record.input),
            answers=tuple(record.answers),
            max_new_tokens=self._rules.max_new_tokens,
            chat=self._rules.chat,
            stop_tokens=("\n",) if one_line else (),
            min_new_tokens=1 if one_line else 0,
            question=fill(text.partition("{context}")[2], "", record.input),
            extra=self._extra(record),
        )

    def _extra(self, record: Record) -> dict[str, Any]:
        extra: dict[str, Any] = record.model_dump(include={"all_classes", "length", "dataset", "language"})
        extra["context_hash"] = record.context_hash()
        if self.member in E_MEMBERS and record.length is not None:
            extra["bucket"] = bucket(record.length)
        return extra


class LongBenchE(LongBench):
    """LongBench-E: the same tasks on 13 data sets whose lengths are spread evenly over 0-4k, 4-8k and 8k+ words."""

    name: ClassVar[str] = "longbench-e"
    summary: ClassVar[str] = "LongBench-E: 13 LongBench tasks in three buckets of length"
    data: ClassVar[DataNote] = LongBench.data._replace(languages="English, code")
    everything: ClassVar[tuple[str, ...]] = E_MEMBERS
    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        kind: tuple(name for name in E_MEMBERS if MEMBERS[base_name(name)].category == kind) for kind in CATEGORIES
    }

    @classmethod
    def _singles(cls) -> tuple[str, ...]:
        return E_MEMBERS


def _with_files(item: Item, names: Sequence[str], context: TaskContext) -> tuple[str, ...]:
    """Those of `names` that have a file; says which have none.

    Raises:
        InputError: none has.
    """
    folder = find_folder(context.data_dir)
    found = tuple(name for name in names if (folder / f"{name}.jsonl").is_file())
    missing = ", ".join(f"{name}.jsonl" for name in names if name not in found)
    if not found:
        raise InputError(f"{item}: {folder} lacks {missing}; {THREE_WAYS}")
    if missing:
        warnings.warn(f"{item}: {len(found)} of {len(names)} tasks; {folder} lacks {missing}", stacklevel=3)
    return found
