"""LongBench's task list, and its prompt templates byte for byte.

The templates are read from the YAML files of the installed lm-eval, which carry them with six differences of one
whitespace character each; those are put back here. A digest of every template proves that the result is the
official one, so that another lm-eval version cannot change a prompt unnoticed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import InputError, MissingPackage


class Member(NamedTuple):
    """What LongBench fixes about one of its tasks.

    Attributes:
        category: one of the paper's six kinds of task.
        metric: name of the scorer in `tasks.longbench.scores`.
        max_new_tokens: generation length.
        digest: first 16 hex digits of the SHA-256 of the official template.
        chat: the official code wraps the prompt in a chat template, where the model has one.
        language: "en" or "zh"; code tasks count as "en".
    """

    category: str
    metric: str
    max_new_tokens: int
    digest: str
    chat: bool = True
    language: str = "en"


MEMBERS: dict[str, Member] = {
    "narrativeqa": Member("single-doc-qa", "qa_f1", 128, "aada7ed24b06abac"),
    "qasper": Member("single-doc-qa", "qa_f1", 128, "0fbdd123fe7f83d6"),
    "multifieldqa_en": Member("single-doc-qa", "qa_f1", 64, "20b4666a2de8a1f7"),
    "multifieldqa_zh": Member("single-doc-qa", "qa_f1_zh", 64, "344b3a4e557cd547", language="zh"),
    "hotpotqa": Member("multi-doc-qa", "qa_f1", 32, "9ec4ae308865bd0c"),
    "2wikimqa": Member("multi-doc-qa", "qa_f1", 32, "9ec4ae308865bd0c"),
    "musique": Member("multi-doc-qa", "qa_f1", 32, "9ec4ae308865bd0c"),
    "dureader": Member("multi-doc-qa", "rouge_l_zh", 128, "ae53329f51b17908", language="zh"),
    "gov_report": Member("summarization", "rouge_l", 512, "91c25d585b189ced"),
    "qmsum": Member("summarization", "rouge_l", 512, "dca23b678fe0183b"),
    "multi_news": Member("summarization", "rouge_l", 512, "2af3f28c40b902e6"),
    "vcsum": Member("summarization", "rouge_l_zh", 512, "3e5d8241bc9b512e", language="zh"),
    "trec": Member("few-shot", "classification", 64, "0eff8bebdba99d91", chat=False),
    "triviaqa": Member("few-shot", "qa_f1", 32, "00a802e6377e72fc", chat=False),
    "samsum": Member("few-shot", "rouge_l", 128, "a68d884234907eef", chat=False),
    "lsht": Member("few-shot", "classification", 64, "f3edabdf7fae53d6", chat=False, language="zh"),
    "passage_count": Member("synthetic", "count", 32, "986550b6c61009c6"),
    "passage_retrieval_en": Member("synthetic", "retrieval", 32, "39b96b7fa52bdd2a"),
    "passage_retrieval_zh": Member("synthetic", "retrieval_zh", 32, "c1e2346e245eb365", language="zh"),
    "lcc": Member("code", "code_sim", 64, "6a1f24cf0bb83cd9", chat=False),
    "repobench-p": Member("code", "code_sim", 64, "ee9ec182ea5ffeb7", chat=False),
}
"""The 21 tasks of LongBench v1 in the official order (`pred.py`, `dataset2maxlen.json`, `eval.py`)."""

CATEGORIES: tuple[str, ...] = tuple(dict.fromkeys(member.category for member in MEMBERS.values()))
"""The paper's six categories, in its order."""

ENGLISH_16: tuple[str, ...] = tuple(name for name, member in MEMBERS.items() if member.language == "en")
"""The English and code tasks, over which most KV-cache papers report a flat mean."""

_NOT_IN_E = {"narrativeqa", "musique", "qmsum"}

E_MEMBERS: tuple[str, ...] = tuple(f"{name}_e" for name in ENGLISH_16 if name not in _NOT_IN_E)
"""The 13 data sets of LongBench-E, whose lengths are spread evenly over three buckets."""

# Which pattern of lm-eval's text becomes what. Each is a no-op on the official text.
_CORRECTIONS: dict[str, tuple[str, str]] = {
    "triviaqa": (r"\{context\}\s*\{input\}", "{context}\n\n{input}"),
    "samsum": (r"\{context\}\s*\{input\}", "{context}\n\n{input}"),
    "passage_count": (r"\s*\Z", " "),
    "passage_retrieval_en": (r"\s*\Z", " "),
    "lcc": (r"\s*\Z", "\n"),
    "repobench-p": (r"\s*\Z", "\n"),
}

_SLOT = re.compile(r"\{(context|input)\}")


def base_name(name: str) -> str:
    """The name without LongBench-E's `_e`: templates, lengths and metrics are the same for both."""
    return name.removesuffix("_e") if name in E_MEMBERS else name


@cache
def template(name: str) -> str:
    """The official template of a task, with `{context}` and `{input}` where the record goes.

    Args:
        name: a task of `MEMBERS` or `E_MEMBERS`.

    Raises:
        InputError: lm-eval is not installed, or its template is not LongBench's.
    """
    base = base_name(name)
    text = _official(base, _read_lm_eval(base))
    if hashlib.sha256(text.encode()).hexdigest()[:16] != MEMBERS[base].digest:
        raise InputError(f"the installed lm-eval's prompt of {base!r} is not LongBench's; install lm_eval==0.4.13")
    return text


def fill(text: str, context: str, question: str) -> str:
    """The template with both slots filled in a single pass: braces in the record stay as they are."""
    values = {"context": context, "input": question}
    return _SLOT.sub(lambda slot: values[slot[1]], text)


def takes_input(name: str) -> bool:
    """Whether the template of the task has a slot for the record's `input`."""
    return "{input}" in template(name)


@cache
def instructions(name: str) -> tuple[str, ...]:
    """The template's sentences long enough to be told from a record's own text, whitespace collapsed.

    The text before the context always counts; of the rest, pieces of at least 30 characters.
    """
    head, *rest = (" ".join(piece.split()) for piece in _SLOT.split(template(name))[::2])
    return tuple(piece for piece in (head, *(piece for piece in rest if len(piece) >= 30)) if piece)


def _official(base: str, text: str) -> str:
    """lm-eval's template in LongBench's notation and with LongBench's whitespace."""
    text = re.sub(r"\{\{\s*context\s*\}\}", "{context}", text)
    text = re.sub(r"\{\{\s*(question|input)\s*\}\}", "{input}", text)
    pattern, replacement = _CORRECTIONS.get(base, (r"\Z", ""))
    return re.sub(pattern, lambda _: replacement, text, count=1)


def _read_lm_eval(base: str) -> str:
    """`doc_to_text` of lm-eval's file for the task; lm-eval itself, slow to import, stays out."""
    path = _lm_eval_folder() / f"{base}.yaml"
    try:
        text = _parse_yaml(path.read_text(encoding="utf-8"))["doc_to_text"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the installed lm-eval has no readable prompt of {base!r}: {error}") from None
    return str(text)


def _lm_eval_folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage("LongBench's prompts come with lm-eval: pip install 'harness[longbench]'")
    return Path(spec.submodule_search_locations[0]) / "tasks" / "longbench"


def _parse_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads lm-eval's `!function module.name` as nothing."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    try:
        return yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from None
