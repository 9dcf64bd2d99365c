"""Tasks of third parties: a single file, and an installed package."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.registry import Registry
from harness.runner.catalog import TASKS
from tasks.base import Task
from tests.checkpoint import save_checkpoint
from tests.command import run

CODE = '''
from tasks.base import Sample, Task


class Echo(Task):
    """Says a word again."""

    name = "{name}"
    summary = "says a word again"
    metric = "exact match"

    def samples(self, tokenizer):
        yield Sample("1", "word word word word", ("word",), 1)

    def score(self, sample, prediction):
        return float(prediction.strip() in sample.answers)
'''


@pytest.fixture
def known() -> Iterator[None]:
    """Forgets what a test registers."""
    TASKS.names()
    before = dict(TASKS._classes)
    yield
    TASKS._classes = before


def test_a_task_file_is_listed_and_runs(tmp_path: Path, known: None, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "echo.py").write_text(CODE.format(name="echo"))
    (tmp_path / "other.py").write_text(CODE.format(name="other"))
    files = ["--task-file", str(tmp_path / "echo.py"), "--task-file", str(tmp_path / "other.py")]
    assert run("tasks", *files) == 0
    assert {"echo", "other"} <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    model = ["--model", save_checkpoint(tmp_path / "model"), "--device", "cpu"]
    assert (
        run("run", "--methods", "full", "--tasks", "echo,other", *model, *files, "--output", str(tmp_path / "r")) == 0
    )
    records = [json.loads(line) for line in (tmp_path / "r/samples.jsonl").read_text().splitlines()]
    assert [record["task"] for record in records] == ["echo", "other"] and records[0]["score"] in (0, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "does not exist"), ("1 +", "failed to import"), ("x = 1", "defines no task"), ("needle", "two tasks")],
)
def test_bad_task_files_are_one_line(
    tmp_path: Path, known: None, capsys: pytest.CaptureFixture[str], text: str | None, words: str
) -> None:
    if text is not None:
        (tmp_path / "bad.py").write_text(CODE.format(name="needle") if text == "needle" else text)
    assert run("tasks", "--task-file", str(tmp_path / "bad.py")) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_an_installed_package_adds_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "echo_package.py").write_text(CODE.format(name="installed-echo"))
    folder = tmp_path / "echo_package-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-package\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[harness.tasks]\ninstalled-echo = echo_package:Echo\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry: Registry[Task] = Registry("task", "tasks", Task)
    assert "installed-echo" in registry.names() and registry.get("installed-echo").summary == "says a word again"
    sys.modules.pop("echo_package")


def test_members_and_their_options_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tasks", "retrieval") == 0 and run("tasks", "retrieval/multikey") == 0
    printed = capsys.readouterr().out
    assert "multikey" in printed and "keys" in printed
    assert run("tasks", "jsonl") == 0 and "required" in capsys.readouterr().out
    assert run("tasks", "retrieval/multikeys") == 2 and "did you mean 'multikey'" in capsys.readouterr().err


def test_a_prediction_file_is_scored_with_one_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"pred": "x = 1 # y", "answers": ["x = 1"], "all_classes": None, "length": 5}
    rows = [line | {"pred": "x = 1"}, line | {"pred": "x = 2"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run("score", str(tmp_path / "p.jsonl"), "--task", "lcc") == 0
    assert capsys.readouterr().out == "90.0\n"
    assert run("score", str(tmp_path / "p.jsonl"), "--task", "longbench/lcc_e", "--fuzz", "levenshtein") == 0
    assert capsys.readouterr().out == "90.0\n"
    for bad in (["no.jsonl", "--task", "lcc"], [str(tmp_path / "p.jsonl"), "--task", "lccc"]):
        assert run("score", *bad) == 2 and capsys.readouterr().err.count("\n") == 1
    assert run("score", str(tmp_path / "p.jsonl"), "--task", "lcc", "--fuzz", "x") == 2
    assert "difflib" in capsys.readouterr().err
    (tmp_path / "p.jsonl").write_text('{"pred": 1}')
    assert run("score", str(tmp_path / "p.jsonl"), "--task", "lcc") == 2 and "p.jsonl:1" in capsys.readouterr().err
