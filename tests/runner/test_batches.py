"""`harness run --batch`: the answers of batch 1, a record each, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import harness
from harness.errors import InputError
from harness.report.recorded import read
from harness.report.throughput import throughput
from harness.runner.plan import plan
from harness.runner.spec import RunSpec
from harness.storage.store import load_manifest
from tests.checkpoint import save_checkpoint
from tests.command import run
from tests.test_cli import random_model

pytestmark = pytest.mark.slow

METHODS = "full,snapkv:budget=64:window=8,adakv:budget=64,slim:reselect=A"
ASKED = ("--methods", METHODS, "--tasks", "speed:lengths=100/300:new_tokens=4:repeats=3")


def test_a_record_each_with_what_the_batch_was(tmp_path: Path) -> None:
    model = random_model(tmp_path)
    assert run("run", "--model", model, *ASKED, "--batch", 2, "--output", tmp_path / "two") == 0
    records = harness.load(tmp_path / "two")
    assert len(records) == 4 * 6 and list(records[records.method == "full"].batch) == [2, 2, 1] * 2
    assert (records.batch_tokens_per_s > 0).all() and (records.ttft_s > 0).all()
    assert [len(gaps) for gaps in records.token_s] == [3] * len(records)
    alone = harness.load(_alone(tmp_path, model))
    assert alone.batch.isna().all() and set(alone.cell).isdisjoint(records.cell)
    # A step reads the weights once, and the caches of all: 6 layers of 2 KV heads, 16 channels of 4 bytes.
    full, token = (frame[frame.method == "full"].decode_read_bytes for frame in (records, alone)), 6 * 2 * 2 * 16 * 4
    assert run("report", tmp_path / "two") == 0
    assert "decoded together, by how many" in (tmp_path / "two" / "report" / "index.html").read_text()
    together, single = map(list, full)
    assert [both - one for both, one in zip(together, single, strict=True)] == [
        count * token for count in (100, 100, 0, 300, 300, 0)
    ]


def _alone(folder: Path, model: str) -> Path:
    assert run("run", "--model", model, *ASKED, "--output", folder / "one") == 0
    return folder / "one"


def test_answers_are_those_of_one_at_a_time(tmp_path: Path) -> None:
    model = ("--model", save_checkpoint(tmp_path / "model"), "--dtype", "float32")
    asked = (*model, "--methods", "full,snapkv:budget=0.5", "--tasks", "needle:lengths=300", "--limit", 2)
    answers = []
    for size in (1, 2):
        assert run("run", *asked, "--batch", size, "--output", tmp_path / str(size)) == 0
        records = harness.load(tmp_path / str(size)).set_index(["method", "sample"]).sort_index()
        answers.append(records[["prediction", "score", "new_tokens", "kept_fraction"]])
    assert answers[0].equals(answers[1]) and len(answers[0]) == 4 == answers[0].prediction.str.len().gt(0).sum()


def test_a_batch_that_was_cut_short_is_asked_again_and_no_record_twice(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    asked = ("--model", random_model(tmp_path), *ASKED, "--batch", 3, "--output", folder)
    assert run("run", *asked) == 0
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"status": "running", "records": None}))
    (folder / "samples.jsonl").write_text("".join(lines[:-2]))
    assert run("run", *asked) == 0 and load_manifest(folder).status == "complete"
    again = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    assert again[:-2] == lines[:-2] and len(again) == len(lines)
    pairs = zip(map(json.loads, again[-2:]), map(json.loads, lines[-2:]), strict=True)
    assert all((one["sample"], one["batch"]) == (other["sample"], other["batch"]) for one, other in pairs)


LINKED = (
    "full,slim:layers=2/4:budgets=64/32:block=8:unit=4:gamma=1,slim:layers=2/4:budgets=64/32:block=8:offload=none,"
    "quest:budget=32:page=8:offload=host"
)


def test_what_a_step_brings_over_the_host_link(tmp_path: Path) -> None:
    asked = ("--model", random_model(tmp_path), "--methods", LINKED)
    tasks = ("--tasks", "speed:lengths=200:new_tokens=6:repeats=2")
    for size in (1, 2):
        assert run("run", *asked, *tasks, "--batch", size, "--output", tmp_path / str(size)) == 0
    alone, together = (harness.load(tmp_path / size).set_index(["method", "sample"]) for size in ("1", "2"))
    full, slim, near, quest = (list(alone.loc[method].decode_bus_bytes) for method in LINKED.split(","))
    moved = [extra["kv_bytes_moved"] / 5 for extra in alone.loc[LINKED.split(",")[1]].extra]
    assert full == near == [0, 0] and slim == [round(nbytes) for nbytes in moved] and min(slim) > 0
    # Four layers choose 32 tokens for each of two query heads a KV head: 2 x 16 channels of 4 bytes a token and head.
    assert quest == pytest.approx([4 * 2 * 2 * 32 * 2 * 16 * 4] * 2, rel=0.02)
    for method in LINKED.split(","):
        both = list(together.loc[method].decode_bus_bytes)
        assert both == [pytest.approx(sum(alone.loc[method].decode_bus_bytes), abs=1)] * 2
    assert together.decode_bus_floor_s.isna().all()
    table = throughput([read(tmp_path / "2")])
    assert table.head[-2:] == ["host link, a step", "its floor"]
    assert [row[-2].value for row in table.rows[:2]] == [0, pytest.approx(sum(slim), abs=1)]


def test_batch_1_is_the_run_that_it_always_was() -> None:
    assert "batch" not in RunSpec().identity() and RunSpec(batch=1).run_hash() == RunSpec().run_hash()
    assert RunSpec(batch=2).run_hash() != RunSpec().run_hash()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": "full,lazyllm", "batch": 2}, "lazyllm.*revive=false"),
        ({"methods": "full", "batch": 2, "ledger": True}, "--ledger"),
        ({"batch": 0}, "--batch"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_loads(given: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(RunSpec.read(given))


BOOM = '''
from harness.engine.method import Method


class Boom(Method):
    """Fails for the second of the requests."""

    name = summary = "boom"
    made = 0

    def __init__(self, options, model):
        super().__init__(options, model)
        Boom.made += 1
        self.number = Boom.made

    def attend(self, layer, heads, step):
        if step.phase == "decode" and self.number % 2 == 0:
            raise ValueError("my own bug")
        return super().attend(layer, heads, step)
'''


@pytest.mark.usefixtures("forget_methods")
def test_a_method_that_fails_in_one_request_fails_in_its_batch(tmp_path: Path) -> None:
    (tmp_path / "boom.py").write_text(BOOM)
    asked = ("--methods", "full,boom", "--method-file", tmp_path / "boom.py", *ASKED[2:], "--batch", 2)
    assert run("run", "--model", random_model(tmp_path), *asked, "--output", tmp_path / "run") == 1
    records = harness.load(tmp_path / "run")
    boom = records[records.method == "boom"].set_index("sample")
    failed = [extra.get("failed", "") for extra in boom.extra]
    assert [bool(text) for text in failed] == [True, True, False] * 2
    assert "attend, layer 0: ValueError: my own bug (boom.py" in failed[0]
    assert (records[records.method == "full"].ttft_s > 0).all()


def test_throughput_is_reported_by_batch(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    model = random_model(tmp_path)
    grid.write_text(
        f"model: {model}\nmethods: [full, 'snapkv:budget=64:window=8']\n"
        "tasks: 'speed:new_tokens=3:repeats=3'\nlengths: [128]\nbatch: [1, 3]\n"
    )
    assert run("sweep", grid, "--output", tmp_path / "sweep") == 0
    page = (tmp_path / "sweep" / "sweep.md").read_text()
    assert "Decode throughput by batch" in page and (tmp_path / "sweep" / "throughput.svg").is_file()
    (three,) = (tmp_path / "sweep").glob("*batch=3")
    assert run("report", three) == 0
    table = (three / "report" / "throughput.csv").read_text().splitlines()
    assert len(table) == 3 and all(",3," in line for line in table[1:])
    (one,) = (tmp_path / "sweep").glob("*batch=1")
    assert run("report", one) == 0 and not (one / "report" / "throughput.csv").exists()
