"""The scorers against complete prediction files that the official scorer has scored."""

from __future__ import annotations

import pytest

from tasks.longbench.means import category_mean, english16_mean
from tasks.longbench.prompts import MEMBERS
from tasks.longbench.scores import Fuzz, score_file
from tests.longbench_paths import GOLDEN, NO_GOLDEN, official

RESULT = GOLDEN / "result.json"

pytestmark = pytest.mark.skipif(not RESULT.is_file(), reason=NO_GOLDEN)


def _needs(name: str) -> None:
    if MEMBERS[name].metric.endswith("_zh") and name != "passage_retrieval_zh":
        pytest.importorskip("jieba", reason="Chinese words are cut by jieba")


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.slow
def test_score_equals_the_official_one(name: str) -> None:
    _needs(name)
    assert score_file(GOLDEN / f"{name}.jsonl", name) == official(RESULT)[name]


@pytest.mark.parametrize(
    ("name", "fuzz", "score"), [("lcc", "levenshtein", 64.89), ("repobench-p", "levenshtein", 56.84)]
)
def test_code_similarity_on_the_other_engine(name: str, fuzz: Fuzz, score: float) -> None:
    # What fuzzywuzzy gives on the same predictions where python-Levenshtein is installed.
    assert score_file(GOLDEN / f"{name}.jsonl", name, fuzz) == score


def test_aggregates_of_the_golden_scores() -> None:
    scores = official(RESULT)
    assert english16_mean(scores) == pytest.approx(44.928125)
    assert category_mean(scores) is not None
    assert english16_mean({**scores, "trec": 0.0}) == pytest.approx(44.928125 - 69.5 / 16)
