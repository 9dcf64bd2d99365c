"""HELMET on files made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from harness.errors import InputError
from harness.runner.catalog import build_tasks
from tasks.base import Sample, Task, TaskContext, Tokenizer

NO_TOKENIZER = cast("Tokenizer", None)
PAIRS = {
    "context": 'JSON data:\n{"a": "1", "b": "2", "c": "3", "d": "4"}', "question": "a", "answer": "1", "num_kvs": 4,
    "demos": [["b", "2"], ["c", "3"], ["d", "4"]],
}  # fmt: skip


def asked(number: int, **fields: Any) -> dict[str, Any]:
    ctxs = [{"id": one, "title": f"T{number}.{one}", "text": f"text {one}"} for one in range(2)]
    return {"question": f"Who is {number}?", "answers": [f"Name {number}", "Other"], "ctxs": ctxs, **fields}


def save(folder: Path, name: str, *rows: dict[str, Any]) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def save_nq(folder: Path, *rows: dict[str, Any]) -> Path:
    save(folder, "kilt/nq-train-multikilt_1000_k3_dep6.jsonl", asked(7), asked(8), asked(8), asked(1))
    return save(folder, "kilt/nq-dev-multikilt_1000_k20_dep6.jsonl", *(rows or (asked(1), asked(2))))


def task(folder: Path | None, text: str, seed: int = 0) -> Task:
    (one,) = build_tasks(f"helmet/{text}", TaskContext(folder, seed=seed))
    return one


def samples(one: Task) -> list[Sample]:
    return list(one.samples(NO_TOKENIZER))


def test_recall_asks_for_a_key_behind_two_examples(tmp_path: Path) -> None:
    (sample,) = samples(task(save(tmp_path, "json_kv/test_k50_dep6.jsonl", PAIRS), "json_kv"))
    assert sample.prompt == (
        f"{PAIRS['context']}\n\nExtract the value corresponding to the specified key in the JSON object below.\n\n"
        "Key: b\nCorresponding value: 2\n\nKey: c\nCorresponding value: 3\n\nKey: a\nCorresponding value:"
    )
    assert sample.answers == ("1",) and sample.max_new_tokens == 100 and not sample.chat and not sample.stop
    assert sample.prompt.endswith(sample.question) and sample.question.startswith("Key: b")


def test_questions_follow_two_worked_examples_of_others(tmp_path: Path) -> None:
    one = task(save_nq(tmp_path), "nq")
    sample, other = samples(one)
    opening, *pieces = sample.prompt.split("\n\nDocument (Title: T")
    assert opening == (
        "Use the given documents to write a concise and short answer to the question. "
        "Write your answer in the following format:\nAnswer: [answer]"
    )
    assert "1.0): text 0" in pieces[-2] and pieces[-1] == "1.1): text 1\n\nQuestion: Who is 1?\nAnswer:"
    shown = "".join(pieces[:-2])
    assert shown.count("Question: ") == 2 and "Who is 7?\nAnswer: Name 7" in shown and "Who is 8?" in shown
    assert sample.question == "Question: Who is 1?\nAnswer:" and sample.stop == ("\n",) and sample.max_new_tokens == 20
    assert samples(one) == [sample, other]


def test_the_score_is_a_substring_without_articles_and_signs(tmp_path: Path) -> None:
    one = task(save_nq(tmp_path), "nq")
    sample = Sample("1", "", ("The U.S. Navy", "fleet"), 1)
    assert one.score(sample, " It's the US navy!") == one.score(sample, "fleets") == 1
    assert one.score(sample, "navy") == one.score(sample, "") == 0


def test_k_says_which_of_several_files(tmp_path: Path) -> None:
    save(save_nq(tmp_path), "kilt/nq-dev-multikilt_1000_k50_dep6.jsonl", asked(5))
    with pytest.raises(InputError, match=r"k= says which; found nq-dev-multikilt_1000_k20\S+ nq-dev\S+_k50"):
        task(tmp_path, "nq")
    assert [sample.answers[0] for sample in samples(task(tmp_path, "nq:k=50"))] == ["Name 5"]
    with pytest.raises(InputError, match="found none"):
        task(tmp_path, "nq:k=5")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"answers": []}, r"nq-dev\S+:1: field 'answers'"),
        ({"ctxs": [{"title": "a"}]}, r"nq-dev\S+:1: field 'ctxs'"),
        ({"question": None}, r"nq-dev\S+:1: field 'question'"),
    ],
)
def test_bad_data_is_refused_before_a_run(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        task(save_nq(tmp_path, asked(1, **fields)), "nq")


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    save(tmp_path, "kilt/nq-dev-multikilt_1000_k20_dep6.jsonl", asked(1))
    with pytest.raises(InputError, match="nq-train"):
        task(tmp_path, "nq")
    save(tmp_path, "kilt/nq-train-multikilt_1000_k3_dep6.jsonl", asked(1), asked(2))
    with pytest.raises(InputError, match="no 2 other questions"):
        task(tmp_path, "nq")
    with pytest.raises(InputError, match="helmet/json_kv, helmet/nq"):
        build_tasks("helmet", TaskContext(tmp_path))
    with pytest.raises(InputError, match="--data-dir"):
        task(None, "json_kv")
