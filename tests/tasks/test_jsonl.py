from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.errors import InputError
from harness.runner.catalog import build_tasks
from tasks.base import Sample, Task, TaskContext
from tasks.jsonl import METRICS

LINES: list[dict[str, Any]] = [
    {"prompt": "Capital of France?", "answers": ["Paris"], "metric": "contains", "id": "fr"},
    {"prompt": "Context. Who?", "answers": "Ada", "metric": "qa_f1", "question": " Who?", "chat": True, "level": 3},
    {"prompt": "x = 1\n", "answers": ["y = 2", "y = 3"], "metric": "code_sim", "max_new_tokens": 9},
]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def jsonl(path: Path, options: str = "", limit: int | None = None) -> Task:
    (task,) = build_tasks(f"jsonl:file={path}{options}", TaskContext(limit=limit))
    return task


def samples(task: Task) -> list[Sample]:
    return list(task.samples(None))  # type: ignore[arg-type]


def test_every_column_is_used(tmp_path: Path) -> None:
    task = jsonl(write(tmp_path / "a.jsonl", LINES))
    first, second, third = samples(task)
    assert task.metric == "mixed" and first.id == "fr" and first.max_new_tokens == 64 and not first.chat
    assert second.answers == ("Ada",) and second.question == " Who?" and second.chat
    assert second.extra == {"level": 3, "metric": "qa_f1"}
    assert third.answers == ("y = 2", "y = 3") and third.max_new_tokens == 9
    assert task.score(first, "It is  Paris.") == 1 and task.score(first, "paris") == 0
    assert task.score(second, "the Ada") == 1 and task.score(third, "y = 3") == 1


def test_an_option_names_the_metric_of_lines_without_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "answers": ["one two"]}])
    task = jsonl(path, ":metric=exact_match:new_tokens=3")
    (sample,) = samples(task)
    assert task.metric == "exact_match" and sample.max_new_tokens == 3
    assert task.score(sample, " one  two\n") == 1 and task.score(sample, "one two three") == 0
    with pytest.raises(InputError, match=r"a\.jsonl:1: field 'metric'"):
        jsonl(path)


def test_ids_and_fingerprint_follow_the_content(tmp_path: Path) -> None:
    line = {"prompt": "p", "answers": ["a"], "metric": "contains"}
    one = jsonl(write(tmp_path / "a.jsonl", [line, line]))
    two = jsonl(write(tmp_path / "b.jsonl", [line, line | {"prompt": "q"}]))
    first, second = zip(samples(one), samples(two), strict=True)
    assert first[0].id == first[1].id and second[0].id != second[1].id and first[0].id.startswith("1-")
    assert one.fingerprint() != two.fingerprint()
    assert jsonl(tmp_path / "a.jsonl").fingerprint() == one.fingerprint()
    assert len(samples(jsonl(tmp_path / "a.jsonl", limit=1))) == 1


GOOD = {"prompt": "p", "answers": ["a"], "metric": "contains"}
BAD = [
    ([GOOD, {"answers": ["a"], "metric": "contains"}], "a.jsonl:2: field 'prompt'"),
    ([GOOD | {"prompt": ""}], "a.jsonl:1: field 'prompt'"),
    ([GOOD | {"prompt": 3}], "a.jsonl:1: field 'prompt'"),
    ([GOOD | {"answers": []}], "a.jsonl:1: field 'answers'"),
    ([GOOD | {"answers": [""]}], "a.jsonl:1: field 'answers'"),
    ([GOOD | {"answers": ["a", " \n"]}], "a.jsonl:1: field 'answers': a blank answer would accept anything"),
    ([GOOD | {"note": ["\ud800"]}], "a.jsonl:1: field 'note' holds half of a surrogate pair"),
    ([GOOD | {"\udc00": 1}], "a.jsonl:1: field '\\udc00' holds half of a surrogate pair"),
    ([GOOD | {"answers": [1]}], "a.jsonl:1: field 'answers'"),
    ([GOOD | {"metric": "bleu"}], "a.jsonl:1: field 'metric'"),
    ([GOOD | {"max_new_tokens": 0}], "a.jsonl:1: field 'max_new_tokens'"),
    ([GOOD | {"max_new_token": 5}], "did you mean 'max_new_tokens'"),
    ([GOOD | {"chat": "yes"}], "a.jsonl:1: field 'chat'"),
    ([GOOD | {"question": "x"}], "a.jsonl:1: field 'question'"),
    ([GOOD | {"id": "1"}, GOOD | {"id": "1"}], "a.jsonl:2: field 'id' repeats"),
    ([GOOD, '{"prompt": "p", "answ'], "a.jsonl:2: not valid JSON"),
    (["[1]"], "expected a JSON object"),
    ([""], "holds no records"),
]


@pytest.mark.parametrize(("lines", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_lines_are_named(tmp_path: Path, lines: list[Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        jsonl(write(tmp_path / "a.jsonl", lines))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_mark_at_the_beginning_and_the_ends_of_lines_of_windows_are_read(tmp_path: Path) -> None:
    line = b'{"prompt": "p", "answers": ["a"], "metric": "contains"}'
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line + b"\r\n")
    assert [sample.prompt for sample in samples(jsonl(tmp_path / "a.jsonl"))] == ["p", "p"]


def test_wrong_encoding_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8"):
        jsonl(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="No such file"):
        jsonl(tmp_path / "b.jsonl")
    with pytest.raises(InputError, match="jsonl:file=PATH"):
        build_tasks("jsonl", TaskContext())
    with pytest.raises(InputError, match="metric"):
        jsonl(tmp_path / "a.jsonl", ":metric=bleu")


def test_metrics_are_exact() -> None:
    assert METRICS["rouge_l"]("a b c", "a b c") == pytest.approx(1)
    assert METRICS["contains"]("xx Paris yy", "Paris") == 1 and METRICS["exact_match"]("Paris yy", "Paris") == 0
