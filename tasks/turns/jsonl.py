"""A user's own conversations: a JSONL file with a context and its questions on every line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from harness.errors import InputError
from harness.options import OptionSet
from tasks.base import DataNote, Sample, TaskContext, Tokenizer
from tasks.common.records import checked, local_rows
from tasks.jsonl import Metric, as_list, best_score, metric_of, refuse_near_misses, said
from tasks.turns.conversation import Conversations, context_hash, turn_id


class Question(BaseModel):
    """One question.

    Attributes:
        question: what the user says.
        answers: accepted answers, or one as a plain text; the best of them counts.
        metric: how an answer is scored; None for the line's, then the task's.
        max_new_tokens: where generation stops at the latest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    question: str = Field(min_length=1)
    answers: Annotated[list[Annotated[str, AfterValidator(said)]], BeforeValidator(as_list), Field(min_length=1)]
    metric: Metric | None = None
    max_new_tokens: int | None = Field(None, ge=1)


class Row(BaseModel):
    """One line; columns that are not named here go into the records' `extra`.

    Attributes:
        context: what all questions are about.
        questions: see `Question`.
        metric: of questions without one.
        id: unique; by default the number of the line.
        chat: wrap what the user says in the model's chat template.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    context: str = Field(min_length=1)
    questions: list[dict[str, Any]] = Field(min_length=1)
    metric: Metric | None = None
    id: Annotated[str, Field(min_length=1)] | None = None
    chat: bool = False


class OwnConversations(Conversations):
    """The task; its file is read and checked whole before a model loads.

    Attributes:
        metric: of all questions, or "mixed".
    """

    member: ClassVar[str] = "jsonl"
    summary: ClassVar[str] = "your own file: a JSON object with context and questions on every line"
    metric = "by question"
    data = DataNote("your file", "any", "your own")

    class Options(Conversations.Options):
        """Where the lines are and what they leave open."""

        file: Path = Field(description="JSONL file with the columns context, questions")
        metric: Metric | None = Field(None, description=f"of questions without one: {', '.join(get_args(Metric))}")
        new_tokens: int = Field(64, ge=1, description="tokens to generate at most, where a question does not say")

    options: Options

    def __init__(self, label: str, options: OptionSet, context: TaskContext) -> None:
        """Reads the file once, to check it and to know its metric.

        Raises:
            InputError: bad data, with file, line and field.
        """
        super().__init__(label, options, context)
        asked = [sample for samples in self._read() for sample in samples]
        metrics = {sample.extra["metric"] for sample in asked}
        self.metric = metrics.pop() if len(metrics) == 1 else "mixed"
        self._digest = hashlib.sha256(repr(asked).encode()).hexdigest()[:16]

    def contexts(self, tokenizer: Tokenizer) -> Iterator[Sequence[Sample]]:
        """The lines in order."""
        return self._read()

    def score(self, sample: Sample, prediction: str) -> float:
        """The question's metric: the best over its answers."""
        return best_score(sample, prediction)

    def fingerprint(self) -> str:
        """Hash of the file's content."""
        return self._digest

    def _read(self) -> Iterator[list[Sample]]:
        seen: dict[str, str] = {}
        for place, found in local_rows(self.options.file):
            refuse_near_misses(place, found, Row)
            row = checked(Row, place, found)
            name = row.id or place.rpartition(":")[2]
            if name in seen:
                raise InputError(f"{place}: field 'id' repeats that of {seen[name]} ({name})")
            seen[name] = place
            yield self._asked(place, name, row)

    def _asked(self, place: str, name: str, row: Row) -> list[Sample]:
        return [
            self._sample(f"{place}, question {number}", turn_id(name, number), row, found)
            for number, found in enumerate(row.questions, 1)
        ]

    def _sample(self, place: str, name: str, row: Row, found: dict[str, Any]) -> Sample:
        asked = checked(Question, place, found)
        metric = metric_of(place, asked.metric, row.metric, self.options.metric)
        text = f"\n\n{asked.question}"
        return Sample(
            id=name,
            prompt=row.context + text,
            answers=tuple(asked.answers),
            max_new_tokens=asked.max_new_tokens or self.options.new_tokens,
            chat=row.chat,
            question=text,
            extra={**(row.model_extra or {}), "metric": metric, "context_hash": context_hash(row.context)},
        )
