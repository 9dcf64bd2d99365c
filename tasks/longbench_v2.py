"""LongBench v2: multiple choice over long texts, with the official zero-shot prompt and answer extraction.

Source: THUDM/LongBench, `prompts/0shot.txt`, `pred.py`, `result.py`. Longer prompts than `--max-length` lose their
middle, as there. The two-step prompt with reasoning is not asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from harness.errors import InputError, unknown
from harness.grammar import Item, parse_item
from harness.options import OptionSet
from tasks.base import DataNote, Sample, Task, TaskContext, Tokenizer
from tasks.common.records import Row, checked, require_datasets, rows

HUB = "THUDM/LongBench-v2"
FILES = tuple(f"{stem}.{ending}" for stem in ("data", "longbench-v2", "longbench_v2") for ending in ("json", "jsonl"))

TEMPLATE = """\
Please read the following text and answer the question below.

<text>
$DOC$
</text>
"""
QUESTION = """\

What is the correct answer to this question: $Q$
Choices:
(A) $C_A$
(B) $C_B$
(C) $C_C$
(D) $C_D$

Format your response as follows: "The correct answer is (insert answer here)"."""

SUBSETS: dict[str, tuple[str, str]] = {
    **{level: ("difficulty", level) for level in ("easy", "hard")},
    **{size: ("length", size) for size in ("short", "medium", "long")},
}
"""Columns of the official table beside the overall score: which field has which value."""


class Record(BaseModel):
    """One question.

    Attributes:
        id: the record's `_id`.
        domain: of six.
        difficulty: for people and models of the time.
        length: of the context in words: below 32k, 32k to 128k, above.
        answer: the right choice's letter.
        context: the long text.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    id: str = Field(alias="_id", min_length=1)
    domain: str = ""
    sub_domain: str = ""
    difficulty: Literal["easy", "hard"]
    length: Literal["short", "medium", "long"]
    question: str = Field(min_length=1)
    choice_A: str
    choice_B: str
    choice_C: str
    choice_D: str
    answer: Literal["A", "B", "C", "D"]
    context: str = Field(min_length=1)

    def slots(self) -> dict[str, str]:
        """What the template's slots hold; stripped, as the official code does."""
        texts = {"DOC": self.context, "Q": self.question}
        texts |= {f"C_{letter}": getattr(self, f"choice_{letter}") for letter in "ABCD"}
        return {slot: text.strip() for slot, text in texts.items()}


class LongBenchV2(Task):
    """All questions, or those of one difficulty or length.

    Attributes:
        subset: which, or None.
    """

    name: ClassVar[str] = "longbench-v2"
    summary: ClassVar[str] = "LongBench v2: multiple choice over texts of 8k to 2M words, official prompt"
    metric = "accuracy"
    data: ClassVar[DataNote] = DataNote("--data-dir (data.json) or the hub", licence="Apache-2.0")

    class Options(OptionSet):
        """Where the records are."""

        source: Literal["local", "hub"] = Field("local", description="local: --data-dir; hub: through `datasets`")

    options: Options

    def __init__(self, label: str, options: OptionSet, context: TaskContext) -> None:
        """One task; raises `InputError` where there is no such subset."""
        super().__init__(label, options, context)
        self.subset = parse_item(label).member
        if self.subset is not None and self.subset not in SUBSETS:
            raise unknown("member of longbench-v2", self.subset, SUBSETS)

    @classmethod
    def expand(cls, item: Item, context: TaskContext) -> Sequence[Task]:
        """The one task; its first record is read.

        Raises:
            InputError: an unknown subset or option, missing data, or a bad first record.
        """
        task = cls(str(item), cls.Options.read("task longbench-v2", item.options), context)
        if next(task._records(), None) is None:
            raise InputError(f"{item}: the data holds no such records")
        return [task]

    @classmethod
    def members(cls, context: TaskContext) -> list[str]:
        """The official table's columns."""
        return list(SUBSETS)

    @classmethod
    def score_predictions(cls, path: Path, item: Item) -> dict[str, float]:
        """Accuracies of a results file, one decimal: all, and each subset that it has questions of.

        The file has the columns `answer`, `difficulty`, `length`, and `response`, or the extracted letter `pred`.
        """
        graded = [(row, _grade(place, row)) for place, row in rows(path)]
        columns = {"overall": graded} | {
            name: [(row, grade) for row, grade in graded if row.get(field) == value]
            for name, (field, value) in SUBSETS.items()
        }
        means = {name: 100 * sum(grade for _, grade in part) / len(part) for name, part in columns.items() if part}
        return {name: round(mean, 1) for name, mean in means.items()}

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        """The records in order.

        Raises:
            InputError: bad data, with file, place and field.
        """
        return (_sample(record) for record in islice(self._records(), self.context.limit))

    def score(self, sample: Sample, prediction: str) -> float:
        """1 if the extracted letter is the right one."""
        return float(extract_answer(prediction) in sample.answers)

    def _records(self) -> Iterator[Record]:
        field, value = SUBSETS.get(self.subset or "", ("", ""))
        seen: dict[str, str] = {}
        for place, row in _hub_rows() if self.options.source == "hub" else rows(_find(self.context.data_dir)):
            record = checked(Record, place, row)
            if record.id in seen:
                raise InputError(f"{place}: field '_id' repeats that of {seen[record.id]} ({record.id})")
            seen[record.id] = place
            if not field or getattr(record, field) == value:
                yield record


def extract_answer(response: str) -> str | None:
    """The letter behind "The correct answer is", in brackets or not; None where there is none."""
    text = response.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return found and found[1]


def _sample(record: Record) -> Sample:
    question = _fill(QUESTION, record)
    return Sample(
        id=record.id,
        prompt=_fill(TEMPLATE, record) + question,
        answers=(record.answer,),
        max_new_tokens=128,
        chat=True,
        question=question,
        extra={"dataset": record.domain, "difficulty": record.difficulty, "bucket": record.length},
    )


def _fill(template: str, record: Record) -> str:
    """In a single pass, so that what looks like a slot in the record stays as it is."""
    slots = record.slots()
    return re.sub(r"\$(DOC|Q|C_[A-D])\$", lambda slot: slots[slot[1]], template)


def _grade(place: str, row: Mapping[str, Any]) -> bool:
    given, answer = row.get("response", row.get("pred")), row.get("answer")
    if answer not in ("A", "B", "C", "D"):
        raise InputError(f"{place}: field 'answer' must be A, B, C or D")
    if "response" not in row and "pred" not in row or not (given is None or isinstance(given, str)):
        raise InputError(f"{place}: field 'response' or 'pred' must be a text or null")
    return bool(answer == (extract_answer(given or "") if "response" in row else given))


def _find(folder: Path | None) -> Path:
    """The folder's file of records.

    Raises:
        InputError: there is none.
    """
    found = next((path for name in FILES if folder and (path := folder / name).is_file()), None)
    if found is None:
        where = f"{folder} holds no" if folder else "no folder with"
        raise InputError(f"longbench-v2: {where} data.json; name its folder with --data-dir, or take source=hub")
    return found


def _hub_rows() -> Iterator[Row]:
    try:
        for number, row in enumerate(require_datasets().load_dataset(HUB, split="train", streaming=True), 1):
            yield f"{HUB} row {number}", row
    except InputError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{HUB} cannot be read ({type(error).__name__}: {reason})") from error
