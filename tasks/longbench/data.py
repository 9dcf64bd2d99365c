"""LongBench's records: from the official JSONL files or from the hub's mirror, checked while they are read.

Records are streamed: a run limited to ten samples reads ten lines. Whatever is read is checked, because a cut-off
file or a data set whose prompts were already filled in gives scores that look plausible.
"""

from __future__ import annotations

import ast
import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from harness.errors import InputError
from tasks.common.records import Row, checked, require_datasets
from tasks.longbench.prompts import E_MEMBERS, MEMBERS, base_name, instructions, takes_input
from tasks.longbench.scores import paragraph_number

HUB = "Xnhyacinth/LongBench"
"""The hub's parquet mirror, the data set that lm-eval uses; the original needs a loading script that `datasets` 4 and
later refuse to run."""

THREE_WAYS = (
    "give the folder of LongBench's .jsonl files (an unzipped data.zip) with --data-dir or in LONGBENCH_DIR, "
    "or read the hub's mirror through `datasets` with the option source=hub"
)


def _read_classes(value: Any) -> Any:
    """Parquet mirrors hold the list of classes as its `repr`."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise ValueError("neither a list nor the text of one") from None


class Record(BaseModel):
    """One LongBench record.

    Attributes:
        id: the record's `_id`.
        input: question or last few-shot example; empty for summaries and line completion.
        context: the long text.
        answers: accepted answers, none blank.
        all_classes: class names, or None.
        length: words of context, input and first answer (characters in Chinese), or None where it is not said.
        dataset: task name, with `_e` for LongBench-E.
        language: "en", "zh" or a programming language.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    id: str = Field(alias="_id", min_length=1)
    input: str
    context: str
    answers: list[str] = Field(min_length=1)
    all_classes: Annotated[list[str] | None, BeforeValidator(_read_classes)]
    length: int | None
    dataset: str
    language: str

    @field_validator("context")
    @classmethod
    def _check_context(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty")
        return value

    @field_validator("answers")
    @classmethod
    def _check_answers(cls, value: list[str]) -> list[str]:
        if not all(answer.strip() for answer in value):
            raise ValueError("holds an empty answer")
        return value

    def context_hash(self) -> str:
        """16 hex digits that equal those of other records with the same context, whose scores are not independent."""
        return hashlib.sha256(self.context.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def words(self) -> int:
        """Words of context, input and first answer: what `length` counts, except in Chinese."""
        return sum(len(text.split()) for text in (self.context, self.input, self.answers[0]))


def find_folder(data_dir: Path | None) -> Path:
    """The folder that holds LongBench's `.jsonl` files: the one given, `LONGBENCH_DIR`, or `data` inside it.

    Raises:
        InputError: neither is given, or there is no LongBench file in it.
    """
    given = data_dir or os.environ.get("LONGBENCH_DIR")
    if not given:
        raise InputError(f"no LongBench data: {THREE_WAYS}")
    for folder in (Path(given), Path(given) / "data"):
        if any((folder / f"{name}.jsonl").is_file() for name in (*MEMBERS, *E_MEMBERS)):
            return folder
    raise InputError(f"no LongBench data in {given}: {THREE_WAYS}")


def hub_rows(name: str) -> Iterator[Row]:
    """Rows of the hub's mirror, streamed, under the official field names.

    The mirror calls `input` `question` and lacks some fields; a missing `_id` becomes the task's name and the row's
    number.

    Raises:
        InputError: `datasets` is not installed, the mirror cannot be read, or it moved the prompt's text into its
            fields.
    """
    try:
        rows = require_datasets().load_dataset(HUB, name, split="test", streaming=True)
        for number, row in enumerate(rows, 1):
            place = f"{HUB}/{name} row {number}"
            if str(row.get("answer_prefix") or "").strip():
                raise InputError(f"{place}: field 'answer_prefix' holds part of the prompt; {_REFUSAL}")
            yield place, _official_fields(row, name, number)
    except InputError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{HUB}/{name} cannot be read ({type(error).__name__}: {reason}); {THREE_WAYS}") from error


def read_records(rows: Iterable[Row], name: str) -> Iterator[Record]:
    """Checked records of one task, in order.

    Warns once where `length` is not the number of words: the text was changed, or cut.

    Args:
        rows: from `local_rows` or `hub_rows`.
        name: the task, with or without `_e`.

    Raises:
        InputError: a missing, empty or mistyped field, a repeated id, a record of another task, or a context that
            already holds the prompt's instruction. The message says file, line and field.
    """
    seen: dict[str, str] = {}
    warned = False
    for place, row in rows:
        record = _read_record(place, row, name)
        if record.id in seen:
            raise InputError(f"{place}: field '_id' repeats that of {seen[record.id]} ({record.id})")
        seen[record.id] = place
        if not warned and not _length_holds(record):
            warned = True
            warnings.warn(_length_warning(place, record), stacklevel=2)
        yield record


_REFUSAL = "such data would put the instruction into the prompt twice; use the official data.zip"


def _official_fields(row: Mapping[str, Any], name: str, number: int) -> dict[str, Any]:
    language = MEMBERS[base_name(name)].language
    known = {"_id": f"{name}-{number}", "dataset": name, "language": language, "length": None, "all_classes": None}
    renamed = {"input": row["question"]} if "question" in row else {}
    return {**known, **renamed, **row}


def _read_record(place: str, row: Mapping[str, Any], name: str) -> Record:
    record = checked(Record, place, row)
    _check_task(place, record, name)
    _check_fields(place, record, name)
    _check_instruction(place, record, name)
    return record


def _check_task(place: str, record: Record, name: str) -> None:
    if base_name(record.dataset) != base_name(name):
        raise InputError(f"{place}: field 'dataset': {record.dataset!r} in the data of {name!r}")


def _check_fields(place: str, record: Record, name: str) -> None:
    """Fields that only some tasks need."""
    member = MEMBERS[base_name(name)]
    if takes_input(name) and member.category != "code" and not record.input.strip():
        raise InputError(f"{place}: field 'input': is empty")
    if member.metric == "classification" and not record.all_classes:
        raise InputError(f"{place}: field 'all_classes': is empty")
    if name in E_MEMBERS and record.length is None:
        raise InputError(f"{place}: field 'length': LongBench-E needs it")
    if member.metric.startswith("retrieval"):
        _check_paragraphs(place, record, "段落" if member.language == "zh" else "Paragraph ")


def _check_paragraphs(place: str, record: Record, word: str) -> None:
    try:
        for answer in record.answers:
            paragraph_number(answer, word)
    except InputError as error:
        raise InputError(f"{place}: field 'answers': {error}") from None


def _check_instruction(place: str, record: Record, name: str) -> None:
    for field, text in (("context", record.context), ("input", record.input)):
        flat = " ".join(text.split())
        if any(piece in flat for piece in instructions(name)):
            raise InputError(f"{place}: field {field!r} already holds the prompt's instruction; {_REFUSAL}")


def _length_holds(record: Record) -> bool:
    """Whether `length` counts the record's words, within 0.2 % as in the official data; unknown counts as yes."""
    if record.length is None or record.language == "zh":
        return True
    return abs(record.words() - record.length) <= 0.002 * record.length


def _length_warning(place: str, record: Record) -> str:
    return (
        f"{place}: field 'length' says {record.length} words, the record has {record.words()}: "
        "this is not the official text (further records of this file are not reported)"
    )
