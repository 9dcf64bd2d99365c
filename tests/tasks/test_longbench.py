"""The LongBench task: names, data in good and bad states, and the samples it makes."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.errors import InputError
from harness.runner.catalog import TASKS, build_tasks
from tasks.base import Sample, Task, TaskContext
from tasks.longbench.prompts import CATEGORIES, E_MEMBERS, ENGLISH_16, MEMBERS
from tasks.longbench.task import LongBench
from tests.longbench_paths import DATA, NO_DATA, record, write

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="prompts come with lm-eval")
needs_data = pytest.mark.skipif(not (DATA / "trec_e.jsonl").is_file(), reason=NO_DATA)


@pytest.fixture(autouse=True)
def _no_folder_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGBENCH_DIR", raising=False)


def build(text: str, folder: Path | None, limit: int | None = None) -> list[Task]:
    return build_tasks(text, TaskContext(data_dir=folder, limit=limit))


def samples(task: Task) -> list[Sample]:
    return list(task.samples(None))  # type: ignore[arg-type]


def labels(text: str, folder: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [task.label for task in build(text, folder)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One made-up record for each of a few tasks."""
    for name in ("trec", "trec_e", "samsum", "hotpotqa", "lcc"):
        write(tmp_path, name, record(name))
    return tmp_path


# --- names


def test_both_groups_are_registered() -> None:
    assert {"longbench", "longbench-e"} <= set(TASKS.names())


def test_groups_expand_to_what_is_there(folder: Path) -> None:
    assert labels("longbench", folder) == [f"longbench/{name}" for name in ("hotpotqa", "trec", "samsum", "lcc")]
    assert labels("longbench/few-shot", folder) == ["longbench/trec", "longbench/samsum"]
    assert labels("longbench-e", folder) == labels("longbench-e/few-shot", folder) == ["longbench/trec_e"]
    assert labels("longbench/trec_e:fuzz=levenshtein", folder) == ["longbench/trec_e:fuzz=levenshtein"]


def test_a_group_says_what_it_lacks(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"longbench/en: 4 of 16 tasks; .* lacks narrativeqa.jsonl"):
        build("longbench/en", folder)


def test_a_task_can_be_rebuilt_from_its_label(folder: Path) -> None:
    (task,) = build("longbench-e/trec_e", folder)
    (again,) = build(task.label, folder)
    assert isinstance(task, LongBench) and isinstance(again, LongBench)
    assert (again.member, again.category, again.metric) == ("trec_e", "few-shot", "classification")
    assert task.label == again.label


def test_members_are_listed_without_data() -> None:
    names = LongBench.members(TaskContext())
    assert set(names) == {*MEMBERS, *E_MEMBERS, *CATEGORIES, "en"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("longbench/trek", "unknown member of longbench 'trek'; did you mean 'trec'"),
        ("longbench-e/trec", "unknown member of longbench-e 'trec'; did you mean 'trec_e'"),
        ("longbench:fuz=difflib", "unknown option of task longbench 'fuz'; did you mean 'fuzz'"),
        ("longbench:fuzz=rapidfuzz", "fuzz: Input should be 'difflib' or 'levenshtein'"),
        ("longbench/gov_report", "lacks gov_report.jsonl; give the folder"),
    ],
)
def test_a_wrong_name_is_explained(folder: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(text, folder)


def test_a_label_without_a_member_is_refused() -> None:
    with pytest.raises(InputError, match="unknown LongBench task"):
        LongBench("longbench", LongBench.Options.read("", {}), TaskContext())


# --- where the data is


def test_no_data_names_the_three_ways(tmp_path: Path) -> None:
    for given in (None, tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="no LongBench data.*--data-dir.*LONGBENCH_DIR.*source=hub"):
            build("longbench", given)


def test_the_environment_and_an_unzipped_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", "trec", record())
    monkeypatch.setenv("LONGBENCH_DIR", str(tmp_path))
    assert [task.label for task in build("longbench/trec", None)] == ["longbench/trec"]


# --- samples


def test_a_sample_follows_the_protocol(folder: Path) -> None:
    (task,) = build("longbench/trec_e", folder)
    (sample,) = samples(task)
    assert (sample.id, sample.answers, sample.max_new_tokens, sample.chat) == ("id1", ("Yes",), 64, False)
    assert (sample.stop_tokens, sample.min_new_tokens) == ((), 0)
    assert sample.prompt.endswith("\n\none two 1\nWhat?")
    extra = dict(sample.extra)
    assert len(extra.pop("context_hash")) == 16
    expected = {"all_classes": ["Yes", "No"], "length": 5, "dataset": "trec_e", "language": "en", "bucket": "0-4k"}
    assert extra == expected
    assert task.score(sample, "Yes, not No") == 0.5


def test_samsum_ends_at_a_newline(folder: Path) -> None:
    (task,) = build("longbench/samsum", folder)
    (sample,) = samples(task)
    assert (sample.stop_tokens, sample.min_new_tokens, sample.chat) == (("\n",), 1, False)
    assert "bucket" not in sample.extra


def test_chat_is_for_all_but_few_shot_and_code() -> None:
    assert {name for name in MEMBERS if not MEMBERS[name].chat} == {
        "trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p",
    }  # fmt: skip


def test_the_fuzz_option_reaches_the_scorer(folder: Path) -> None:
    tasks = build("longbench/lcc,longbench/lcc:fuzz=levenshtein", folder)
    sample = Sample("a", "", ("cdcx",), 64)
    assert [task.score(sample, "xcc") for task in tasks] == [0.29, 0.57]


def test_no_more_lines_are_read_than_wanted(folder: Path) -> None:
    path = write(folder, "trec", record(), record(number=2))
    path.write_bytes(path.read_bytes() + b"\xff not read")
    (task,) = build("longbench/trec", folder, limit=2)
    assert [sample.id for sample in samples(task)] == ["id1", "id2"]
    (task,) = build("longbench/trec", folder, limit=3)
    with pytest.raises(InputError, match=r"trec.jsonl:3: not UTF-8"):
        samples(task)


def test_classes_may_come_as_text(folder: Path) -> None:
    write(folder, "trec", record(all_classes="['Yes', 'No']"))
    (task,) = build("longbench/trec", folder)
    assert samples(task)[0].extra["all_classes"] == ["Yes", "No"]


# --- bad data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": " \n"}, "field 'context': is empty"),
        ({"context": 3}, "field 'context': Input should be a valid string"),
        ({"input": ""}, "field 'input': is empty"),
        ({"answers": []}, "field 'answers'"),
        ({"answers": ["Yes", ""]}, "field 'answers': holds an empty answer"),
        ({"answers": "Yes"}, "field 'answers'"),
        ({"all_classes": None}, "field 'all_classes': is empty"),
        ({"all_classes": "[Yes"}, "field 'all_classes': neither a list"),
        ({"length": "5"}, "field 'length'"),
        ({"_id": "id1"}, r"field '_id' repeats that of .*trec.jsonl:1"),
        ({"_id": ""}, "field '_id'"),
        ({"dataset": "lsht"}, "field 'dataset': 'lsht' in the data of 'trec'"),
    ],
)
def test_a_bad_field_is_named_with_its_line(folder: Path, changes: dict[str, Any], message: str) -> None:
    write(folder, "trec", record(), {**record(number=2), **changes})
    (task,) = build("longbench/trec", folder)
    with pytest.raises(InputError, match=rf"trec.jsonl:2: {message}"):
        samples(task)


@pytest.mark.parametrize("field", ["_id", "input", "context", "answers", "all_classes", "length", "dataset"])
def test_a_missing_field_shows_before_a_model_loads(folder: Path, field: str) -> None:
    row = record()
    del row[field]
    write(folder, "trec", row)
    with pytest.raises(InputError, match=rf"trec.jsonl:1: field '{field}': Field required"):
        build("longbench/trec", folder)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"_id": "a", "inp', ":1: not valid JSON, or cut off"),
        (json.dumps(record()).encode("utf-16"), ":1: not UTF-8"),
        (b"\xef\xbb\xbf{}", ":1: field '_id': Field required"),  # a byte order mark is read over
        (b"null\n", ":1: expected a JSON object, found NoneType"),
        (b"\n \n", " holds no records"),
    ],
)
def test_a_broken_file_is_named(folder: Path, raw: bytes, message: str) -> None:
    (folder / "trec.jsonl").write_bytes(raw)
    with pytest.raises(InputError, match=f"trec.jsonl{message}"):
        build("longbench/trec", folder)


def test_special_needs_of_single_tasks(folder: Path) -> None:
    write(folder, "trec_e", record("trec_e", length=None))
    with pytest.raises(InputError, match="field 'length': LongBench-E needs it"):
        build("longbench/trec_e", folder)
    write(folder, "passage_retrieval_en", record("passage_retrieval_en"))
    with pytest.raises(InputError, match="field 'answers': answer 'Yes' names no paragraph"):
        build("longbench/passage_retrieval_en", folder)


def test_a_changed_text_is_reported_once(folder: Path) -> None:
    write(folder, "trec", record(length=50), record(number=2, length=60))
    (task,) = build("longbench/trec", folder)
    with pytest.warns(UserWarning, match=r"trec.jsonl:1: field 'length' says 50 words, the record has 5") as caught:
        assert len(samples(task)) == 2
    assert len(caught) == 1


def test_a_filled_in_prompt_is_refused(folder: Path) -> None:
    (sample,) = samples(build("longbench/trec", folder)[0])
    write(folder, "trec", record(context=sample.prompt.replace("\n", " ")))
    with pytest.raises(InputError, match="field 'context' already holds the prompt's instruction"):
        build("longbench/trec", folder)


# --- the hub's mirror


def hub(monkeypatch: pytest.MonkeyPatch, *rows: dict[str, Any]) -> list[Any]:
    """Puts a fake `datasets` in place that streams these rows; returns the list of calls."""
    calls: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> Iterator[dict[str, Any]]:
        calls.append((args, options))
        if not rows:
            raise ConnectionError("offline\nlong story")
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_the_hub_needs_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"context": "one two", "question": "What?", "answers": ["Yes"], "all_classes": ["Yes", "No"]}
    calls = hub(monkeypatch, row, row)
    (task,) = build("longbench/trec:source=hub", None)
    first, second = samples(task)
    assert (first.id, second.id) == ("trec-1", "trec-2")
    assert first.prompt.endswith("one two\nWhat?")
    assert calls[0] == (("Xnhyacinth/LongBench", "trec"), {"split": "test", "streaming": True})


def test_a_hub_group_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(monkeypatch, record("narrativeqa"))
    assert len(build("longbench/en:source=hub", None)) == len(ENGLISH_16)
    assert len(calls) == 1  # one look at the mirror is enough to know that it answers


def test_a_converted_mirror_is_refused(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    hub(monkeypatch, {**record(), "answer_prefix": "Type:"})
    with pytest.raises(InputError, match="row 1: field 'answer_prefix' holds part of the prompt"):
        build("longbench/trec:source=hub", None)
    (sample,) = samples(build("longbench/trec", folder)[0])
    hub(monkeypatch, record(context=sample.prompt))
    with pytest.raises(InputError, match="row 1: field 'context' already holds"):
        build("longbench/trec:source=hub", None)


def test_an_unreachable_hub_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch)
    with pytest.raises(InputError, match=r"cannot be read \(ConnectionError: offline\); give the folder"):
        build("longbench/trec:source=hub", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="needs the package datasets"):
        build("longbench/trec:source=hub", None)


# --- the real data


@needs_data
@pytest.mark.parametrize("name", (*MEMBERS, *E_MEMBERS))
def test_real_records_pass_every_check(name: str) -> None:
    if not (DATA / f"{name}.jsonl").is_file():
        pytest.skip(f"no {name}.jsonl")
    if MEMBERS.get(name) and MEMBERS[name].metric in {"qa_f1_zh", "rouge_l_zh"}:
        pytest.importorskip("jieba")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (task,) = build(f"longbench/{name}", DATA)
        found = samples(task)
    assert len({sample.id for sample in found}) == len(found) > 0
    assert all(json.dumps(dict(sample.extra)) for sample in found)


@needs_data
def test_the_right_answer_scores_full_marks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tasks = [task for task in build("longbench,longbench-e", DATA, limit=2) if not task.metric.endswith("_zh")]
    for task in tasks:
        for sample in samples(task):
            assert task.score(sample, sample.answers[0]) == pytest.approx(1.0, abs=0.02), task.label
