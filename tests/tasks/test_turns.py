"""Conversations: what each of the three sources asks, in which turn, and what it refuses."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from harness.errors import InputError
from harness.runner.catalog import build_tasks
from tasks.base import Sample, Task, TaskContext
from tests.longbench_paths import record
from tests.longbench_paths import write as write_records
from tests.tasks.test_jsonl import write

needs_prompts = pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="prompts come with lm-eval")

LINE: dict[str, Any] = {
    "context": "Ada lives in Rome, Bob in Oslo.",
    "questions": [
        {"question": "Where does Ada live?", "answers": "Rome"},
        {
            "question": "Where does Bob live?",
            "answers": ["Oslo", "Norway"],
            "metric": "exact_match",
            "max_new_tokens": 3,
        },
    ],
    "metric": "contains",
}


def build(text: str, **context: Any) -> list[Task]:
    return build_tasks(text, TaskContext(**context))


def turns(sample: Sample) -> list[Sample]:
    return [sample, *sample.follow_ups]


def test_facts_of_one_speech_are_asked_one_after_the_other(tokenizer: Any) -> None:
    short, long = build("turns:turns=3:repeats=3:lengths=512/600", limit=3)
    assert (short.label, long.label) == ("turns:turns=3:repeats=3:lengths=512", "turns:turns=3:repeats=3:lengths=600")
    found = list(short.samples(tokenizer))
    assert [each.id for each in turns(found[1])] == ["512-1/turn-1", "512-1/turn-2", "512-1/turn-3"]
    for sample in found:
        ids = tokenizer.encode(sample.prompt)
        assert abs(len(ids) - 512) <= 5 and sample.prompt.endswith(sample.question)
        for each in turns(sample):
            ((start, end),) = each.extra["needles"]
            assert each.answers[0] in tokenizer.decode(ids[start:end]) and each.answers[0] not in each.question
            assert short.score(each, f" {each.answers[0]}.") == 1 and short.score(each, " 12") == 0
        assert all(each.prompt == each.question for each in sample.follow_ups)
        assert len({each.answers for each in turns(sample)}) == 3
        assert {each.extra["context_hash"] for each in turns(sample)} == {sample.extra["context_hash"]}
    # Each turn asks once at each depth, so what a turn costs is not what a depth costs.
    assert [sorted(each.extra["depth"] for each in one) for one in zip(*map(turns, found), strict=True)] == [
        pytest.approx([1 / 6, 1 / 2, 5 / 6])
    ] * 3


def test_asked_apart_each_question_has_the_same_context_of_its_own(tokenizer: Any) -> None:
    (together,), (apart,) = (
        build("turns:turns=2:lengths=512", limit=2),
        build("turns:turns=2:lengths=512:apart=true", limit=2),
    )
    whole, single = list(together.samples(tokenizer)), list(apart.samples(tokenizer))
    asked = [each for sample in whole for each in turns(sample)]
    assert [each.id for each in single] == [each.id for each in asked] and not any(each.follow_ups for each in single)
    contexts = {each.prompt.removesuffix(each.question) for each in single[:2]}
    assert contexts == {whole[0].prompt.removesuffix(whole[0].question)}
    assert [(each.extra["turn"], each.extra["turns"], each.extra["apart"]) for each in single[:2]] == [
        (1, 2, True), (2, 2, True)
    ]  # fmt: skip


def test_a_file_of_contexts_with_their_questions(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [LINE, LINE | {"id": "b", "chat": True, "level": 3}])
    (task,) = build(f"turns/jsonl:file={path}:new_tokens=5")
    first, second = task.samples(None)  # type: ignore[arg-type]
    assert task.metric == "mixed" and [each.id for each in turns(first)] == ["1/turn-1", "1/turn-2"]
    assert first.prompt == f"{LINE['context']}\n\nWhere does Ada live?" and first.question == "\n\nWhere does Ada live?"
    (later,) = second.follow_ups
    assert (later.id, later.prompt, later.max_new_tokens) == ("b/turn-2", "\n\nWhere does Bob live?", 3)
    assert later.chat and later.extra["level"] == 3 and not first.chat and first.max_new_tokens == 5
    assert task.score(first, "in Rome") == 1 and task.score(later, "in Oslo") == 0 and task.score(later, "Norway") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({}, "field 'context'"),
        (LINE | {"questions": []}, "field 'questions'"),
        (LINE | {"questions": [LINE["questions"][0], {"question": "x"}]}, "1, question 2: field 'answers'"),
        (LINE | {"questions": [{"question": "x", "answers": " "}]}, "1, question 1: field 'answers'.*blank"),
        (LINE | {"questions": [{"question": "x", "answers": "y", "answer": "z"}]}, "1, question 1: field 'answer'"),
        (LINE | {"metric": None}, "1, question 1: field 'metric'"),
        (LINE | {"contexts": "x"}, "field 'contexts': did you mean 'context'"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_lines_are_named(line: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [line])
    with pytest.raises(InputError, match=r"a\.jsonl:1") as found:
        build(f"turns/jsonl:file={path}")
    assert re.search(message, str(found.value))


def test_what_cannot_be_asked_is_told_before_a_model_loads(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [LINE | {"id": "x"}, LINE | {"id": "x"}])
    for text, message in (
        (f"turns/jsonl:file={path}", r"a\.jsonl:2: field 'id' repeats"),
        ("turns/jsonl", "needs a file"),
        ("turns/trec", "member of turns"),
        ("turns:turns=21", "more than the 20 places"),
        ("turns:turns=1", "turns"),
    ):
        with pytest.raises(InputError, match=message):
            build(text)


@needs_prompts
def test_records_that_share_a_context_become_turns(tmp_path: Path) -> None:
    shared = {"context": "one two three four", "length": 6}
    rows = [
        record("qasper", 1, **shared, input="First?"),
        record("qasper", 2),
        record("qasper", 3, **shared, input="Second?", answers=["No"]),
        record("qasper", 4, **shared, input="Third?"),
    ]
    write_records(tmp_path, "qasper", *rows)
    (task,) = build("turns/qasper:turns=2", data_dir=tmp_path)
    (sample,) = task.samples(None)  # type: ignore[arg-type]
    (later,) = sample.follow_ups
    assert (task.metric, sample.id, later.id, later.extra["record"]) == ("qa_f1", "id1/turn-1", "id1/turn-2", "id3")
    assert "one two three four" in sample.prompt and sample.prompt.endswith(sample.question)
    assert "one two" not in later.prompt and "Question: Second?" in later.prompt and later.chat
    assert task.score(later, "No") == 1 and later.max_new_tokens == 128


@needs_prompts
def test_records_that_share_nothing_are_no_conversation(tmp_path: Path) -> None:
    write_records(tmp_path, "qasper", record("qasper", 1), record("qasper", 2))
    (task,) = build("turns/qasper", data_dir=tmp_path)
    with pytest.raises(InputError, match="no two records of qasper share a context"):
        list(task.samples(None))  # type: ignore[arg-type]


@needs_prompts
def test_the_shared_records_have_documents_with_several_questions(longbench_dir: Path) -> None:
    (task,) = build("turns/multifieldqa_zh", data_dir=longbench_dir)
    found = list(task.samples(None))  # type: ignore[arg-type]
    assert len(found) > 1 and all(sample.follow_ups for sample in found)
