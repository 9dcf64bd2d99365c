"""The scorers' quirks on cases made by hand, and the scorers against the packages they stand for."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import InputError
from tasks.longbench import scores
from tasks.longbench.scores import score_prediction

WORDS = st.lists(st.sampled_from(["the", "A", "cat", "sat.", "on", "mat!", ".", "...", "\n", "Cat", "an"]), max_size=30)
TEXT = WORDS.map(" ".join)


# --- question answering


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The Cat!", "cat", 1.0),
        ("cat sat", "cat", 2 / 3),
        ("cat cat", "cat", 2 / 3),
        ("", "cat", 0.0),
        ("the", "the", 0.0),
        ("cat’s", "cats", 0.0),
        ("It's a U.S. thing", "its us thing", 1.0),
    ],
)
def test_qa_f1(prediction: str, answer: str, expected: float) -> None:
    assert scores.qa_f1(prediction, answer) == pytest.approx(expected)


def test_chinese_words_lose_punctuation_but_not_the_forgotten_marks() -> None:
    pytest.importorskip("jieba")
    assert scores.qa_f1_zh("北京。", "北京") == 1.0
    assert scores.qa_f1_zh("北京〈", "北京") == pytest.approx(2 / 3)
    assert scores.qa_f1_zh(" ， ", "北京") == 0.0


def test_jieba_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    jieba = pytest.importorskip("jieba")
    scores.require("qa_f1_zh")
    assert jieba.default_logger.level >= logging.WARNING
    scores.qa_f1_zh("北京", "北京")
    assert capfd.readouterr() == ("", "")


def test_without_jieba_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    scores._jieba.cache_clear()
    with pytest.raises(InputError, match=r"pip install 'harness\[zh\]'"):
        score_prediction("dureader", "北京", ["北京"])
    with pytest.raises(InputError, match="jieba"):
        scores.require("qa_f1_zh")
    scores._jieba.cache_clear()
    assert score_prediction("passage_retrieval_zh", "段落3", ["段落3"]) == 1.0


# --- the first line of few-shot answers


def test_few_shot_answers_are_cut_to_their_first_line() -> None:
    assert score_prediction("triviaqa", "\n\nParis\nQuestion: more", ["Paris"]) == 1.0
    assert score_prediction("triviaqa_e", " \nParis", ["Paris"]) == 0.0
    assert score_prediction("hotpotqa", "Paris\nFrance", ["Paris"]) == pytest.approx(2 / 3)
    assert score_prediction("trec", "Yes\nNo", ["Yes"], ["Yes", "No"]) == 1.0


def test_the_best_answer_counts() -> None:
    assert score_prediction("narrativeqa", "a dog", ["cat", "dog"]) == 1.0
    assert score_prediction("narrativeqa", "bird", ["cat", "dog"]) == 0.0


# --- classification, numbers


@pytest.mark.parametrize(
    ("prediction", "answer", "classes", "expected"),
    [
        ("City", "City", ["City", "Other"], 1.0),
        ("city", "City", ["City", "Other"], 0.0),
        ("City or Other", "City", ["City", "Other"], 0.5),
        ("Other location", "Other location", ["location", "Other location"], 1.0),
        # "Other" is dropped from the list under iteration, so "location" is overlooked and halves the score.
        ("Other location", "Other location", ["Other", "location", "Other location"], 0.5),
        ("nothing", "City", ["City"], 0.0),
    ],
)
def test_classification(prediction: str, answer: str, classes: list[str], expected: float) -> None:
    assert scores.classification(prediction, answer, classes) == expected


def test_classification_needs_classes() -> None:
    with pytest.raises(InputError, match="all_classes"):
        score_prediction("trec", "City", ["City"], None)


@pytest.mark.parametrize(
    ("prediction", "expected"), [("7", 1.0), ("7 of 9", 0.5), ("17", 0.0), ("07", 0.0), ("", 0.0), ("7 7 1", 2 / 3)]
)
def test_numbers(prediction: str, expected: float) -> None:
    assert scores.count(prediction, "7") == expected
    assert scores.retrieval(prediction, "Paragraph 7") == expected
    assert scores.retrieval_zh(prediction, "段落7") == expected


def test_an_answer_without_a_paragraph_is_bad_data() -> None:
    with pytest.raises(InputError, match="names no paragraph"):
        score_prediction("passage_retrieval_en", "7", ["seven"])


# --- code


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("\n\nx = 1\ny = 2", 1.0),
        ("```python\nx = 1", 1.0),
        ("# note\n// note\nx = 1", 1.0),
        (" \nx = 1", 0.33),  # a line of one space is the first line without a comment sign
        ("# x = 1", 0.0),
        ("x = 1 # note", 0.0),
    ],
)
def test_code_similarity_takes_the_first_line_without_a_comment(prediction: str, expected: float) -> None:
    assert scores.code_sim(prediction, "x = 1") == expected


def test_the_engines_differ() -> None:
    # difflib pairs the x first and finds nothing beside it; the longest common subsequence is "cc".
    assert (scores.fuzz_ratio("xcc", "cdcx", "difflib"), scores.fuzz_ratio("xcc", "cdcx", "levenshtein")) == (29, 57)
    assert scores.fuzz_ratio("", "", "difflib") == 100
    assert scores.fuzz_ratio("", "a", "levenshtein") == 0
    assert scores.fuzz_ratio("ab" * 300, "ab" * 300) == 100  # equal before difflib's junk heuristic sees them


@given(st.text("ab c", max_size=40), st.text("ab c", max_size=40))
def test_difflib_engine_equals_fuzzywuzzy(first: str, second: str) -> None:
    if importlib.util.find_spec("Levenshtein"):
        pytest.skip("fuzzywuzzy runs on python-Levenshtein here")
    fuzz = pytest.importorskip("fuzzywuzzy.fuzz")
    assert scores.fuzz_ratio(first, second) == fuzz.ratio(first, second)


@given(st.text("abc", max_size=20), st.text("abc", max_size=20))
def test_lcs_length_equals_the_table(first: str, second: str) -> None:
    assert scores.lcs_length(first, second) == scores._lcs_table(list(first), list(second))[-1][-1]


# --- rouge


@settings(deadline=None, max_examples=300)
@given(TEXT, TEXT)
def test_rouge_equals_the_package(prediction: str, answer: str) -> None:
    package = pytest.importorskip("rouge").Rouge()
    try:
        expected = package.get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
    except ValueError:
        expected = 0.0
    assert scores.rouge_l(prediction, answer) == expected


def test_rouge_of_nothing_is_zero() -> None:
    assert scores.rouge_l("", "a b") == scores.rouge_l("...", "a b") == scores.rouge_l("a", "") == 0.0


def test_rouge_of_sentences_too_long_for_the_package_is_zero() -> None:
    same = " ".join(f"w{number}" for number in range(900))
    assert scores.rouge_l(same, same) == pytest.approx(1.0)  # the walk is diagonal: 900 calls
    other = " ".join(f"v{number}" for number in range(900))
    assert scores.rouge_l(f"{same} {other}", f"{other} {same}") == 0.0
    assert scores.rouge_l(f"{same}. {other}", f"{other}. {same}") > 0.0


# --- against lm-eval's copy, where the two agree


@pytest.fixture(scope="module")
def lm_eval_metrics() -> ModuleType:
    """lm-eval's scorers, loaded without the rest of lm-eval."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        pytest.skip("lm-eval is not installed")
    path = Path(found.submodule_search_locations[0]) / "tasks" / "longbench" / "metrics.py"
    spec = importlib.util.spec_from_file_location("lm_eval_longbench_metrics", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        pytest.skip(str(error))
    return module


def test_every_mark_of_punctuation_is_the_same(lm_eval_metrics: ModuleType) -> None:
    different = [
        code
        for code in range(0x10000)
        if not 0xD800 <= code <= 0xDFFF
        and (chr(code) in scores.PUNCTUATION) != (lm_eval_metrics.normalize_zh_answer(f"{chr(code)}x") == "x")
        and chr(code).strip()
    ]
    assert not different


@settings(deadline=None)
@given(TEXT, TEXT, st.lists(st.sampled_from(["cat", "the cat", "mat", "sat.", "Cat"]), unique=True))
def test_english_scorers_equal_lm_evals(lm_eval_metrics: Any, prediction: str, answer: str, classes: list[str]) -> None:
    assert scores.qa_f1(prediction, answer) == lm_eval_metrics.qa_f1_score(prediction, answer)
    theirs = lm_eval_metrics.classification_score(prediction, "the cat", all_classes=classes)
    assert scores.classification(prediction, "the cat", classes) == theirs


@settings(deadline=None)
@given(st.text("北京是中国的首都。，《a1 ", max_size=20), st.text("北京是中国的首都。，《a1 ", max_size=20))
def test_chinese_scorers_equal_lm_evals(lm_eval_metrics: Any, prediction: str, answer: str) -> None:
    assert scores.qa_f1_zh(prediction, answer) == lm_eval_metrics.qa_f1_zh_score(prediction, answer)
    assert scores.rouge_l_zh(prediction, answer) == lm_eval_metrics.rouge_zh_score(prediction, answer)


# --- prediction files

GOOD = {"pred": "7", "answers": ["7"], "all_classes": None, "length": 10}


def _file(folder: Path, *lines: str) -> Path:
    path = folder / "predictions.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_score_file_is_the_rounded_mean(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "pred": "7 8"}, {**GOOD, "pred": "1"}]
    path = _file(tmp_path, *map(json.dumps, rows))
    assert scores.score_file(path, "passage_count") == scores.score_file(path, "passage_count_e") == 50.0
    assert scores.score_buckets(path, "passage_count_e") == {"0-4k": 50.0, "4-8k": None, "8k+": None}


def test_buckets_are_half_open() -> None:
    assert [scores.bucket(length) for length in (3999, 4000, 7999, 8000)] == ["0-4k", "4-8k", "4-8k", "8k+"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"pred": "7", "ans', "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        (json.dumps({**GOOD, "pred": None}), "field 'pred'"),
        (json.dumps({**GOOD, "answers": []}), "field 'answers'"),
        (json.dumps({**GOOD, "answers": "7"}), "field 'answers'"),
        (json.dumps({**GOOD, "all_classes": [1]}), "field 'all_classes'"),
        (json.dumps({**GOOD, "length": True}), "field 'length'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = _file(tmp_path, json.dumps(GOOD), line)
    with pytest.raises(InputError, match=f"predictions.jsonl:2: {message}"):
        scores.score_file(path, "passage_count")


def test_a_line_the_metric_cannot_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"jsonl:1: classification needs"):
        scores.score_file(_file(tmp_path, json.dumps(GOOD)), "trec")


def test_bad_requests(tmp_path: Path) -> None:
    path = _file(tmp_path, json.dumps({**GOOD, "length": None}))
    with pytest.raises(InputError, match="did you mean 'passage_count'"):
        scores.score_file(path, "pasage_count")
    with pytest.raises(InputError, match="unknown fuzz engine"):
        scores.score_file(path, "lcc", "rapidfuzz")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs field 'length'"):
        scores.score_buckets(path, "passage_count_e")
    with pytest.raises(InputError, match="holds no predictions"):
        scores.score_file(_file(tmp_path, ""), "lcc")
    with pytest.raises(InputError, match="No such file"):
        scores.score_file(tmp_path / "none.jsonl", "lcc")
