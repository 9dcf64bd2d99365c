"""Conversations through a whole run: a record a turn, nothing prefilled twice, and a way on when they break off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.errors import InputError
from harness.report.build import figures
from harness.report.recorded import read
from harness.report.summary import summarise
from harness.report.turns import against_turn, turns
from harness.runner.prompts import encode_further
from harness.statistics.paired import compare
from harness.storage.record import Record
from harness.storage.store import load_manifest
from tasks.base import Sample
from tasks.common.chat import wrap_further
from tests.command import run
from tests.recorded import save
from tests.report.test_report import manifest, record
from tests.runner.test_interrupted import interrupt_at
from tests.runner.test_kill import comparable
from tests.runner.test_prompts import PLAIN, make
from tests.test_cli import random_model

pytestmark = pytest.mark.slow

METHODS = ("full", "lazyllm", "streaming:window=64")
BROKEN = '''
from harness.engine.method import Method


class Breaks(Method):
    """Full attention that ends in the second turn."""

    name = "breaks"
    summary = "breaks"

    def attend(self, layer, heads, step):
        """Fails where a question comes in."""
        if step.phase == "decode" and step.count > 1:
            raise RuntimeError("no further")
        return super().attend(layer, heads, step)
'''


def asked(folder: Path, methods: str = ",".join(METHODS), contexts: int = 2, options: str = "") -> list[object]:
    """A command that asks three questions about each context."""
    words = [f"word{number} " * 90 for number in range(contexts)]
    questions = [{"question": f"What is {name}?", "answers": "x"} for name in ("this", "that", "it all about")]
    lines = [{"context": text, "questions": questions, "metric": "contains", "id": text[:5]} for text in words]
    (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = f"turns/jsonl:file={folder / 'own.jsonl'}:new_tokens=5{options}"
    return ["run", "--methods", methods, "--tasks", task, "--model", random_model(folder), "--device", "cpu"]


def test_every_turn_has_a_record_and_only_the_first_a_prefill(tmp_path: Path) -> None:
    assert run(*asked(tmp_path), "--question", "after", "--output", tmp_path / "run") == 0
    records = harness.load(tmp_path / "run")
    assert list(records["sample"][:3]) == [f"word0/turn-{number}" for number in (1, 2, 3)]
    # Methods take turns at whole conversations.
    assert all(records["method"][start : start + 3].nunique() == 1 for start in range(0, 18, 3)) and len(records) == 18
    assert [(extra["turn"], extra["turns"]) for extra in records["extra"][:3]] == [(1, 3), (2, 3), (3, 3)]
    first, later = records[records["sample"].str.endswith("-1")], records[~records["sample"].str.endswith("-1")]
    assert (
        (records["ttft_s"] > 0).all() and (records["e2e_s"] >= records["ttft_s"]).all() and records.tpot_s.notna().all()
    )
    assert first["prefill_flops"].notna().all() and later[["prefill_flops", "prefill_floor_s"]].isna().all(axis=None)
    assert later["ttft_s"].median() < first["ttft_s"].median() and records["decode_read_bytes"].notna().all()
    for _, conversation in records.groupby(["method", records["sample"].str[:5]]):
        assert conversation["context_tokens"].nunique() == 1
        assert conversation["prompt_tokens"].is_monotonic_increasing and conversation["prompt_tokens"].is_unique
        assert conversation["prompt_hash"].is_unique
    # What was asked is the same for all methods, whatever they answered.
    assert (records.groupby("sample")["prompt_hash"].nunique() == 1).all()
    assert (first[first["method"] == "full"]["tokens_kept"].map(max) == first["context_tokens"].iloc[0]).all()


def test_asked_apart_behind_a_pruned_context_the_first_turn_is_the_same(tmp_path: Path) -> None:
    """And the later ones have a cache that no earlier question was read into."""
    for name, options in (("together", ""), ("apart", ":apart=true")):
        arguments = asked(tmp_path, "full,snapkv:budget=60", options=options)
        assert run(*arguments, "--question", "after", "--output", tmp_path / name) == 0
    together, apart = (
        harness.load(tmp_path / name).sort_values(["method", "sample"]) for name in ("together", "apart")
    )
    firsts = [frame[frame["sample"].str.endswith("-1")] for frame in (together, apart)]
    assert list(firsts[0]["prediction"]) == list(firsts[1]["prediction"])
    kept = [extra["kept_digest"] for extra in apart[apart["method"] != "full"]["extra"]]
    assert kept[0] == kept[1] == kept[2] and apart["prefill_flops"].notna().all()


@pytest.mark.parametrize("number", [2, 6])
def test_a_conversation_that_broke_off_is_gone_through_again(number: int, tmp_path: Path) -> None:
    arguments = asked(tmp_path, "full,lazyllm")
    assert run(*arguments, "--output", tmp_path / "whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(number, patch)
        assert run(*arguments, "--output", tmp_path / "broken") == 130
    assert len(comparable(tmp_path / "broken")) == number - 1
    assert run(*arguments, "--output", tmp_path / "broken") == 0
    assert comparable(tmp_path / "broken") == comparable(tmp_path / "whole")
    assert load_manifest(tmp_path / "broken").status == "complete"


@pytest.mark.usefixtures("forget_methods")
def test_behind_a_turn_that_failed_no_other_is_asked(tmp_path: Path) -> None:
    (tmp_path / "breaks.py").write_text(BROKEN)
    arguments = asked(tmp_path, "breaks,full", contexts=1)
    assert run(*arguments, "--method-file", tmp_path / "breaks.py", "--output", tmp_path / "run") == 1
    records: Any = harness.load(tmp_path / "run").set_index("method")
    assert not any("failed" in extra for extra in records.loc["full", "extra"])
    broken = records.loc["breaks"]
    assert list(broken["new_tokens"]) == [5, 0, 0] and broken["context_tokens"].nunique() == 1
    assert all("no further" in extra["failed"] for extra in broken["extra"][1:])


def test_a_conversation_has_to_fit_the_models_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(each) for each in asked(tmp_path, "full", contexts=1)]
    assert run(*[each.replace("new_tokens=5", "new_tokens=700") for each in arguments]) == 2
    assert "1 prompt token and 700 new ones, and 1414 of later turns, exceed" in capsys.readouterr().err


def test_turns_are_not_batched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*asked(tmp_path, "full"), "--batch", 2, "--output", tmp_path / "run") == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "--batch" in each]
    assert "turns/jsonl" in line and "several questions over one cache" in line
    assert not (tmp_path / "run").exists()


def test_a_further_turn_is_what_the_template_writes_behind_an_answer(tokenizer: Any) -> None:
    real, plain = tokenizer, make(PLAIN)
    later = Sample("1", "\n\nAnd then?\n", ("x",), 4, chat=True, prefix=" So")
    assert plain.decode(encode_further(later, plain)) == "[user]And then?[a] So"
    expected = "<|im_end|>\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n So"
    assert real.decode(encode_further(later, real)) == expected
    bare = make()
    bare.decode(encode_further(later, bare))
    assert "And then?" in bare.decode(encode_further(later, bare)) and wrap_further("x", bare) == "x"
    # Behind what the template wrote for the first turn and an answer, it is the template's own conversation.
    said = [("user", "Who?"), ("assistant", "Ada."), ("user", "And then?")]
    messages = [{"role": role, "content": content} for role, content in said]
    begun = real.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    whole = real.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert begun + "Ada." + wrap_further("And then?", real) == whole


def test_a_template_without_earlier_answers_holds_no_conversation() -> None:
    with pytest.raises(InputError, match="shows no earlier answers"):
        wrap_further("x", make("[user]{{ messages[-1]['content'] }}[a]"))


def talked(scores: dict[str, list[float]], contexts: int = 8) -> list[Record]:
    """Records of conversations of three turns, with those scores."""

    def one(method: str, context: int, turn: int, score: float) -> Record:
        extra = {"turn": turn, "turns": 3, "context_hash": str(context)}
        changes = {"sample": f"{context}/turn-{turn}", "score": score, "ttft_s": 4.0 if turn == 1 else 0.5}
        return record(method, "turns", 0).model_copy(update=changes | {"extra": extra})

    asked = [(method, turn, score) for method, row in scores.items() for turn, score in enumerate(row, 1)]
    return [one(method, context, turn, score) for context in range(contexts) for method, turn, score in asked]


def test_a_report_shows_accuracy_against_turn(tmp_path: Path) -> None:
    found = talked({"full": [1.0, 1.0, 1.0], "slim:budgets=0.5/0.25": [1.0, 0.0, 0.5]})
    run = read(save(tmp_path / "run", manifest(tasks=["turns"]), found))
    table = turns(run)
    (_, _, contexts, *full), (_, _, _, score, loss, ttft, score_later, loss_later, ttft_later) = table.rows
    assert contexts.text == "8 x 3" and full[1].value is None
    assert (score.value, loss.value, ttft.value) == (100, 0, 4.0)
    assert (score_later.value, loss_later.value, ttft_later.value) == (25, -75, 0.5)
    assert loss_later.low is not None and loss_later.high is not None and loss_later.low <= -75 <= loss_later.high < 0
    figure = against_turn(run)
    assert figure is not None and "turns" in [name for name, _ in figures(run)]
    lines: list[Any] = figure.axes[0].get_lines()
    assert [100.0, 0.0, 50.0] in [list(line.get_ydata()) for line in lines]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == [f"{turn}\nn = 8" for turn in (1, 2, 3)]


def test_times_of_later_turns_are_no_times_of_prefills(tmp_path: Path) -> None:
    found = talked({"full": [1.0] * 3, "slim:budgets=0.5/0.25": [1.0] * 3})
    frame = harness.load(save(tmp_path / "run", manifest(tasks=["turns"]), found))
    assert set(summarise(frame)["ttft_s"]) == {4.0}
    (row,) = compare(frame).query("task == 'turns'").to_dict("records")
    assert (row["ttft_n"], row["tpot_n"], row["score_n"], row["units"]) == (8, 24, 24, 8)


def test_without_turns_there_is_neither_plot_nor_table(tmp_path: Path) -> None:
    run = read(save(tmp_path / "run", manifest(), [record("full", "needle", number) for number in range(2)]))
    assert not turns(run).rows and against_turn(run) is None
