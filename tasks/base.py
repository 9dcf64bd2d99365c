"""What a task is: samples to ask, and a score for each answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from harness.errors import InputError
from harness.grammar import Item
from harness.options import OptionSet


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that tasks and prompts use."""

    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Token ids of a text, by default with the special tokens that the model expects around it."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str:
        """Text of token ids."""


@dataclass(frozen=True)
class TaskContext:
    """What a run tells its tasks.

    Attributes:
        data_dir: folder of data sets the user named, or None.
        limit: most samples a task may yield, or None for all.
        max_length: most prompt tokens; longer prompts are cut in the middle. None: the model's window decides.
        seed: of everything generated.
    """

    data_dir: Path | None = None
    limit: int | None = None
    max_length: int | None = None
    seed: int = 0


class LogLikelihood(NamedTuple):
    """How likely a model finds a continuation.

    Attributes:
        total: sum of the natural logarithms of its tokens' probabilities.
        greedy: whether greedy decoding would have written it.
    """

    total: float
    greedy: bool


@dataclass(frozen=True)
class Sample:
    """One question with its known answers.

    Attributes:
        id: stable and unique within the task.
        prompt: the whole text, before any chat template.
        answers: accepted answers; the score is the best over them.
        max_new_tokens: where generation stops at the latest.
        chat: wrap the prompt in the model's chat template, if it has one.
        prefix: the first words of the answer, behind the template, which the model goes on from; never cut.
        stop: texts that end generation once the answer holds one; the answer keeps it.
        stop_tokens: texts whose last token ends generation as an end-of-sequence token does; where the same characters
            come in another token, it goes on.
        min_new_tokens: end tokens are suppressed before this many tokens are out.
        question: the ending of `prompt` that holds the question; "" where context and question cannot be told apart.
        ids: the prompt's token ids, where they count and not the text; `prompt` is not looked at then.
        ignore_end: always generate `max_new_tokens`, end tokens or not.
        choices: continuations of the prompt to be rated by their log-likelihood; nothing is generated then.
        choice_prompts: one prompt a choice, where they differ; `prompt` is not looked at then.
        follow_ups: further questions, asked one after the other over what this prompt has left in the cache. Their
            `prompt` is what the user says next; without a chat template it comes right behind the answer.
        extra: whatever the scorer or a report needs (`all_classes`, `length`, `depth`, `needle`, ...); JSON values.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    chat: bool = False
    prefix: str = ""
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    min_new_tokens: int = 0
    question: str = ""
    ids: tuple[int, ...] = ()
    ignore_end: bool = False
    choices: tuple[str, ...] = ()
    choice_prompts: tuple[str, ...] = ()
    follow_ups: tuple[Sample, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


class DataNote(NamedTuple):
    """What one has to know of a task's data, for `harness tasks`.

    Attributes:
        source: where it comes from: generated, a package, a folder of the user's, the hub.
        languages: of the texts.
        licence: of the data; the user answers for keeping to it.
    """

    source: str = "generated, offline"
    languages: str = "English"
    licence: str = "not said"


class Task:
    """Base of all tasks. One instance is one column of the results table.

    A subclass names itself (`name`), says what it is in one line (`summary`), lists its `Options`, and implements
    `samples` and `score`. A group (`longbench`) overrides `expand` to answer with one instance per member.

    Attributes:
        label: the column's name, in the command line's grammar.
        options: validated options.
        context: what the run says to all tasks.
        metric: name of the score ("exact match", "qa_f1"), shown in reports.
        data: what `harness tasks` says of the data.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    data: ClassVar[DataNote] = DataNote()
    metric: str = "score"

    class Options(OptionSet):
        """No options."""

    def __init__(self, label: str, options: OptionSet, context: TaskContext) -> None:
        self.label, self.options, self.context = label, options, context

    @classmethod
    def expand(cls, item: Item, context: TaskContext) -> Sequence[Task]:
        """The tasks that `item` stands for; one a length, since means and ratios over different lengths say little.

        Raises:
            InputError: an unknown member or option, or data that is not there. Called before any model loads.
        """
        if item.member is not None:
            raise InputError(f"task {cls.name!r} has no members, so {str(item)!r} means nothing")
        parts = cls.by_length(item)
        return [cls(str(part), cls.Options.read(f"task {cls.name}", part.options), context) for part in parts]

    @classmethod
    def by_length(cls, item: Item) -> list[Item]:
        """The item once for each of its `lengths`, where it has that option."""
        lengths = getattr(cls.Options.read(f"task {item.name}", item.options), "lengths", ())
        if len(lengths) < 2:
            return [item]
        return [item._replace(options=item.options | {"lengths": str(length)}) for length in lengths]

    @classmethod
    def members(cls, context: TaskContext) -> list[str]:
        """Names a slash may go to, for `harness tasks`; empty where the task is no group."""
        return []

    @classmethod
    def of_member(cls, member: str) -> type[Task]:
        """The class whose summary and options a member of this group has, for `harness tasks GROUP/MEMBER`.

        Raises:
            InputError: the group has no such member, where that can be told without data.
        """
        return cls

    @classmethod
    def score_predictions(cls, path: Path, item: Item) -> dict[str, float]:
        """Scores of published prediction files, as the benchmark's own script prints them: name -> 0 to 100.

        Args:
            path: file or folder.
            item: the task, its member and options.

        Raises:
            InputError: the task has no layout of such files, or they are bad; file, line and field are named.
        """
        raise InputError(f"task {cls.name!r} has no published layout of prediction files")

    def longest_prompt(self) -> int | None:
        """Most prompt tokens this task will ask for, where it decides that itself; checked against the model early."""
        return None

    def count(self) -> int | None:
        """How many samples there are without a limit, where no prompt need be made to say so; else None."""
        return None

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        """The samples in a fixed order, at most `context.limit`.

        Raises:
            InputError: bad data, with file, line and field.
        """
        raise NotImplementedError

    def score(self, sample: Sample, prediction: str) -> float | None:
        """Score of one answer, from 0 (wrong) to 1 (right); None where there is nothing to score."""
        raise NotImplementedError

    def score_choices(self, sample: Sample, found: Sequence[LogLikelihood]) -> float | None:
        """Score of a sample with choices, one log-likelihood each: 1 if the likeliest is an accepted answer."""
        best = max(range(len(found)), key=lambda index: found[index].total)
        return float(sample.choices[best] in sample.answers)

    def fingerprint(self) -> str:
        """What shapes the samples besides options, seed and the class's own file: data, shared code; "" for nothing."""
        return ""
