"""Prompts byte for byte as the official code fills them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from harness.errors import InputError
from tasks.base import TaskContext
from tasks.common.records import local_rows
from tasks.longbench import prompts
from tasks.longbench.prompts import CATEGORIES, E_MEMBERS, ENGLISH_16, MEMBERS, base_name, fill, template
from tasks.longbench.task import LongBench
from tests.longbench_paths import DATA, LENGTHS, NO_DATA, PROMPTS, official

needs_lm_eval = pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm-eval is not installed")
needs_config = pytest.mark.skipif(not PROMPTS.is_file(), reason=NO_DATA)


def test_the_task_list() -> None:
    assert (len(MEMBERS), len(ENGLISH_16), len(E_MEMBERS), len(CATEGORIES)) == (21, 16, 13, 6)
    assert base_name("repobench-p_e") == "repobench-p"
    assert base_name("narrativeqa_e") == "narrativeqa_e"  # LongBench-E has no such task


@needs_lm_eval
@needs_config
@pytest.mark.parametrize("name", MEMBERS)
def test_template_and_length_are_official(name: str) -> None:
    assert template(name) == official(PROMPTS)[name]
    assert MEMBERS[name].max_new_tokens == official(LENGTHS)[name]


@needs_lm_eval
@needs_config
@pytest.mark.parametrize("name", (*MEMBERS, *E_MEMBERS))
def test_prompts_of_real_records_are_official(name: str) -> None:
    path = DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path.name}")
    task = LongBench(f"longbench/{name}", LongBench.Options.read("", {}), TaskContext(DATA, limit=20))
    rows = [row for _, row in local_rows(path)][:20]
    expected = [official(PROMPTS)[base_name(name)].format(**row) for row in rows]
    assert [sample.prompt for sample in task.samples(None)] == expected  # type: ignore[arg-type]


@needs_lm_eval
@pytest.mark.parametrize("name", prompts._CORRECTIONS)
def test_corrections_leave_the_official_text_alone(name: str) -> None:
    assert prompts._official(name, template(name)) == template(name)


def test_braces_and_backslashes_of_a_record_survive() -> None:
    context = "{input} {context} {} {0} \\1 {{x}}"
    assert fill("a {context} b {input}", context, "{context}") == f"a {context} b {{context}}"


def test_another_template_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_read_lm_eval", lambda base: "{{context}} {{question}}")
    with pytest.raises(InputError, match="prompt of 'trec' is not LongBench's"):
        template.__wrapped__("trec")


def test_without_lm_eval_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'harness\[longbench\]'"):
        template.__wrapped__("trec")


@pytest.mark.parametrize("text", ["a: [", "other: 1", "- 1"])
def test_a_broken_template_file_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_lm_eval_folder", lambda: tmp_path)
    (tmp_path / "trec.yaml").write_text(text)
    with pytest.raises(InputError, match="no readable prompt of 'trec'"):
        template.__wrapped__("trec")
