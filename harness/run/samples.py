"""A task's samples as the model sees them."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from harness.engine.request import Request
from harness.errors import InputError
from harness.models.load import LoadedModel
from harness.run.loglikelihood import encode_pair
from harness.run.prompts import encode_with_question, longest_bare_prompt
from harness.run.spec import RunSpec
from tasks.base import Sample, Task


@dataclass(frozen=True)
class Prompt:
    """A sample as the model sees it.

    Attributes:
        sample: the sample.
        request: its token ids, in host memory, and how generation ends.
        hash: see `hash_of`.
        cut: tokens that were cut out of its middle.
    """

    sample: Sample
    request: Request
    hash: str
    cut: int = 0

    def on(self, device: torch.device) -> Prompt:
        """The same with its token ids on a device."""
        return replace(self, request=replace(self.request, prompt=self.request.prompt.to(device)))


def hash_of(ids: Sequence[int]) -> str:
    """Sha256 (hex) of a prompt's token ids."""
    return hashlib.sha256(str(list(ids)).encode()).hexdigest()


def read_prompts(task: Task, model: LoadedModel, spec: RunSpec) -> list[Prompt]:
    """All prompts of a task, read and checked before its first request.

    Raises:
        InputError: bad data, two samples with one id, or a prompt beyond the model's context.
    """
    prompts = [_prompt(sample, task, model, spec) for sample in task.samples(model.tokenizer)]
    for name, count in Counter(prompt.sample.id for prompt in prompts).items():
        if count > 1:
            raise InputError(f"{task.label}: two samples have the id {name!r}")
    return prompts


def _prompt(sample: Sample, task: Task, model: LoadedModel, spec: RunSpec) -> Prompt:
    where, window = f"{task.label}, sample {sample.id}", model.shape.max_context
    ids, question, cut = _encode(sample, task, model)
    after = spec.question == "after"
    if after and not 0 < question < len(ids):
        raise InputError(f"{where}: --question after needs a context and a question")
    if len(ids) + sample.max_new_tokens > window:
        tokens = f"{len(ids)} prompt tokens and {sample.max_new_tokens} new ones"
        raise InputError(f"{where}: {tokens} exceed {model.shape.context_words}; set --max-length")
    request = Request(
        torch.tensor(ids),
        sample.max_new_tokens,
        _stop_ids(sample, model),
        sample.min_new_tokens,
        question,
        after,
    )
    return Prompt(sample, request, hash_of(ids), cut)


def _encode(sample: Sample, task: Task, model: LoadedModel) -> tuple[list[int], int, int]:
    """Token ids of the prompt, how many of the last ones are its question, and how many were cut out."""
    window, longest = model.shape.max_context, task.context.max_length
    if sample.choices:
        first = replace(sample, prompt=sample.choice_prompts[0]) if sample.choice_prompts else sample
        ids = encode_pair(first, sample.choices[0], model.tokenizer, longest, window)[0]
        return ids, 0, len(encode_pair(first, sample.choices[0], model.tokenizer, None, sys.maxsize)[0]) - len(ids)
    longest = longest or longest_bare_prompt(sample, model.tokenizer, window - sample.max_new_tokens)
    ids, question = encode_with_question(sample, model.tokenizer, longest)
    whole = len(ids) if longest is None else len(encode_with_question(sample, model.tokenizer)[0])
    return ids, question, max(0, whole - len(ids))


def _stop_ids(sample: Sample, model: LoadedModel) -> frozenset[int]:
    if sample.ignore_end:
        return frozenset()
    return model.eos_ids | {model.tokenizer.encode(text, add_special_tokens=False)[-1] for text in sample.stop}
