"""InfiniteBench on records made here: one prompt, one score and one bad record of each kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from harness.errors import InputError
from harness.runner.catalog import build_tasks
from tasks.base import Sample, Task, TaskContext, Tokenizer
from tasks.infinitebench import scores
from tasks.infinitebench.task import MEMBERS

NO_TOKENIZER = cast("Tokenizer", None)
INPUTS = {"code_run": "What is func_12(-3)? Say func_12(-3).", "math_find": "The second largest number of the list is:"}
CHOICES = ["one", "two", "three", "four"]


def record(member: str, **fields: Any) -> dict[str, Any]:
    answer = {"code_run": [-7], "math_find": [4.5], "passkey": ["12"], "number_string": "12"}.get(member, ["three"])
    row = {"id": 0, "context": "Long {text}.", "input": INPUTS.get(member, "Which {one}?"), "answer": answer}
    return row | {"options": CHOICES if MEMBERS[member].choices else []} | fields


def save(folder: Path, member: str, *rows: dict[str, Any]) -> Path:
    (folder / f"{member}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def task(folder: Path | None, member: str) -> Task:
    (one,) = build_tasks(f"infinitebench/{member}", TaskContext(folder))
    return one


def first(folder: Path, member: str) -> Sample:
    return next(iter(task(folder, member).samples(NO_TOKENIZER)))


@pytest.mark.parametrize("member", MEMBERS)
def test_every_prompt_holds_context_and_question_and_knows_its_answer(tmp_path: Path, member: str) -> None:
    sample = first(save(tmp_path, member, record(member)), member)
    asked = "func_12(-3)" if member == "code_run" else record(member)["input"]
    assert "Long {text}." in sample.prompt and (asked in sample.prompt) == (
        member not in ("longdialogue_qa_eng", "code_debug")
    )
    assert sample.prompt.endswith(sample.question) and sample.question and "Long" not in sample.question
    assert not sample.chat and sample.max_new_tokens == MEMBERS[member].new_tokens
    right = f" {sample.answers[-1] if member != 'code_debug' else 'C.'}"
    assert task(tmp_path, member).score(sample, right.strip()) == 1
    assert task(tmp_path, member).score(sample, "0") == 0


def test_prompts_are_those_for_open_models(tmp_path: Path) -> None:
    run, find, debug = (
        first(save(tmp_path, member, record(member)), member) for member in ("code_run", "math_find", "code_debug")
    )
    assert run.prompt == (
        "There is a function called func_12 in the following Python code.\n\nLong {text}.\n\n"
        "Please compute the exact value of func_12(-3). The value of func_12(-3) is"
    )
    assert find.prompt == (
        "What is the second largest number in the following list?\n\nLong {text}.\n\n"
        "The second largest number of the list is:"
    )
    assert debug.prompt.endswith("Options:\nA. one\nB. two\nC. three\nD. four\n\nThe correct option is:")
    assert debug.answers == ("three", "C")


@pytest.mark.parametrize(
    ("scorer", "prediction", "answers", "value"),
    [
        (scores.first_integer, " is 123. Remember 45", ["123"], 1),
        (scores.first_integer, "45, or 123", ["123"], 0),
        (scores.word, '"key": "ab-c".', ["ab-c"], 1),
        (scores.word, "ab-cd", ["ab-c"], 0),
        (scores.last_integer, "The value is: -7.", ["-7"], 1),
        (scores.last_integer, "7 or so", ["7"], 0),
        (scores.first_number, "4.50 and 3", ["4.5"], 1),
        (scores.first_number, "12", ["1"], 0),
        (scores.name, "it is JANE doe", ["Jane"], 1),
        (scores.function, "C. three", ["three", "C"], 1),
        (scores.function, "The answer is: three", ["three", "C"], 1),
        (scores.function, "The answer is: B", ["three", "C"], 0),
        (scores.function, "three", ["three", "C"], 0),
        (scores.letter, "Not A but C", ["three", "C"], 1),
        (scores.letter, "A", ["three", "C"], 0),
        (
            scores.letter,
            "Not C but A",
            ["three", "C"],
            1,
        ),  # the last letter is wrong, so the first word that is one counts
        (scores.letter, "three", ["three", "C"], 1),
        (scores.letter, "Cats", ["three", "C"], 1),
        (scores.letter, "the answer is three", ["three", "C"], 1),
        (scores.letter, "", ["three", "C"], 0),
        (scores.f1, "The old man!", ["old woman", "a man"], pytest.approx(2 / 3)),
        (scores.f1_zh, "他是 王。", ["王"], pytest.approx(0.5)),
    ],
)
def test_scores_are_official(scorer: Any, prediction: str, answers: list[str], value: float) -> None:
    assert scorer(prediction, answers) == value


@pytest.mark.parametrize(
    ("member", "fields", "says"),
    [
        ("passkey", {"answer": []}, "passkey.jsonl:1: field 'answer'"),
        ("passkey", {"context": None}, "passkey.jsonl:1: field 'context'"),
        ("code_debug", {"options": ["a"]}, "code_debug.jsonl:1: field 'options'"),
        ("code_debug", {"answer": ["five"]}, "code_debug.jsonl:1: field 'answer'"),
        ("code_run", {"input": "What?"}, "code_run.jsonl:1: field 'input'"),
    ],
)
def test_bad_records_are_refused_before_a_run(tmp_path: Path, member: str, fields: dict[str, Any], says: str) -> None:
    save(tmp_path, member, record(member, **fields))
    with pytest.raises(InputError, match=says):
        task(tmp_path, member)


def test_the_group_is_what_has_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--data-dir"):
        build_tasks("infinitebench", TaskContext(tmp_path))
    save(save(tmp_path, "passkey", record("passkey")), "code_run", record("code_run"))
    with pytest.warns(UserWarning, match="2 of 10 tasks"):
        tasks = build_tasks("infinitebench", TaskContext(tmp_path))
    assert [one.label for one in tasks] == ["infinitebench/passkey", "infinitebench/code_run"]
    with pytest.raises(InputError, match="did you mean 'passkey'"):
        task(tmp_path, "passkeys")
