"""A task's samples as the model sees them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

import torch
from pydantic import TypeAdapter, ValidationError

from harness.engine.request import Request
from harness.engine.shape import ModelShape
from harness.errors import InputError
from harness.runner.faults import blamed
from harness.runner.loglikelihood import encode_choices
from harness.runner.plan import Plan
from harness.runner.prompts import encode_further, encode_with_question, longest_bare_prompt
from harness.runner.spec import RunSpec
from harness.storage.record import WRITTEN, Facts
from tasks.base import Sample, Task

_SAMPLE = TypeAdapter(Sample)


class Reader(Protocol):
    """What of a model its prompts depend on: a `LoadedModel`, or an `Outline` of one."""

    @property
    def shape(self) -> ModelShape:
        """Its numbers."""

    @property
    def tokenizer(self) -> Any:
        """Makes ids of texts."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""


@dataclass(frozen=True)
class Turn:
    """Where in a conversation a prompt stands.

    Attributes:
        number: from 1.
        of: questions of the conversation.
        behind: tokens of the conversation ahead of the prompt, once that is known.
        context: tokens that its first prompt prefilled, once that is known.
    """

    number: int
    of: int
    behind: int = 0
    context: int | None = None


@dataclass(frozen=True)
class Prompt:
    """A sample as the model sees it.

    Attributes:
        sample: the sample.
        request: its token ids, in host memory, and how generation ends; of a later turn the ids that it adds.
        hash: see `hash_of`; of a later turn over what was asked up to here, without the answers between.
        cut: tokens that were cut out of its middle.
        turn: None where it is the only question.
        later: what is asked behind it, over the same cache.
        number: of the sample in its task, from 0.
    """

    sample: Sample
    request: Request
    hash: str
    cut: int = 0
    turn: Turn | None = None
    later: tuple[Prompt, ...] = ()
    number: int = 0

    def on(self, device: torch.device) -> Prompt:
        """The same with its token ids on a device."""
        return replace(self, request=replace(self.request, prompt=self.request.prompt.to(device)))


def hash_of(ids: Sequence[int]) -> str:
    """Sha256 (hex) of a prompt's token ids."""
    return hashlib.sha256(str(list(ids)).encode()).hexdigest()


def read_prompts(task: Task, plan: Plan, model: Reader) -> list[Prompt]:
    """The prompts of a task that this process answers, read and checked before its first request.

    Raises:
        InputError: bad data, no sample, two samples with one id, or a prompt beyond the model's context.
    """
    with blamed(task, task.label):
        samples = plan.samples_of(task, model.tokenizer)
    if not samples or not all(isinstance(sample, Sample) for sample in samples):
        raise InputError(f"{task.label}: the task has {'something else than' if samples else 'no'} samples")
    asked = [each for sample in samples for each in (sample, *sample.follow_ups)]
    for name, count in Counter(sample.id for sample in asked).items():
        if count > 1:
            raise InputError(f"{task.label}: two samples have the id {name!r}")
    wanted = None if plan.samples is None else plan.samples[task.label]
    return [
        replace(_prompt(sample, task, model, plan.spec), number=number)
        for number, sample in enumerate(samples)
        if wanted is None or any(each.id in wanted for each in _asked(sample))
    ]


def _prompt(sample: Sample, task: Task, model: Reader, spec: RunSpec) -> Prompt:
    where, after = f"{task.label}, sample {sample.id}", spec.question == "after"
    _check(sample, where)
    further = _further(sample, where, model)
    follows = sum(len(ids) + each.max_new_tokens for ids, each in zip(further, sample.follow_ups, strict=True))
    _check_room(sample, 1, follows, model, where)
    ids, question, cut = _encode(sample, task, model, follows)
    if after and not 0 < question < len(ids):
        raise InputError(f"{where}: --question after needs a context and a question")
    _check_room(sample, len(ids), follows, model, where)
    try:
        first, *later = [_request(*each, model) for each in zip(_asked(sample), (ids, *further), strict=True)]
        first = replace(first, question=question, question_after=after, follows=follows)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    each = zip(_asked(sample), (first, *later), accumulate((ids, *further)), strict=True)
    turns = [
        Prompt(one, request, hash_of(so_far), cut, Turn(number, 1 + len(later)) if later else None)
        for number, (one, request, so_far) in enumerate(each, 1)
    ]
    return replace(turns[0], later=tuple(turns[1:]))


def _check_room(sample: Sample, tokens: int, follows: int, model: Reader, where: str) -> None:
    """Raises `InputError` for a prompt of so many tokens that does not fit with its answer and what follows that."""
    if tokens + sample.max_new_tokens + follows > model.shape.max_context:
        asked = f"{tokens} prompt token{'s' * (tokens > 1)} and {sample.max_new_tokens} new ones"
        later = f", and {follows} of later turns," if follows else ""
        raise InputError(f"{where}: {asked}{later} exceed {model.shape.context_words}; set --max-length")


def _asked(sample: Sample) -> tuple[Sample, ...]:
    """All questions of a sample, its own first."""
    return sample, *sample.follow_ups


def _further(sample: Sample, where: str, model: Reader) -> list[list[int]]:
    """Token ids that each further question brings in.

    Raises:
        InputError: one is no question of a conversation.
    """
    later = sample.follow_ups
    if later and (sample.choices or any(each.choices or each.follow_ups for each in later)):
        raise InputError(f"{where}: turns of a conversation have neither choices nor turns")
    return [encode_further(each, model.tokenizer) for each in later]


def _request(sample: Sample, ids: list[int], model: Reader) -> Request:
    return Request(torch.tensor(ids), sample.max_new_tokens, _stop_ids(sample, model), sample.min_new_tokens)


def _check(sample: Sample, where: str) -> None:
    """Raises `InputError` for what no tokenizer or record takes, and for what would end every answer at once."""
    try:
        _SAMPLE.validate_python(values := asdict(sample))
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
        for each in _asked(sample):
            Facts.model_validate(each.extra)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{where}: field {str(first['loc'][0])!r}: {first['msg']}") from None
    except UnicodeEncodeError:
        raise InputError(f"{where}: holds half of a surrogate pair, which is no text") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: holds something that JSON cannot: {error}") from None
    if taken := WRITTEN & {name for each in _asked(sample) for name in each.extra}:
        raise InputError(f"{where}: a run writes {min(taken)!r} into a record's extra itself: give it another name")
    if not all(text for each in _asked(sample) for text in (*each.stop, *each.stop_tokens)):
        raise InputError(f"{where}: a stop text is empty")


def _encode(sample: Sample, task: Task, model: Reader, follows: int) -> tuple[list[int], int, int]:
    """Token ids of the prompt, how many of the last ones are its question, and how many were cut out.

    `follows` tokens have to fit behind prompt and answer.
    """
    window, longest, tokenizer = model.shape.max_context, task.context.max_length, model.tokenizer
    if sample.choices:
        ids = encode_choices(sample, tokenizer, longest, window)[0][0]
        first = replace(sample, choices=sample.choices[:1], choice_prompts=sample.choice_prompts[:1])
        return ids, 0, len(encode_choices(first, tokenizer, None, sys.maxsize)[0][0]) - len(ids)
    longest = longest or longest_bare_prompt(sample, tokenizer, window - sample.max_new_tokens - follows)
    ids, question = encode_with_question(sample, tokenizer, longest)
    whole = len(ids) if longest is None else len(encode_with_question(sample, tokenizer)[0])
    return ids, question, max(0, whole - len(ids))


def _stop_ids(sample: Sample, model: Reader) -> frozenset[int]:
    if sample.ignore_end:
        return frozenset()
    ends = {model.tokenizer.encode(text, add_special_tokens=False)[-1] for text in sample.stop_tokens}
    return model.eos_ids | ends
