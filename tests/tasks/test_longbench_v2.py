"""LongBench v2 on records made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from harness.errors import InputError
from harness.runner.catalog import build_tasks
from tasks.base import Sample, Task, TaskContext, Tokenizer
from tasks.longbench_v2 import HUB, extract_answer
from tests.command import run

NO_TOKENIZER = cast("Tokenizer", None)


def record(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "_id": f"id{number}", "domain": "Single-Document QA", "sub_domain": "Legal", "difficulty": "easy",
        "length": "short", "question": " Who is {it}? ", "choice_A": "$Q$", "choice_B": " b ", "choice_C": "c",
        "choice_D": "d", "answer": "B", "context": "\nA text with $C_A$ and {braces}. \n", **fields,
    }  # fmt: skip


RECORDS = [record(1), record(2, length="long"), record(3, difficulty="hard", answer="D")]
PROMPT = """\
Please read the following text and answer the question below.

<text>
A text with $C_A$ and {braces}.
</text>

What is the correct answer to this question: Who is {it}?
Choices:
(A) $Q$
(B) b
(C) c
(D) d

Format your response as follows: "The correct answer is (insert answer here)"."""


def save(folder: Path, records: list[dict[str, Any]], name: str = "data.json") -> Path:
    lines = "".join(json.dumps(one) + "\n" for one in records)
    (folder / name).write_text(lines if name.endswith("l") else json.dumps(records, indent=2))
    return folder


def task(folder: Path | None, member: str = "") -> Task:
    (one,) = build_tasks(f"longbench-v2{member}", TaskContext(folder))
    return one


def ids(samples: Any) -> list[str]:
    return [sample.id for sample in samples]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_records_become_the_official_prompt(tmp_path: Path, name: str) -> None:
    first, *_ = samples = list(task(save(tmp_path, RECORDS, name)).samples(NO_TOKENIZER))
    assert first.prompt == PROMPT and first.prompt.endswith(first.question) and "<text>" not in first.question
    assert first.chat and first.max_new_tokens == 128 and first.answers == ("B",)
    assert ids(samples) == ["id1", "id2", "id3"]
    assert first.extra == {"dataset": "Single-Document QA", "difficulty": "easy", "bucket": "short"}


def test_subsets_are_the_official_columns(tmp_path: Path) -> None:
    save(tmp_path, RECORDS)
    found = {name: ids(task(tmp_path, f"/{name}").samples(NO_TOKENIZER)) for name in ("easy", "hard", "short", "long")}
    assert found == {"easy": ["id1", "id2"], "hard": ["id3"], "short": ["id1", "id3"], "long": ["id2"]}
    with pytest.raises(InputError, match="no such records"):
        task(tmp_path, "/medium")
    with pytest.raises(InputError, match="did you mean 'short'"):
        task(tmp_path, "/shot")


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("The correct answer is (B).", "B"),
        ("I think **The correct answer is (C)**", "C"),
        ("The correct answer is D, and not The correct answer is (A)", "A"),
        ("The correct answer is D", "D"),
        ("the correct answer is (B)", None),
        ("B", None),
        ("", None),
    ],
)
def test_the_answer_is_extracted_as_officially(response: str, letter: str | None) -> None:
    assert extract_answer(response) == letter


def test_the_score_is_accuracy(tmp_path: Path) -> None:
    one, sample = task(save(tmp_path, RECORDS)), Sample("1", "", ("B",), 1)
    assert one.score(sample, "The correct answer is (B)") == 1
    assert one.score(sample, "The correct answer is (C)") == one.score(sample, "B") == 0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"answer": "E"}, "record 2: field 'answer'"),
        ({"length": 5}, "record 2: field 'length'"),
        ({"context": ""}, "record 2: field 'context'"),
        ({"choice_C": None}, "record 2: field 'choice_C'"),
        ({"_id": "id1"}, "record 2: field '_id' repeats that of"),
    ],
)
def test_bad_records_are_refused_by_place_and_field(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    one = task(save(tmp_path, [record(1), record(2, **fields)]))
    with pytest.raises(InputError, match=says) as error:
        list(one.samples(NO_TOKENIZER))
    assert "data.json" in str(error.value)


@pytest.mark.parametrize("text", ["[", "[]", "[1]", "", '{"_id": "a"}'])
def test_bad_files_are_refused_before_a_run(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.json").write_text(text)
    assert run("run", "--model", "random:llama-3.1-8b", "--tasks", "longbench-v2", "--data-dir", tmp_path) == 2
    assert "data.json" in capsys.readouterr().err


def test_missing_data_says_what_to_do(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(InputError, match=r"data\.json.*--data-dir.*source=hub"):
            task(folder)


def test_the_hub_s_rows_are_read_as_a_file_s_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` streams them; here from a file in place of the hub."""
    datasets = pytest.importorskip("datasets")
    read, file = datasets.load_dataset, save(tmp_path, RECORDS, "rows.jsonl") / "rows.jsonl"
    asked: list[str] = []

    def instead(name: str, split: str, streaming: bool) -> Any:
        asked.append(name)
        return read("json", data_files=str(file), split=split, streaming=streaming, cache_dir=str(tmp_path))

    monkeypatch.setattr(datasets, "load_dataset", instead)
    (hub,) = build_tasks("longbench-v2:source=hub", TaskContext(None))
    here = list(task(save(tmp_path, RECORDS)).samples(NO_TOKENIZER))
    assert list(hub.samples(NO_TOKENIZER)) == here and len(here) == 3
    assert asked and set(asked) == {HUB}


def test_results_files_get_the_official_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        record(1) | {"response": "The correct answer is (B)"},
        record(2, length="long") | {"response": "no idea", "pred": "B"},
        record(3, difficulty="hard") | {"pred": "B"},
    ]
    save(tmp_path, rows, "results.jsonl")
    assert run("score", tmp_path / "results.jsonl", "--task", "longbench-v2") == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed == {"overall": "66.7", "easy": "50.0", "hard": "100.0", "short": "100.0", "long": "0.0"}
    save(tmp_path, [record(1)], "results.jsonl")
    assert run("score", tmp_path / "results.jsonl", "--task", "longbench-v2") == 2
    assert "results.jsonl:1: field 'response'" in capsys.readouterr().err
