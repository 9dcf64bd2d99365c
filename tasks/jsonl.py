"""A user's own questions: a JSONL file with a prompt, its answers and a metric on every line."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from harness.errors import InputError
from harness.grammar import Item
from harness.options import OptionSet
from tasks.base import DataNote, Sample, Task, TaskContext, Tokenizer
from tasks.common.records import checked, local_rows
from tasks.longbench.scores import code_sim, qa_f1, rouge_l

Metric = Literal["exact_match", "contains", "qa_f1", "rouge_l", "code_sim"]


def exact_match(prediction: str, answer: str) -> float:
    """1 if both are the same text; white space is folded, case counts."""
    return float(_folded(prediction) == _folded(answer))


def contains(prediction: str, answer: str) -> float:
    """1 if the answer stands somewhere in the prediction; white space is folded, case counts."""
    return float(_folded(answer) in _folded(prediction))


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "qa_f1": qa_f1,
    "rouge_l": rouge_l,
    "code_sim": code_sim,
}


def _folded(text: str) -> str:
    return " ".join(text.split())


def metric_of(place: str, *given: Metric | None) -> Metric:
    """The first metric that is given.

    Raises:
        InputError: none is, with file and line.
    """
    for metric in given:
        if metric is not None:
            return metric
    raise InputError(f"{place}: field 'metric' is missing, and the option metric= is not given")


def best_score(sample: Sample, prediction: str) -> float:
    """By the metric that the sample's `extra` names, the best over its answers."""
    metric = METRICS[sample.extra["metric"]]
    return max(metric(prediction, answer) for answer in sample.answers)


def as_list(value: Any) -> Any:
    """One text as a list of it."""
    return [value] if isinstance(value, str) else value


def said(answer: str) -> str:
    """The answer; raises `ValueError` for a blank one."""
    if not answer.strip():
        raise ValueError("a blank answer would accept anything")
    return answer


class Row(BaseModel):
    """One line; columns that are not named here go into the record's `extra`.

    Attributes:
        prompt: the whole text that the model reads.
        answers: accepted answers, or one as a plain text; the best of them counts.
        metric: how an answer is scored; None for the task's option.
        id: unique; by default made of the line's number and content.
        max_new_tokens: where generation stops at the latest.
        chat: wrap the prompt in the model's chat template.
        question: the ending of `prompt` that asks, for `--question after`.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    prompt: str = Field(min_length=1)
    answers: Annotated[list[Annotated[str, AfterValidator(said)]], BeforeValidator(as_list), Field(min_length=1)]
    metric: Metric | None = None
    id: Annotated[str, Field(min_length=1)] | None = None
    max_new_tokens: int | None = Field(None, ge=1)
    chat: bool = False
    question: str = ""


class Jsonl(Task):
    """The task; its file is read and checked whole before a model loads.

    Attributes:
        metric: of all lines, or "mixed".
    """

    name: ClassVar[str] = "jsonl"
    summary: ClassVar[str] = "your own file: a JSON object with prompt, answers and metric on every line"
    metric = "by line"
    data: ClassVar[DataNote] = DataNote("your file", "any", "your own")

    class Options(OptionSet):
        """Where the lines are and what they leave open."""

        file: Path = Field(description="JSONL file with the columns prompt, answers, metric")
        metric: Metric | None = Field(None, description=f"of lines without one: {', '.join(get_args(Metric))}")
        new_tokens: int = Field(64, ge=1, description="tokens to generate at most, where a line does not say")

    options: Options

    def __init__(self, label: str, options: OptionSet, context: TaskContext) -> None:
        """Reads the file once, to check it and to know its metric.

        Raises:
            InputError: bad data, with file, line and field.
        """
        super().__init__(label, options, context)
        metrics, digest = set(), hashlib.sha256()
        for sample in self._read():
            metrics.add(sample.extra["metric"])
            digest.update(repr(sample).encode())
        self.metric = metrics.pop() if len(metrics) == 1 else "mixed"
        self._digest = digest.hexdigest()[:16]

    @classmethod
    def expand(cls, item: Item, context: TaskContext) -> Sequence[Task]:
        """The one task.

        Raises:
            InputError: no file is named, or it holds bad data.
        """
        if item.member is None and "file" not in item.options:
            raise InputError("jsonl needs a file: jsonl:file=PATH")
        return super().expand(item, context)

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        """The lines in order, at most `context.limit`."""
        return islice(self._read(), self.context.limit)

    def score(self, sample: Sample, prediction: str) -> float:
        """The line's metric: the best over its answers."""
        return best_score(sample, prediction)

    def fingerprint(self) -> str:
        """Hash of the file's content."""
        return self._digest

    def _read(self) -> Iterator[Sample]:
        seen: dict[str, str] = {}
        for place, row in local_rows(self.options.file):
            sample = self._sample(place, _read_row(place, dict(row)))
            if sample.id in seen:
                raise InputError(f"{place}: field 'id' repeats that of {seen[sample.id]} ({sample.id})")
            seen[sample.id] = place
            yield sample

    def _sample(self, place: str, row: Row) -> Sample:
        metric = metric_of(place, row.metric, self.options.metric)
        if not row.prompt.endswith(row.question):
            raise InputError(f"{place}: field 'question' must be the end of 'prompt'")
        return Sample(
            id=row.id or _default_id(place, row),
            prompt=row.prompt,
            answers=tuple(row.answers),
            max_new_tokens=row.max_new_tokens or self.options.new_tokens,
            chat=row.chat,
            question=row.question,
            extra={**(row.model_extra or {}), "metric": metric},
        )


def _default_id(place: str, row: Row) -> str:
    """The line's number and a digest, so that a changed line is asked anew."""
    digest = hashlib.sha256(row.model_dump_json().encode()).hexdigest()[:8]
    return f"{place.rpartition(':')[2]}-{digest}"


def _read_row(place: str, row: dict[str, Any]) -> Row:
    """A checked line.

    Raises:
        InputError: with file, line and field.
    """
    refuse_near_misses(place, row, Row)
    return checked(Row, place, row)


def refuse_near_misses(place: str, row: Mapping[str, Any], model: type[BaseModel]) -> None:
    """Takes a column whose name is close to one of the model's fields for a typing error.

    Raises:
        InputError: with file, line and field.
    """
    for key in row.keys() - model.model_fields.keys():
        if near := difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.8):
            raise InputError(f"{place}: field {key!r}: did you mean {near[0]!r}?")
