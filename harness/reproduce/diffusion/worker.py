"""The worker behind `harness reproduce diffusion`: it rates the known answer behind every probed prompt.

Nothing is generated: the answer's tokens come in one by one behind the pruned prompt
(`harness.runner.loglikelihood`). One pass gives the log-probability of each of its tokens and whether greedy decoding
would have written them, which is its accuracy. White space ahead of the number belongs to the prompt, so that the
prefill's last row, and no decode step, predicts the number's first token. Nothing is timed: the probe only takes away.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.engine.engine import Engine
from harness.engine.method import Method
from harness.engine.request import Request
from harness.engine.step import Step
from harness.models.load import LoadedModel
from harness.reproduce.diffusion.plan import plan_of
from harness.reproduce.diffusion.probe import Places, Probe
from harness.runner.execute import Job
from harness.runner.loaded import Cell, load_run
from harness.runner.loglikelihood import encode_pair
from harness.runner.plan import CellSpec, Plan
from harness.runner.prompts import encode_with_question
from harness.runner.records import UNTIMED, identity
from harness.runner.samples import Prompt, hash_of
from harness.runner.spec import RunSpec
from harness.storage.record import Record
from tasks.base import Sample

Read = tuple[Tensor, int]
"""Logits of a prompt's last row, [vocab], and the position behind it."""


class ProbeWorker:
    """A `harness.runner.execute.Worker` that rates the known answer behind every probed prompt."""

    @staticmethod
    def plan(spec: RunSpec) -> Plan:
        """Of a probe."""
        return plan_of(spec)

    def __init__(self, plan: Plan) -> None:
        """Loads the model.

        Raises:
            InputError: it cannot be loaded.
        """
        self._run = load_run(plan)
        self._reader = PromptReader(self._run.engine)

    def facts(self) -> dict[str, Any]:
        """Of the loaded run."""
        return self._run.facts()

    def jobs(self, cells: Sequence[CellSpec], done: Set[tuple[str, str]]) -> list[Job]:
        """Sample by sample, the probes in the order of the plan, so that neighbours share a prefill."""
        bound = [self._run.bind(cell) for cell in cells]
        return [
            partial(self._rate, cell, sample)
            for sample in bound[0].task.samples(self._run.model.tokenizer)
            for cell in bound
            if (cell.hash, sample.id) not in done
        ]

    @torch.inference_mode()
    def _rate(self, cell: Cell, sample: Sample) -> Record:
        method, tokenizer = cell.method, self._run.model.tokenizer
        ids, answer = pair_of(sample, self._run.model)
        places = places_of(sample, tokenizer, len(ids))
        if isinstance(method, Probe):
            method.aim(places.rows(method.options.drop, sample.id))
        prompt = Prompt(sample, Request(torch.tensor(ids, device=self._run.device), len(answer)), hash_of(ids))
        logprobs, guessed = rate(self._run.engine, method, *self._reader.read(method, prompt.request), answer)
        values = UNTIMED | identity(cell, prompt)
        values["extra"] |= {"answer_logprobs": logprobs, "question_tokens": places.question}
        return Record(
            **values,
            new_tokens=len(answer),
            prediction=str(tokenizer.decode(guessed, skip_special_tokens=True)),
            score=float(guessed == answer),
            tokens_requested=method.tokens_requested(),
            tokens_kept=method.tokens_kept(),
            tokens_recomputed=0,
        )


class PromptReader:
    """Holds the prompt that was read last: probes that differ in `hide` alone share a prefill."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._last: tuple[Probe, Tensor, Read] | None = None
        self._holding: list[Method] = []

    def read(self, method: Method, request: Request) -> Read:
        """The prompt's last logits, [vocab], and the position behind it."""
        prompt = request.prompt
        if self._last is not None and isinstance(method, Probe):
            other, known, read = self._last
            if known.equal(prompt) and method.reads_as(other):
                method.follow(other)
                self._holding.append(method)
                return read
        self._forget()
        read = self._engine.read(method, request)
        self._last = (method, prompt, read) if isinstance(method, Probe) else None
        self._holding = [method]
        return read

    def _forget(self) -> None:
        """Lets go of the last prompt: dozens of probes that each held one would fill the device."""
        for method in self._holding:
            method.cache = []
        self._last = None


def pair_of(sample: Sample, model: LoadedModel) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the number; blank tokens between them go to the prompt."""
    prompt, answer = encode_pair(sample, sample.choices[0], model.tokenizer, None, model.shape.max_context)
    while len(answer) > 1 and not model.tokenizer.decode(answer[:1]).strip():
        prompt, answer = [*prompt, answer[0]], answer[1:]
    return prompt, answer


def places_of(sample: Sample, tokenizer: Any, length: int) -> Places:
    """Where number, sentence and question are among the prompt's `length` tokens."""
    ids, question = encode_with_question(replace(sample, choices=()), tokenizer)
    number, sentence = sample.extra["number"], sample.extra["needles"][0]
    return Places((number[0], number[1]), (sentence[0], sentence[1]), question + length - len(ids), length)


@torch.inference_mode()
def rate(
    engine: Engine, method: Method, logits: Tensor, position: int, answer: Sequence[int]
) -> tuple[list[float], list[int]]:
    """Log-probabilities of an answer's tokens behind a prompt, and what the model would have written in their place.

    Args:
        engine: on the model.
        method: holds the prompt.
        logits: [vocab], of the prompt's last row.
        position: of the answer's first token.
        answer: ids, one or more.
    """
    logprobs, guessed = [], []
    for offset, token in enumerate(answer):
        logprobs.append(float(logits.float().log_softmax(-1)[token]))
        guessed.append(int(logits.argmax()))
        if offset + 1 < len(answer):
            step = Step("decode", position + offset, 1)
            logits = engine.forward(method, torch.tensor([token], device=logits.device), step)
    return logprobs, guessed
