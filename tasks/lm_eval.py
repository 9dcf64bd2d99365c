"""Tasks of the installed lm-eval, asked by our runner: `--tasks lm_eval/NAME`.

lm-eval loads the data, writes the prompts and scores; this module turns its requests into samples and our answers into
its responses. Few-shot examples are drawn with the seed of lm-eval's own command line, so both sides ask the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from harness.errors import InputError, MissingPackage, unknown
from harness.grammar import Item
from harness.options import OptionSet
from tasks.base import DataNote, LogLikelihood, Sample, Task, TaskContext, Tokenizer

FEWSHOT_SEED = 1234
"""lm-eval's default for drawing few-shot examples."""

MAX_NEW_TOKENS = 256
"""lm-eval's default where a task sets no `max_gen_toks`."""

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the generation length in a task's `generation_kwargs`, the first one given counts."""


class LmEval(Task):
    """One task of lm-eval; groups and tags expand to their tasks.

    Attributes:
        source: lm-eval's task object.
        metric: the metric in lm-eval's notation, with the filter if it has a name ("exact_match,strict-match").
    """

    name: ClassVar[str] = "lm_eval"
    summary: ClassVar[str] = "any generation, log-likelihood or multiple-choice task of the installed lm-eval"
    metric = "lm-eval's"
    data: ClassVar[DataNote] = DataNote("lm-eval, which mostly takes the hub", "by task", "by task")

    class Options(OptionSet):
        """What lm-eval's own command line would be told."""

        shots: Annotated[int, Field(ge=0)] | None = Field(None, description="examples; as the task says by default")
        chat: bool = Field(False, description="lm-eval's --apply_chat_template")
        include: Path | None = Field(None, description="folder of further task files, as lm-eval's --include_path")
        metric: str | None = Field(None, description="the score; the first one that is a mean over samples by default")
        filter: str | None = Field(None, description="the filter of answers; the first one by default")

    options: Options

    def __init__(self, label: str, options: OptionSet, context: TaskContext, source: Any) -> None:
        """
        Args:
            label: `lm_eval/NAME`, options in the grammar behind it.
            options: an `Options`.
            context: of the run.
            source: lm-eval's task object.

        Raises:
            InputError: the task cannot be asked sample by sample, or lacks the metric or the filter.
        """
        super().__init__(label, options, context)
        self.source = source
        _check_kind(label, source)
        self._filter = _choose_filter(label, source, self.options.filter)
        self._metric = _choose_metric(label, source, self.options.metric)
        self.metric = self._metric if self._filter.name == "none" else f"{self._metric},{self._filter.name}"
        self._requests: dict[str, list[Any]] = {}

    @classmethod
    def expand(cls, item: Item, context: TaskContext) -> Sequence[Task]:
        """The tasks behind a name of lm-eval; their data is loaded here, before any model.

        Raises:
            InputError: lm-eval is missing, has no such task, or cannot load its data.
        """
        options = cls.Options.read(f"task {cls.name}", item.options)
        if item.member is None:
            raise InputError("lm_eval needs the name of a task: lm_eval/NAME ('harness lm-eval ls tasks' lists them)")
        found = _load(item.member, options.include)
        return [cls(str(Item(cls.name, name, item.options)), options, context, found[name]) for name in sorted(found)]

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        """One sample a document, in lm-eval's order.

        Raises:
            InputError: lm-eval fails, or a document asks for what the harness does not do.
        """
        self._requests = self._build(tokenizer)
        return (self._sample(name, requests) for name, requests in self._requests.items())

    def score(self, sample: Sample, prediction: str) -> float:
        """lm-eval's metric of an answer, which ends before the first of the task's stop texts."""
        (request,) = self._requests[sample.id]
        return self._score(sample, [cut_at(prediction, stop_texts(request.args[1]))])

    def score_choices(self, sample: Sample, found: Sequence[LogLikelihood]) -> float:
        """lm-eval's metric of the choices' log-likelihoods."""
        return self._score(sample, [(one.total, one.greedy) for one in found])

    def fingerprint(self) -> str:
        """Hash of lm-eval's version, and of the task's configuration."""
        facts = [version("lm_eval"), self.source.dump_config()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def _build(self, tokenizer: Tokenizer) -> dict[str, list[Any]]:
        """lm-eval's requests of every document, in order."""
        source = self.source
        if self.options.shots is not None and source.get_config("num_fewshot") != 0:
            source.set_config(key="num_fewshot", value=self.options.shots)
        source.set_config(key="num_fewshot", value=source.get_config("num_fewshot") or 0)
        source.set_fewshot_seed(seed=FEWSHOT_SEED)
        with _asking(self.label):
            source.build_all_requests(
                limit=self.context.limit,
                apply_chat_template=self.options.chat,
                fewshot_as_multiturn=self.options.chat,
                chat_template=partial(render_chat, tokenizer) if self.options.chat else None,
            )
        requests: dict[str, list[Any]] = {}
        for request in sorted(source.instances, key=lambda request: (request.doc_id, request.idx)):
            requests.setdefault(str(request.doc_id), []).append(request)
        return requests

    def _sample(self, name: str, requests: list[Any]) -> Sample:
        kinds = {request.request_type for request in requests}
        with _asking(self.label):
            answers = _targets(self.source, requests[0].doc)
        bare = Sample(name, requests[0].args[0], answers, 1, extra={"task_version": str(self.source.VERSION)})
        if kinds == {"loglikelihood"}:
            prompts = tuple(request.args[0] for request in requests)
            choices = tuple(request.args[1] for request in requests)
            return replace(bare, choices=choices, choice_prompts=prompts if len(set(prompts)) > 1 else ())
        if kinds == {"generate_until"} and len(requests) == 1:
            wanted = requests[0].args[1]
            return replace(bare, max_new_tokens=new_tokens(wanted), stop=tuple(stop_texts(wanted)))
        raise InputError(f"{self.label}, sample {name}: a document with requests of kind {', '.join(sorted(kinds))}")

    def _score(self, sample: Sample, responses: Sequence[Any]) -> float:
        requests = self._requests[sample.id]
        fresh = [
            replace(request, resps=[response] * (request.repeats or 1), filtered_resps={})
            for request, response in zip(requests, responses, strict=True)
        ]
        with _asking(self.label):
            self._filter.apply(fresh)
            filtered = [request.filtered_resps[self._filter.name] for request in fresh]
            scores = self.source.process_results(requests[0].doc, filtered)
        if self._metric not in scores:
            raise InputError(f"{self.label}: lm-eval gave no {self._metric!r} but {', '.join(scores)}")
        return float(scores[self._metric])


# --- what a request asks for ----------------------------------------------------------------------------------------


def stop_texts(wanted: Mapping[str, Any]) -> list[str]:
    """The texts that end an answer, from a task's `generation_kwargs`."""
    until = wanted.get("until") or []
    return [until] if isinstance(until, str) else [text for text in until if text]


def new_tokens(wanted: Mapping[str, Any]) -> int:
    """Tokens to generate at most; warns where the task asks for sampling: the harness decodes greedily."""
    if wanted.get("do_sample") or (wanted.get("temperature") or 0) > 0:
        warnings.warn("the lm-eval task asks for sampling; the harness decodes greedily", stacklevel=2)
    return int(next((wanted[name] for name in _LENGTHS if wanted.get(name) is not None), MAX_NEW_TOKENS))


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def render_chat(tokenizer: Any, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """A conversation in the model's chat template, as lm-eval's own models render it."""
    return str(
        tokenizer.apply_chat_template(
            history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
    )


# --- lm-eval's side -------------------------------------------------------------------------------------------------


def require_lm_eval(module: str = "lm_eval") -> Any:
    """A module of lm-eval.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(f"lm-eval is missing ({error}): pip install 'harness[longbench]'") from None


@contextlib.contextmanager
def _asking(label: str) -> Iterator[None]:
    """Silences lm-eval and turns whatever it raises into one line.

    Raises:
        InputError: lm-eval failed.
    """
    logger = logging.getLogger("lm_eval")
    level, noise = logger.level, io.StringIO()
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{label}: lm-eval fails with {type(error).__name__}: {reason}") from error
    finally:
        logger.setLevel(level)


@cache
def _manager(include: Path | None, defaults: bool) -> Any:
    tasks = require_lm_eval("lm_eval.tasks")
    with _asking("lm_eval"):
        return tasks.TaskManager(include_path=include and str(include), include_defaults=defaults)


def _load(name: str, include: Path | None) -> dict[str, Any]:
    """lm-eval's task objects of a task, group or tag."""
    if include is not None and not include.is_dir():
        raise InputError(f"option 'include' of lm_eval: {include} is no folder")
    manager = _manager_with(name, include)
    if name not in manager.task_index:
        raise unknown("lm-eval task", name, manager.task_index)
    with _asking(f"lm_eval/{name}"):
        tasks: dict[str, Any] = manager.load(name)["tasks"]
    return tasks


def _manager_with(name: str, include: Path | None) -> Any:
    """Knows the task; indexing lm-eval's own takes seconds and is skipped where the user's folder has it."""
    if include is not None:
        entry = _manager(include, False).task_index.get(name)
        if entry is not None and entry.kind.name in {"TASK", "PY_TASK"}:
            return _manager(include, False)
    return _manager(include, True)


def _check_kind(label: str, source: Any) -> None:
    if source.OUTPUT_TYPE == "loglikelihood_rolling":
        raise InputError(f"{label} measures perplexity: a text without a prompt has nothing to prune")
    if getattr(source, "UNSAFE_CODE", False):
        raise InputError(f"{label} executes what the model writes; the harness does not")
    if getattr(source, "MULTIMODAL", False):
        raise InputError(f"{label} needs images or sound; the harness reads text")


def _choose_filter(label: str, source: Any, wanted: str | None) -> Any:
    filters = {one.name: one for one in source._filters}
    if wanted is not None and wanted not in filters:
        raise unknown(f"filter of {label}", wanted, filters)
    return filters[wanted or next(iter(filters))]


def _choose_metric(label: str, source: Any, wanted: str | None) -> str:
    """The metric asked for, or the first one; only a mean over samples, of which more is better, is a number each."""
    mean = require_lm_eval("lm_eval.api.metrics").mean
    better = source.higher_is_better()
    known = [name for name, total in source.aggregation().items() if total is mean and better.get(name, True)]
    if wanted is not None and wanted not in known:
        raise unknown(f"metric of {label}", wanted, known)
    if not known:
        raise InputError(f"{label} has no metric that is a mean over samples, only {', '.join(source.aggregation())}")
    return wanted or known[0]


def _targets(source: Any, doc: Any) -> tuple[str, ...]:
    """The accepted answers as text, for the record; the score does not look at them."""
    target = source.doc_to_target(doc)
    choices = source.doc_to_choice(doc) if source.get_config("doc_to_choice") is not None else []
    targets = target if isinstance(target, list) else [target]
    return tuple(str(choices[one]) if isinstance(one, int) and one < len(choices) else str(one) for one in targets)
