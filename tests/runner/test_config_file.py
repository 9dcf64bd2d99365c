"""`harness run --config`: what a file may say, and who wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.storage.store import load_manifest
from tests.command import run
from tests.test_cli import random_model


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.usefixtures("forget_methods")
def test_a_file_says_what_the_options_would_and_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from harness.engine.method import Method\n\n\nclass Own(Method):\n    name, summary = 'own', 'full again'\n"
    )
    file = written(
        tmp_path,
        f"""
        model: {random_model(tmp_path)}
        methods: [full, slim:block=32, own]
        method-file: {tmp_path}/own.py
        tasks: speed:lengths=256:new_tokens=2:repeats=2
        max-length: 512
        noise_floor: true
        limit: 2
        output: {tmp_path}/by-file
        """,
    )
    assert run("run", "--config", file, "--limit", 1, "--no-noise-floor", "-o", tmp_path / "by-line") == 0
    assert not (tmp_path / "by-file").exists()
    manifest = load_manifest(tmp_path / "by-line")
    assert manifest.methods == ["full", "slim:block=32", "own"]
    assert manifest.spec["max_length"] == 512 and manifest.spec["limit"] == 1 and not manifest.spec["noise_floor"]
    assert run("run", "--config", file) == 0
    manifest = load_manifest(tmp_path / "by-file")
    assert manifest.spec["limit"] == 2 and manifest.spec["noise_floor"]


BAD = [
    ("tasks: needle\nlimti: 3", 2, "did you mean 'limit'"),
    ("limit: x", 1, "limit: Input should be a valid integer"),
    ("limit: 0", 1, "limit: Input should be greater"),
    ("limit: [1, 2]", 1, "expected a single value"),
    ("methods: []", 1, "'methods' has no values"),
    ("noise_floor: perhaps", 1, "noise_floor: "),
    ("max_length: 100\nmax-length: 200", 2, "'max-length' is given twice"),
    ("output: a\nout: b", 2, "'out' is given twice"),
    ("config: other.yaml", 1, "unknown key 'config'"),
    ("- full", 1, "'key: value' lines"),
]


@pytest.mark.parametrize(("text", "line", "words"), BAD, ids=[words for _, _, words in BAD])
def test_a_bad_file_is_one_line_that_says_where(
    text: str, line: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("run", "--config", written(tmp_path, text), "--output", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert f"run.yaml line {line}: " in error and words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", "--config", tmp_path / "none.yaml") == 2
    assert "cannot read" in capsys.readouterr().err
