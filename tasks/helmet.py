"""HELMET's recall over JSON and retrieval-augmented questions, from a folder of its data: `--tasks helmet/nq:k=105`.

Prompts, budgets and scores follow princeton-nlp/HELMET (`data.py`, `configs/recall.yaml`, `configs/rag.yaml`):
completion prompts with two worked examples. Which examples a question gets is drawn from `--seed`, not by the shuffle
of the package `datasets`. HELMET's other categories are not asked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from harness.errors import InputError, unknown
from harness.grammar import Item, parse_item
from harness.options import OptionSet
from tasks.base import DataNote, Sample, Task, TaskContext, Tokenizer
from tasks.common.records import checked, local_rows
from tasks.longbench.scores import folded

SHOTS = 2
RAG = (
    "Use the given documents to write a concise and short answer to the question. "
    "Write your answer in the following format:\nAnswer: [answer]\n\n"
)


class Member(NamedTuple):
    """Files of one data set, K standing for how many documents or pairs a question has.

    Attributes:
        test: the questions.
        demos: the worked examples; "" where the questions bring them.
        new_tokens: to generate at most.
    """

    test: str
    demos: str
    new_tokens: int


MEMBERS: dict[str, Member] = {
    "json_kv": Member("json_kv/test_kK_dep*.jsonl", "", 100),
    "nq": Member("kilt/nq-dev-*_kK_dep*.jsonl", "kilt/nq-train-*_k3_dep*.jsonl", 20),
    "triviaqa": Member("kilt/triviaqa-dev-*_kK_dep*.jsonl", "kilt/triviaqa-train-*_k3_dep*.jsonl", 20),
    "hotpotqa": Member("kilt/hotpotqa-dev-*_kK_dep*.jsonl", "kilt/hotpotqa-train-*_k3_dep*.jsonl", 20),
    "popqa": Member("kilt/popqa_test_*_kK_dep*.jsonl", "kilt/popqa_test_*_k3_dep*.jsonl", 20),
}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Texts = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]


class Pairs(BaseModel):
    """A key of a JSON object, with examples of other keys."""

    model_config = ConfigDict(frozen=True)

    context: str = Field(min_length=1)
    question: str = Field(min_length=1)
    answer: Texts
    demos: list[tuple[str, str]] = Field(min_length=SHOTS)


class Passage(BaseModel):
    """A titled document."""

    title: str
    text: str


class Asked(BaseModel):
    """A question over documents."""

    model_config = ConfigDict(frozen=True)

    question: str = Field(min_length=1)
    answers: Texts
    ctxs: list[Passage] = Field(min_length=1)

    def documents(self) -> str:
        """The documents and the question, as in prompts and examples."""
        passages = [f"Document (Title: {passage.title}): {passage.text}" for passage in self.ctxs]
        return "\n\n".join([*passages, f"Question: {self.question}"])


class Helmet(Task):
    """One data set at one size.

    Attributes:
        member: its name.
    """

    name: ClassVar[str] = "helmet"
    summary: ClassVar[str] = "HELMET's recall over JSON and retrieval-augmented questions"
    metric = "substring_exact_match"
    data: ClassVar[DataNote] = DataNote("--data-dir (HELMET's data folder)", licence="its sources' own")

    class Options(OptionSet):
        """Which file."""

        k: Annotated[int, Field(ge=1)] | None = Field(None, description="documents or pairs; by itself if one is there")

    options: Options

    def __init__(self, label: str, options: OptionSet, context: TaskContext) -> None:
        """One task; raises `InputError` where there is no such data set."""
        super().__init__(label, options, context)
        self.member = parse_item(label).member or ""
        if self.member not in MEMBERS:
            raise unknown("member of helmet", self.member, MEMBERS)

    @classmethod
    def expand(cls, item: Item, context: TaskContext) -> Sequence[Task]:
        """One data set; its first question is read.

        Raises:
            InputError: no or an unknown member, missing data, or a bad first record.
        """
        if item.member is None:
            raise InputError(f"helmet needs a data set: {', '.join(f'helmet/{name}' for name in MEMBERS)}")
        task = cls(str(item), cls.Options.read("task helmet", item.options), context)
        next(task._samples())
        return [task]

    @classmethod
    def members(cls, context: TaskContext) -> list[str]:
        """The data sets."""
        return list(MEMBERS)

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        """The file's questions in order.

        Raises:
            InputError: bad data, with file, line and field.
        """
        return islice(self._samples(), self.context.limit)

    def score(self, sample: Sample, prediction: str) -> float:
        """1 if an answer stands in the prediction; case, punctuation and articles do not count."""
        return float(any(folded(answer) in folded(prediction) for answer in sample.answers))

    def _samples(self) -> Iterator[Sample]:
        path = self._file(MEMBERS[self.member].test, self.options.k)
        make = self._pairs if self.member == "json_kv" else self._questions()
        for number, (place, row) in enumerate(local_rows(path)):
            yield make(number, place, row)

    def _pairs(self, number: int, place: str, row: Mapping[str, Any]) -> Sample:
        record = checked(Pairs, place, row)
        demos = "".join(f"Key: {key}\nCorresponding value: {value}\n\n" for key, value in record.demos[:SHOTS])
        order = "Extract the value corresponding to the specified key in the JSON object below."
        question = f"{demos}Key: {record.question}\nCorresponding value:"
        return self._sample(number, f"{record.context}\n\n{order}\n\n", question, record.answer)

    def _questions(self) -> Callable[[int, str, Mapping[str, Any]], Sample]:
        path = self._file(MEMBERS[self.member].demos, None)
        demos = [checked(Asked, place, row) for place, row in local_rows(path)]

        def make(number: int, place: str, row: Mapping[str, Any]) -> Sample:
            record = checked(Asked, place, row)
            others = list({demo.question: demo for demo in demos if demo.question != record.question}.values())
            if len(others) < SHOTS:
                raise InputError(f"{path} holds no {SHOTS} other questions to show")
            shown = random.Random(f"{self.context.seed} {record.question}").sample(others, SHOTS)
            examples = "".join(f"{demo.documents()}\nAnswer: {demo.answers[0]}\n\n" for demo in shown)
            context, mark, question = record.documents().rpartition("Question: ")
            return self._sample(number, RAG + examples + context, f"{mark}{question}\nAnswer:", record.answers)

        return make

    def _sample(self, number: int, context: str, question: str, answers: Sequence[str]) -> Sample:
        rules = MEMBERS[self.member]
        stop = () if self.member == "json_kv" else ("\n",)
        return Sample(str(number), context + question, tuple(answers), rules.new_tokens, stop=stop, question=question)

    def _file(self, pattern: str, k: int | None) -> Path:
        """The one file that fits.

        Raises:
            InputError: none does, or several do and `k` does not say which.
        """
        folder = self.context.data_dir
        found = sorted(folder.glob(pattern.replace("K", str(k or "*")))) if folder else []
        if len(found) == 1:
            return found[0]
        names = ", ".join(path.name for path in found) or "none"
        where = f"{self.label}: {pattern} in {folder or '--data-dir'} must be one file, and k= says which"
        raise InputError(f"{where}; found {names}")
