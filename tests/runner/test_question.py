"""Two protocols: the question inside the pruned prompt, or behind a context that was pruned without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import harness
from harness.engine.request import Request
from harness.runner.catalog import build_tasks
from harness.runner.prompts import encode, encode_with_question
from tasks.base import Sample, TaskContext
from tests.command import run
from tests.runner.test_prompts import make as letters
from tests.test_cli import random_model
from tests.tiny import END, build, random_ids, tiny_engine

METHODS = ["full", "slim", "lazyllm", "lazyllm:revive=false", "streaming:window=32", "streaming:mode=evict:window=32",
           "ashape:sinks=4:window=32", "quest:budget=64", "recent", "truncate", "fastkv:budget=64",
           "gemfilter:budget=64", "duo:sinks=4:recent=20",
           "kvzip:budget=64", "retrieval:sinks=4:recent=16:topk=20"]  # fmt: skip


@pytest.mark.parametrize("text", METHODS)
def test_every_method_takes_a_question_behind_its_context(text: str) -> None:
    engine, ids = tiny_engine(), random_ids(200)
    method = build(text, engine)
    request = Request(ids, 6, frozenset([END]), question=17, question_after=True)
    tokens = list(engine.stream(method, request))
    assert tokens and all(0 <= token <= END for token in tokens)
    assert method.prompt_len <= 183 and request.late_tokens(method) == 17


def test_full_attention_answers_the_same_under_both() -> None:
    engine, ids = tiny_engine(), random_ids(200)
    inside = list(engine.stream(build("full", engine), Request(ids, 8)))
    assert inside == list(engine.stream(build("full", engine), Request(ids, 8, question=30, question_after=True)))


def test_quest_reads_the_question_token_by_token_if_asked() -> None:
    engine, ids = tiny_engine(), random_ids(200)
    method = build("quest:question=decode:budget=1000", engine)
    request = Request(ids, 8, question=30)
    assert request.late_tokens(method) == 30 and Request(ids, 8).late_tokens(method) == 32
    assert list(engine.stream(method, request)) == list(engine.stream(build("full", engine), request))


def test_the_question_of_a_prompt_is_found_and_counted(tokenizer: Any) -> None:
    sample = Sample("1", "A long context. The question?", ("x",), 4, chat=True, question=" The question?")
    ids, question = encode_with_question(sample, tokenizer)
    assert ids == encode(sample, tokenizer)
    assert tokenizer.decode(ids[-question:]).startswith(" The question?<|im_end|>")


def test_every_longbench_prompt_ends_in_its_question(longbench_dir: Path) -> None:
    for task in build_tasks("longbench,longbench-e", TaskContext(longbench_dir, limit=1)):
        (sample,) = task.samples(None)  # type: ignore[arg-type]
        assert sample.prompt.endswith(sample.question) and 0 < len(sample.question) < len(sample.prompt)


def test_the_protocol_is_recorded_and_part_of_the_run(tmp_path: Path) -> None:
    place = ["--model", random_model(tmp_path), "--methods", "full,slim"]
    arguments = ["run", *place, "--tasks", "needle:lengths=256:depths=0.5:repeats=1"]
    for protocol in ("prompt", "after"):
        assert run(*arguments, "--question", protocol, "--output", tmp_path / protocol) == 0
        records = harness.load(tmp_path / protocol)
        assert set(records.question) == {protocol}
        assert (records.context_tokens < records.prompt_tokens).all() == (protocol == "after")


TRIMMING = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}[assistant]"
KEEPING = TRIMMING.replace(" | trim", "")


@pytest.mark.parametrize("template", [TRIMMING, KEEPING])
@pytest.mark.parametrize(
    ("prompt", "question", "found"),
    [
        ("some context: what is it?\n", "what is it?\n", "what is it?"),
        ("some context: what is it?\n", " what is it?\n", " what is it?"),
        ("x y a", "a", "a"),  # which the template's tail holds, too
        ("who is the assistant", "assistant", "assistant"),
        ("\n  abc d", " d", " d"),
    ],
)
def test_the_question_is_found_in_what_the_user_says(template: str, prompt: str, question: str, found: str) -> None:
    tokenizer = letters(template)
    ids, count = encode_with_question(Sample("1", prompt, ("x",), 4, chat=True, question=question), tokenizer)
    text = str(tokenizer.decode(ids[-count:])).replace("<unk>", "")  # it knows no newline
    assert text == found + "[assistant]"


@pytest.mark.parametrize(
    ("prompt", "question"),
    [("what is it?", "what is it?"), (" what is it?", "what is it?"), ("a b", "\n"), ("a b", "c")],
)
def test_a_question_without_a_context_or_no_question_is_none(prompt: str, question: str) -> None:
    for template in (TRIMMING, None):
        sample = Sample("1", prompt, ("x",), 4, chat=True, question=question)
        assert encode_with_question(sample, letters(template))[1] == 0
