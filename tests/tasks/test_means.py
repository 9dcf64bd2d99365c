from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from tasks.common.means import SUITES, NamedMean, Suite, found_means
from tasks.longbench.means import LongBenchMeans, category_mean, category_means, english16_mean
from tasks.longbench.prompts import CATEGORIES, E_MEMBERS, ENGLISH_16, MEMBERS


def labels(*members: str, options: str = "") -> list[str]:
    return [f"longbench/{name}{options}" for name in members]


def names(tasks: list[str]) -> list[str]:
    return [mean.name for mean in found_means(tasks)]


def test_a_mean_of_fewer_tasks_is_no_mean() -> None:
    full = dict.fromkeys(MEMBERS, 50.0)
    assert english16_mean(full) == category_mean(full) == 50.0
    less = {name: value for name, value in full.items() if name != "lcc"}
    assert english16_mean(less) is category_mean(less) is None
    assert category_means(less)["code"] is None and category_means(less)["few-shot"] == 50.0
    assert category_mean(full, ["lcc"]) is None


def test_the_two_means_weigh_differently() -> None:
    values = {name: 100.0 if MEMBERS[name].category == "code" else 0.0 for name in ENGLISH_16}
    assert english16_mean(values) == pytest.approx(100 * 2 / 16)
    assert category_mean(values, ENGLISH_16) == pytest.approx(100 / 6)


def test_the_named_figures_are_those_of_the_functions() -> None:
    clock = random.Random(1)
    scores = {name: clock.uniform(0, 100) for name in MEMBERS}
    found = {mean.name: mean.of(scores) for mean in LongBenchMeans.means(tuple(MEMBERS))}
    assert found["LongBench English-16 flat mean"] == english16_mean(scores)
    assert found["LongBench English-16 category mean"] == category_mean(scores, ENGLISH_16)
    assert found["LongBench category mean"] == category_mean(scores)
    assert [found[f"LongBench {kind} mean"] for kind in CATEGORIES] == list(category_means(scores).values())


def test_english_runs_get_english_means_alone() -> None:
    kinds = [f"LongBench English-16 {kind} mean" for kind in CATEGORIES]
    totals = ["LongBench English-16 flat mean", "LongBench English-16 category mean"]
    assert names(labels(*ENGLISH_16)) == [*kinds, *totals]


def test_longbench_e_is_another_suite() -> None:
    found = names(labels(*E_MEMBERS))
    assert found[-2:] == ["LongBench-E flat mean", "LongBench-E category mean"] and len(found) == 8
    assert all(name.startswith("LongBench-E ") for name in found)


def test_an_incomplete_mean_never_has_the_name_alone() -> None:
    found = names(labels(*ENGLISH_16[:-1]))
    assert "LongBench English-16 flat mean, only 15 of 16 tasks" in found
    assert "LongBench English-16 few-shot mean" in found
    assert not any("code" in name or "category mean" in name for name in found)
    assert names(labels("trec")) == names(labels("trec", "hotpotqa_e")) == names(["needle", "mine:file=a"]) == []


def test_tasks_of_other_options_are_never_averaged_together() -> None:
    mixed = labels(*ENGLISH_16[:8]) + labels(*ENGLISH_16[8:], options=":fuzz=levenshtein")
    assert not any(name.startswith("LongBench English-16 flat mean (") for name in names(mixed))
    assert "LongBench English-16 flat mean, only 8 of 16 tasks (fuzz=levenshtein)" in names(mixed)
    whole = names(labels(*ENGLISH_16, options=":fuzz=levenshtein"))
    assert "LongBench English-16 flat mean (fuzz=levenshtein)" in whole


def test_labels_that_are_no_items_have_no_mean() -> None:
    assert found_means(["", "longbench/", "a:b"]) == []


def test_a_mean_is_over_the_means_of_its_groups() -> None:
    mean = NamedMean("m", (("a", "b"), ("c",)))
    assert mean.of({"a": 0.0, "b": 2.0, "c": 9.0, "d": 1.0}) == 5.0
    assert mean.of({"a": 0.0, "c": 9.0}) is None


def test_any_family_of_tasks_may_name_its_means(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pairs(Suite):
        name = "pairs"

        @classmethod
        def means(cls, members: Sequence[str]) -> list[NamedMean]:
            return [NamedMean("Pairs mean", (("a", "b"),))]

    tasks = ["pairs/a", "pairs/b"]
    assert names(tasks) == []
    SUITES.names()
    monkeypatch.setattr(SUITES, "_classes", {"pairs": Pairs})
    assert names(tasks) == ["Pairs mean"]
