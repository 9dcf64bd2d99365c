"""The diffusion probe's run: every arm at every layer on every prompt, recorded answer by answer, resumed by repeating.

The answer is rated, not generated: its tokens come in one by one behind the pruned prompt
(`harness.run.loglikelihood`). One pass gives the log-probability of each of its tokens and whether greedy decoding
would have written them, which is its accuracy. White space ahead of the number belongs to the prompt, so that the
prefill's last row, and no decode step, predicts the number's first token. Nothing is timed: the probe only takes away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.engine.engine import Engine
from harness.engine.method import Method
from harness.engine.request import Request
from harness.engine.step import Step
from harness.errors import InputError, unknown
from harness.grammar import parse_item
from harness.measuring.provenance import environment, source_hash
from harness.models.load import LoadedModel, describe, load, resolve_device
from harness.reproduce.diffusion.probe import Places, Probe
from harness.reproduce.diffusion.task import DiffusionNeedle
from harness.run.catalog import MethodSpec, parse_methods
from harness.run.loglikelihood import encode_pair
from harness.run.progress import Progress
from harness.run.prompts import encode_with_question
from harness.run.spec import RunSpec, cell_hash, public_name
from harness.run.terminal import read_spec
from harness.statistics.paired import REFERENCE
from harness.storage.record import Record
from harness.storage.store import Manifest, RunStore
from tasks.base import Sample, Task, TaskContext

ARMS = {
    "needle": "drop=needle",
    "needle, hidden": "drop=needle:hide=true",
    "sentence": "drop=sentence",
    "sentence, hidden": "drop=sentence:hide=true",
    "context": "drop=context",
    "context, hidden": "drop=context:hide=true",
    "random": "drop=random",
    "question": "drop=question",
}
"""What is dropped -> options of the probe, without the layer."""

Read = tuple[Tensor, int]
"""Logits of a prompt's last row, [vocab], and the position behind it."""


@dataclass(frozen=True)
class ProbePlan:
    """A probe that has been checked as far as it can be without weights.

    Attributes:
        spec: model, device, seed and the labels of methods and tasks.
        methods: full attention, then every arm at every layer.
        tasks: one a length.
    """

    spec: RunSpec
    methods: list[MethodSpec]
    tasks: list[Task]

    def manifest(self) -> Manifest:
        """What the store keeps of it."""
        return Manifest(
            run_hash=self.spec.run_hash(),
            model=public_name(self.spec.model),
            device=resolve_device(self.spec.device).type,
            latency_only=self.spec.model.startswith("random:"),
            methods=[method.label for method in self.methods],
            tasks=[task.label for task in self.tasks],
            spec=self.spec.identity(),
        )


def plan_probe(model: str, task: str, layers: Sequence[int], arms: Sequence[str], **machine: Any) -> ProbePlan:
    """Checks a probe.

    Args:
        model: as in `harness run`.
        task: `diffusion` with options, in the command line's grammar.
        layers: first layers without the dropped rows; none means seven, evenly spread over the model's depth.
        arms: of `ARMS`.
        machine: seed, device, dtype of `RunSpec`.

    Raises:
        InputError: whatever is wrong, in one line.
    """
    shape = describe(model)
    chosen = layers or [max(1, round(shape.layers * eighth / 8)) for eighth in range(1, 8)]
    # Arms that differ in what decode sees stand side by side, so that they share a prefill.
    labels = [f"probe:{ARMS[arm]}:layer={layer}" for layer in dict.fromkeys(chosen) for arm in arms]
    methods = [*parse_methods(REFERENCE), *map(probe_spec, labels)]
    for method in methods:
        method.check(shape)
    spec = read_spec({"model": model, "tasks": task, "methods": ",".join([REFERENCE, *labels]), **machine})
    tasks = list(DiffusionNeedle.expand(parse_item(task), TaskContext(seed=spec.seed)))
    resolve_device(spec.device)
    for one in tasks:
        if (one.longest_prompt() or 0) + 16 > shape.max_context:
            raise InputError(f"--lengths: {model} has a context of {shape.max_context} tokens")
    return ProbePlan(spec, methods, tasks)


def probe_spec(label: str) -> MethodSpec:
    """The probe behind a label such as `probe:drop=needle:layer=9`."""
    return MethodSpec(label, Probe, Probe.Options.read("probe", parse_item(label).options))


def run_probe(plan: ProbePlan, folder: Path, progress: Progress) -> None:
    """Runs, or resumes, a probe.

    Raises:
        InputError: the folder is of another run, or the model cannot be loaded.
    """
    with RunStore(folder, plan.manifest(), environment()) as store:
        model = load(plan.spec.model, plan.spec.device, plan.spec.dtype)
        engine = Engine(model.model, model.shape)
        store.describe(**_facts(plan, model, engine))
        for task in plan.tasks:
            _run_task(plan, task, _Bench(model, engine), store, progress)
        store.finish()


def _run_task(plan: ProbePlan, task: Task, bench: _Bench, store: RunStore, progress: Progress) -> None:
    cells = [(spec, spec.build(bench.engine.context), _hash(plan.spec, spec, task, bench)) for spec in plan.methods]
    todo = [
        (sample, spec, method, cell)
        for sample in task.samples(bench.model.tokenizer)
        for spec, method, cell in cells
        if (cell, sample.id) not in store.done
    ]
    with progress.task(task.label, len(todo)) as advance:
        for sample, spec, method, cell in todo:
            record = _record(bench, spec, method, task, sample, cell)
            store.append(record)
            advance(record)


class _Bench:
    """Model and engine, and the prompt that was read last: probes that differ in `hide` alone share a prefill."""

    def __init__(self, model: LoadedModel, engine: Engine) -> None:
        self.model, self.engine = model, engine
        self._last: tuple[Method, list[int], Read] | None = None
        self._holding: list[Method] = []

    def read(self, method: Method, prompt: list[int], answer: list[int]) -> Read:
        """The prompt's last logits, [vocab], and the position behind it."""
        if self._last is not None:
            other, known, read = self._last
            if isinstance(method, Probe) and isinstance(other, Probe) and known == prompt and method.reads_as(other):
                method.follow(other)
                self._holding.append(method)
                return read
        self._forget()
        ids = torch.tensor(prompt, device=self.model.model.device)
        read = self.engine.read(method, Request(ids, len(answer)))
        self._last, self._holding = (method, prompt, read), [method]
        return read

    def _forget(self) -> None:
        """Lets go of the last prompt: dozens of probes that each held one would fill the device."""
        for method in self._holding:
            method.cache = []
        self._last = None


def _facts(plan: ProbePlan, model: LoadedModel, engine: Engine) -> dict[str, Any]:
    return {
        "weights_hash": model.weights_hash,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "attention": engine.context.attention.kernel,
        "context": model.shape.max_context,
        "layers": model.shape.layers,
        "method_sources": {method.label: source_hash(method.kind) for method in plan.methods},
        "task_sources": {task.label: source_hash(type(task)) for task in plan.tasks},
    }


def _hash(spec: RunSpec, method: MethodSpec, task: Task, bench: _Bench) -> str:
    dtype, kernel = str(bench.model.model.dtype), bench.engine.context.attention.kernel
    return cell_hash(spec, method, task, bench.model.weights_hash, dtype, kernel)


@torch.inference_mode()
def _record(bench: _Bench, spec: MethodSpec, method: Method, task: Task, sample: Sample, cell: str) -> Record:
    model = bench.model
    prompt, answer = pair_of(sample, model)
    places = places_of(sample, model.tokenizer, len(prompt))
    if isinstance(method, Probe):
        method.aim(places.rows(method.options.drop, sample.id))
    logprobs, guessed = rate(bench.engine, method, *bench.read(method, prompt, answer), answer)
    text = str(model.tokenizer.decode(guessed, skip_special_tokens=True))
    values: dict[str, Any] = {
        "cell": cell,
        "method": spec.label,
        "task": task.label,
        "sample": sample.id,
        "prompt_hash": hashlib.sha256(str(prompt).encode()).hexdigest(),
        "prompt_tokens": len(prompt),
        "context_tokens": len(prompt),
        "question": "prompt",
        "new_tokens": len(answer),
        "prediction": text,
        "score": float(guessed == answer),
        "metric": task.metric,
        "answers": list(sample.answers),
        "tokens_requested": method.tokens_requested(),
        "tokens_kept": method.tokens_kept(),
        "tokens_recomputed": 0,
        "extra": dict(sample.extra) | {"answer_logprobs": logprobs, "question_tokens": places.question},
    }
    return Record.model_validate(values | dict.fromkeys(_UNTIMED))


_UNTIMED = (
    "ttft_s", "tpot_s", "token_s", "e2e_s", "parts_s", "peak_memory_bytes", "kv_bytes", "kv_bytes_host", "extra_bytes",
    "ledger", "prefill_flops", "dense_flops", "decode_read_bytes", "prefill_floor_s", "decode_floor_s", "device_state",
)  # fmt: skip


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


def arms_of(text: str) -> Iterator[str]:
    """The arms of `needle/context`: without a name for hidden ones, both forms of each.

    Raises:
        InputError: an unknown arm.
    """
    for name in text.split("/"):
        found = [arm for arm in ARMS if arm.partition(",")[0] == name.strip()]
        if not found:
            raise unknown("arm", name, [arm for arm in ARMS if "," not in arm])
        yield from found
