"""InfiniteBench from a folder of its files: `--tasks infinitebench/kv_retrieval --data-dir FOLDER`.

Prompts are the completion prompts for open models (OpenBMB/InfiniteBench, `src/prompt.py`, "yarn_mistral"), token
budgets those of `src/eval_utils.py`. Left out are `longbook_sum_eng`, whose ROUGE needs another package, and
`math_calc`, whose answers have 30 000 tokens.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from harness.errors import InputError, unknown
from harness.grammar import Item, parse_item
from harness.options import OptionSet
from tasks.base import DataNote, Sample, Task, TaskContext, Tokenizer
from tasks.common.records import checked, local_rows
from tasks.infinitebench import scores


class Member(NamedTuple):
    """What InfiniteBench fixes about one of its tasks.

    Attributes:
        template: with {context} and slots that `_slots` fills.
        new_tokens: to generate at most.
        score: of (prediction, answers).
        choices: the record's options are part of the prompt.
    """

    template: str
    new_tokens: int
    score: Callable[[str, Sequence[str]], float]
    choices: bool = False


_HIDDEN = "There is an important info hidden inside a lot of irrelevant text. Find it"
_QUIZ = "I will quiz you about the important information"
_OPTIONS = "A. {a}\nB. {b}\nC. {c}\nD. {d}"

MEMBERS: dict[str, Member] = {
    "passkey": Member(
        f"{_HIDDEN} and memorize it. {_QUIZ}.\n\n{{context}}\n\n{{input}}\n\nThe pass key is", 6, scores.first_integer
    ),
    "number_string": Member(
        f"{_HIDDEN}. {_QUIZ} there.\n\n{{context}}\n\n{{input}}\n\nThe sequence of digits is", 12, scores.first_integer
    ),
    "kv_retrieval": Member(
        "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}\n\n{input}",
        50,
        scores.word,
    ),
    "longbook_choice_eng": Member(
        "Read the book and answer the question.\n\n{context}\n\n"
        f"Question: {{input}}\n{_OPTIONS}\n\nThe letter of the correct answer is",
        40,
        scores.letter,
        choices=True,
    ),
    "longbook_qa_eng": Member(
        "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\n"
        "Question: {input}\nAnswer:",
        40,
        scores.f1,
    ),
    "longbook_qa_chn": Member("阅读以下书籍然后回答问题。\n\n{context}\n\n问题：{input}\n答案：", 40, scores.f1_zh),
    "longdialogue_qa_eng": Member(
        'Below is a dialogue script where one random occurrence of a character name is replaced with "$$MASK$$", '
        "and you should try to guess who that character is.\n\n{context}\n\n"
        "The name that has been replaced with $$MASK$$ is likely",
        40,
        scores.name,
    ),
    "math_find": Member("{target}\n\n{context}\n\n{input}", 3, scores.first_number),
    "code_run": Member(
        "There is a function called {function} in the following Python code.\n\n{context}\n\n"
        "Please compute the exact value of {call}. The value of {call} is",
        5,
        scores.last_integer,
    ),
    "code_debug": Member(
        "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it "
        f"crash.\n\n{{context}}\n\nOptions:\n{_OPTIONS}\n\nThe correct option is:",
        5,
        scores.function,
        choices=True,
    ),
}


def _texts(value: Any) -> Any:
    """One answer or several, numbers among them, as texts."""
    return [
        str(one) if isinstance(one, int | float) else one for one in (value if isinstance(value, list) else [value])
    ]


class Record(BaseModel):
    """One line of a file; the answer of a choice may be followed by its letter."""

    model_config = ConfigDict(frozen=True, strict=True)

    id: int | str
    context: str = Field(min_length=1)
    input: str
    answer: Annotated[list[str], BeforeValidator(_texts), Field(min_length=1)]
    options: list[str] = []


class InfiniteBench(Task):
    """One task; the group expands to those that have a file.

    Attributes:
        member: its name.
    """

    name: ClassVar[str] = "infinitebench"
    summary: ClassVar[str] = "InfiniteBench: ten tasks on 44k to 2M tokens, prompts for open models"
    metric = "by member"
    data: ClassVar[DataNote] = DataNote("--data-dir (passkey.jsonl, ...)", "English, Chinese, Python", "Apache-2.0")

    def __init__(self, label: str, options: OptionSet, context: TaskContext) -> None:
        """One task; raises `InputError` where InfiniteBench has no such member."""
        super().__init__(label, options, context)
        self.member = parse_item(label).member or ""
        if self.member not in MEMBERS:
            raise unknown("member of infinitebench", self.member, MEMBERS)
        self._rules = MEMBERS[self.member]
        self.metric = self._rules.score.__name__

    @classmethod
    def expand(cls, item: Item, context: TaskContext) -> Sequence[Task]:
        """One task, or all that have a file; a first record is read.

        Raises:
            InputError: an unknown member, missing data, or a bad first record.
        """
        options = cls.Options.read("task infinitebench", item.options)
        names = _with_files(context.data_dir) if item.member is None else [item.member]
        tasks = [cls(str(item._replace(member=name)), options, context) for name in names]
        for task in tasks:
            next(task._samples())
        return tasks

    @classmethod
    def members(cls, context: TaskContext) -> list[str]:
        """All, whether their data is there or not."""
        return list(MEMBERS)

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        """The file's records in order.

        Raises:
            InputError: bad data, with file, line and field.
        """
        return islice(self._samples(), self.context.limit)

    def score(self, sample: Sample, prediction: str) -> float:
        """InfiniteBench's score of one answer."""
        return self._rules.score(prediction, sample.answers)

    def _samples(self) -> Iterator[Sample]:
        for place, row in local_rows(_file(self.context.data_dir, self.member)):
            yield self._sample(place, checked(Record, place, row))

    def _sample(self, place: str, record: Record) -> Sample:
        slots = _slots(place, self.member, record)
        before, _, after = self._rules.template.partition("{context}")
        question = _fill(after, slots)
        return Sample(
            id=str(record.id),
            prompt=_fill(before, slots) + record.context + question,
            answers=_lettered(place, record) if self._rules.choices else tuple(record.answer),
            max_new_tokens=self._rules.new_tokens,
            question=question,
            extra={"dataset": self.member},
        )


def _slots(place: str, member: str, record: Record) -> dict[str, str]:
    """What stands in the template beside the context."""
    slots = {"input": record.input}
    if MEMBERS[member].choices:
        if len(record.options) != 4:
            raise InputError(f"{place}: field 'options' must list four texts")
        slots |= dict(zip("abcd", record.options, strict=True))
    elif member == "code_run":
        call = _search(r"func_[0-9]+\(-?[0-9]+\)", place, record)
        slots |= {"call": call, "function": call.partition("(")[0]}
    elif member == "math_find":
        target = _search("The .+ of", place, record).lower().removesuffix(" of")
        slots["target"] = f"What is {target} in the following list?"
    return slots


def _search(pattern: str, place: str, record: Record) -> str:
    found = re.search(pattern, record.input)
    if found is None:
        raise InputError(f"{place}: field 'input' has no {pattern!r}, which the prompt repeats")
    return found[0]


def _fill(template: str, slots: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda slot: slots[slot[1]], template)


def _lettered(place: str, record: Record) -> tuple[str, str]:
    """The right option and its letter."""
    if record.answer[0] not in record.options:
        raise InputError(f"{place}: field 'answer' is none of the options")
    return record.answer[0], "ABCD"[record.options.index(record.answer[0])]


def _file(folder: Path | None, member: str) -> Path:
    if folder is None or not (path := folder / f"{member}.jsonl").is_file():
        raise InputError(f"infinitebench: name the folder that holds {member}.jsonl with --data-dir")
    return path


def _with_files(folder: Path | None) -> list[str]:
    found = [name for name in MEMBERS if folder and (folder / f"{name}.jsonl").is_file()]
    if not found:
        _file(folder, "passkey")
    if missing := [f"{name}.jsonl" for name in MEMBERS if name not in found]:
        warnings.warn(
            f"infinitebench: {len(found)} of {len(MEMBERS)} tasks; {folder} lacks {', '.join(missing)}", stacklevel=4
        )
    return found
