from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from harness.errors import InputError
from harness.runner.catalog import build_tasks
from tasks.base import Sample, Task, TaskContext, Tokenizer
from tasks.common.haystack import TokenMap, speeches
from tasks.retrieval.code import MODULES, functions, source
from tasks.retrieval.needles import CODE_NAMES, around
from tasks.retrieval.suite import listed, share_of_first
from tasks.retrieval.task import SUITES
from tasks.retrieval.words import lexicon

DEEP = ["multikey", "multivalue", "multiquery", "tracking", "passage-retrieval", "code-completion"]


def suite(text: str, context: TaskContext | None = None) -> Task:
    (task,) = build_tasks(f"retrieval/{text}", context or TaskContext())
    return task


def texts(sample: Sample, tokenizer: Tokenizer) -> list[str]:
    """What the needles' token spans hold."""
    ids = tokenizer.encode(sample.prompt)
    return [tokenizer.decode(ids[start:end]) for start, end in sample.extra["needles"]]


def perfect(sample: Sample) -> str:
    return " " + ", ".join(sample.answers)


# --- every suite ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [512, 3000])
@pytest.mark.parametrize("member", SUITES)
@pytest.mark.slow
def test_lengths_are_exact_and_needles_are_where_they_are_said_to_be(
    tokenizer: Tokenizer, member: str, length: int
) -> None:
    for sample in suite(f"{member}:lengths={length}:repeats=2").samples(tokenizer):
        count = len(tokenizer.encode(sample.prompt))
        assert abs(count - sample.extra["length"]) <= sample.extra["length"] / 100
        assert sample.prompt.endswith(sample.question) and not sample.chat and sample.max_new_tokens > 0
        assert all(0 <= start < end <= count for start, end in sample.extra["needles"]) and sample.extra["needles"]
        context = sample.prompt.removesuffix(sample.question)
        for text in texts(sample, tokenizer):
            assert text.strip() in context


@pytest.mark.parametrize("member", SUITES)
@pytest.mark.slow
def test_samples_are_seeded_limited_and_distinct(tokenizer: Tokenizer, member: str) -> None:
    first = list(suite(f"{member}:repeats=2").samples(tokenizer))
    assert first == list(suite(f"{member}:repeats=2").samples(tokenizer))
    assert len({sample.id for sample in first}) == len({sample.prompt for sample in first}) == len(first)
    assert list(suite(f"{member}:repeats=2", TaskContext(limit=1)).samples(tokenizer)) == first[:1]
    other = next(iter(suite(f"{member}:repeats=2", TaskContext(seed=1)).samples(tokenizer)))
    assert other.prompt != first[0].prompt


@pytest.mark.parametrize("member", SUITES)
def test_the_right_answer_scores_1_and_silence_0(tokenizer: Tokenizer, member: str) -> None:
    task = suite(f"{member}:repeats=2", TaskContext(limit=2))
    for sample in task.samples(tokenizer):
        assert task.score(sample, perfect(sample) if member != "code-completion" else sample.answers[0]) == 1
        assert task.score(sample, "") == 0
        assert sample.max_new_tokens >= len(tokenizer.encode(perfect(sample)))


@pytest.mark.parametrize("member", DEEP)
def test_depth_is_controlled(tokenizer: Tokenizer, member: str) -> None:
    found = []
    for sample in suite(f"{member}:lengths=4000:repeats=1:depths=0/0.25/0.5/0.75/1").samples(tokenizer):
        spans = sample.extra["needles"]
        at = sum(start + end for start, end in spans) / (8000 * len(spans))
        low, high = (0.1, 0.9) if "spread" in SUITES[member].Options.model_fields else (0, 1)
        assert abs(at - min(max(sample.extra["depth"], low), high)) < 0.09
        found.append(at)
    assert all(before < after for before, after in pairwise(found))


def test_suites_without_depth_say_null(tokenizer: Tokenizer) -> None:
    for member in set(SUITES) - set(DEEP):
        (sample,) = suite(member, TaskContext(limit=1)).samples(tokenizer)
        assert sample.extra["depth"] is None
        with pytest.raises(InputError, match="depths"):
            suite(f"{member}:depths=0.5")


@pytest.mark.slow
def test_a_suite_of_32k_tokens_takes_seconds(tokenizer: Tokenizer) -> None:
    start = time.process_time()
    samples = list(suite("multikey:lengths=32768:repeats=1").samples(tokenizer))
    assert len(samples) == 5 and time.process_time() - start < 10


# --- the group ------------------------------------------------------------------------------------------------------


def test_one_word_stands_for_all_suites_and_options_go_where_they_are_known() -> None:
    tasks = build_tasks("retrieval:lengths=2048:depths=0.5", TaskContext())
    assert len(tasks) == len(SUITES) == 9 and all(task.longest_prompt() == 2048 for task in tasks)
    labels = [task.label for task in tasks]
    assert "retrieval/multikey:lengths=2048:depths=0.5" in labels and "retrieval/common-words:lengths=2048" in labels


BAD = ["retrieval/multikeys", "retrieval:keys=3", "retrieval:length=5", "retrieval/multikey:keys=21",
       "retrieval/multikey:lengths=100", "retrieval/tracking:hops=0", "retrieval/passage-count:passages=2"]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_bad_options_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        build_tasks(text, TaskContext())


def test_too_much_for_the_length_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="ask for more"):
        list(suite("multivalue:lengths=512:values=50").samples(tokenizer))


# --- needles --------------------------------------------------------------------------------------------------------


def test_multikey_asks_for_one_of_many(tokenizer: Tokenizer) -> None:
    (sample,) = suite("multikey:keys=8", TaskContext(limit=1)).samples(tokenizer)
    assert sample.prompt.removesuffix(sample.question).count("The secret number of") == 8
    (needle,) = texts(sample, tokenizer)
    place = re.search(r"number of (.*) that is", sample.question)
    assert place and f"The secret number of {place[1]} is {sample.answers[0]}." in needle


def test_multivalue_and_multiquery_ask_for_several(tokenizer: Tokenizer) -> None:
    for member in ("multivalue:values=3", "multiquery:keys=5:asked=3"):
        task = suite(member, TaskContext(limit=1))
        (sample,) = task.samples(tokenizer)
        assert len(set(sample.answers)) == len(sample.extra["needles"]) == 3
        for answer, needle in zip(sample.answers, texts(sample, tokenizer), strict=True):
            assert answer in needle
        one = sample.answers[0]
        assert task.score(sample, f"{one}") == pytest.approx(1 / 3)
        assert task.score(sample, f"{one}, {one}, {one}, 1, 2") == pytest.approx(1 / 3)
        assert task.score(sample, f"1 2 3 {perfect(sample)}") == 0  # guesses come first


def test_tracking_follows_a_chain_to_its_number(tokenizer: Tokenizer) -> None:
    task = suite("tracking:hops=2:chains=2", TaskContext(limit=1))
    (sample,) = task.samples(tokenizer)
    told = dict(re.findall(r"code name (\w+) stands for the (?:number|same number as) (\w+)\.", sample.prompt))
    assert len(told) == 6
    value = re.findall(r"\d+", sample.question)[-1]
    resolved = {name: told[name] for name in told}
    for _ in range(3):
        resolved = {name: told.get(end, end) for name, end in resolved.items()}
    assert {name for name, end in resolved.items() if end == value} == set(sample.answers)
    assert not any(name in text for name in CODE_NAMES for text in speeches())


def test_needles_spread_around_the_depth_within_the_text() -> None:
    assert around(0.5, 0.2, 2) == pytest.approx([0.45, 0.55])
    assert around(0.0, 0.2, 2) == pytest.approx([0.05, 0.15]) and around(1.0, 0.2, 2) == pytest.approx([0.85, 0.95])
    assert around(0.3, 1.0, 4) == pytest.approx([0.125, 0.375, 0.625, 0.875])


def test_only_as_many_answers_as_are_wanted_are_read() -> None:
    assert share_of_first(["a", "x", "b"], ["a", "b"]) == 0.5 and share_of_first(["b", "b", "a"], ["a", "b"]) == 1
    assert listed(["a"]) == "a" and listed(["a", "b"]) == "a and b" and listed(["a", "b", "c"]) == "a, b and c"


# --- words, passages, code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [512, 8000])
@pytest.mark.parametrize("member", ["common-words", "frequent-words"])
def test_the_most_frequent_words_are_the_answers(tokenizer: Tokenizer, member: str, length: int) -> None:
    for sample in suite(f"{member}:lengths={length}:repeats=2").samples(tokenizer):
        words = sample.prompt.removesuffix(sample.question).partition("\n\n")[2].split()
        assert len(words) == sample.extra["words"]
        ranked = Counter(words).most_common(len(sample.answers) + 1)
        assert {word for word, _ in ranked[:-1]} == set(sample.answers) and ranked[-2][1] > ranked[-1][1]
        assert {text.strip() for text in texts(sample, tokenizer)} <= set(sample.answers)
        assert len(sample.extra["needles"]) <= 256
    assert len(lexicon()) > 5000


def test_passages_are_numbered_and_hold_the_sentence_once(tokenizer: Tokenizer) -> None:
    for sample in suite("passage-retrieval:lengths=2000:repeats=1").samples(tokenizer):
        context = sample.prompt.removesuffix(sample.question)
        numbered = re.findall(r"Passage (\d+): (.*)", context)
        assert [number for number, _ in numbered] == [str(n + 1) for n in range(len(numbered))]
        quoted = sample.question.partition('"')[2].rpartition('"')[0]
        assert [number for number, text in numbered if quoted in text] == list(sample.answers)
        assert texts(sample, tokenizer) == [f"Passage {sample.answers[0]}:", f" {quoted}"]


def test_different_passages_are_counted(tokenizer: Tokenizer) -> None:
    answers = set()
    for sample in suite("passage-count:repeats=8").samples(tokenizer):
        passages = sample.prompt.removesuffix(sample.question).split("\n\n")
        assert len(passages) == 8 and str(len(set(passages))) == sample.answers[0]
        answers.add(sample.answers[0])
    assert len(answers) > 1


def test_the_next_line_of_real_code_stands_in_the_text_before(tokenizer: Tokenizer) -> None:
    task = suite("code-completion:lengths=2000:repeats=2")
    for sample in task.samples(tokenizer):
        context = sample.prompt.removesuffix(sample.question)
        (line,), (needle,) = sample.answers, texts(sample, tokenizer)
        assert needle.rstrip().endswith(line.strip()) and sample.question.rstrip().split("\n")[-1].strip() in needle
        assert sample.question.strip() + "\n" + line in context and line.strip() not in sample.question
        assert line.strip() in source(sample.extra["module"])
        assert task.score(sample, line + "\nmore") == 1 and (task.score(sample, "zzz") or 0) < 0.3


def test_the_library_offers_enough_functions() -> None:
    assert sum(len(functions(module)) for module in MODULES[:12]) > 50


def test_spans_agree_with_a_tokenizer_that_has_no_map(tokenizer: Tokenizer) -> None:
    class Slow:
        is_fast, chat_template = False, None
        encode, decode = tokenizer.encode, tokenizer.decode

    (sample,) = suite("multikey", TaskContext(limit=1)).samples(tokenizer)
    text = sample.prompt
    start = text.index("The secret number of")
    slow, fast = TokenMap(Slow(), text), TokenMap(tokenizer, text)
    assert slow.count == fast.count and slow.span(start, start + 40) == fast.span(start, start + 40)
    assert replace(sample, id="x") != sample
