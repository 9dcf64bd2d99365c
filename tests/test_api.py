"""`harness.run`, as a notebook uses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.storage.store import load_manifest
from tests.command import run
from tests.test_cli import random_model

TASKS = ["speed:lengths=256:new_tokens=2:repeats=2"]


def test_records_come_back_and_a_second_call_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(tmp_path)
    records = harness.run(["full", "slim"], TASKS, model, output=tmp_path / "run", limit=1, device="cpu")
    assert list(records["method"]) == ["full", "slim"] and (records["ttft_s"] > 0).all()
    assert (records["kept_fraction"] < 1).tolist() == [False, True]
    assert records.attrs["folder"] == str(tmp_path / "run") and (tmp_path / "run/table.md").exists()
    printed = capsys.readouterr()
    assert printed.out == "" and f"{TASKS[0]} 2/2 slim: TTFT" in printed.err
    more = harness.run("full,slim", TASKS, model, output=str(tmp_path / "run"), device="cpu", progress=False)
    assert len(more) == 4 and more[:2].equals(records)
    assert capsys.readouterr() == ("", "")


def test_call_and_command_are_one_run(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"model": random_model(tmp_path), "tasks": TASKS[0], "methods": "full"}
    options = [text for name, value in asked.items() for text in (f"--{name}", value)]
    harness.run(**asked, output=tmp_path / "run", max_length=512, progress=False)
    before = (tmp_path / "run/samples.jsonl").read_bytes()
    assert run("run", *options, "--max-length", "512", "--output", tmp_path / "run") == 0
    assert (tmp_path / "run/samples.jsonl").read_bytes() == before


@pytest.mark.usefixtures("forget_methods")
def test_a_method_of_ones_own_is_read_anew_with_every_call(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    text = "from harness.engine.method import Method\n\n\nclass Own(Method):\n    name, summary = 'own', 'full again'\n"
    own.write_text(text)
    model = random_model(tmp_path)
    harness.run("own", TASKS, model, output=tmp_path / "one", method_file=own, limit=1, progress=False)
    own.write_text(text.replace("class Own", "x = 1\n\n\nclass Own"))
    harness.run("own", TASKS, model, output=tmp_path / "two", method_file=[str(own)], limit=1, progress=False)
    sources = [load_manifest(tmp_path / name).facts["method_sources"] for name in ("one", "two")]
    assert sources[0] != sources[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": "slimm"}, "did you mean 'slim'"),
        ({"tasks": ["neddle"]}, "did you mean 'needle'"),
        ({"max_lenght": 512}, "did you mean 'max_length'"),
        ({"ouput": "here"}, "did you mean 'output'"),
        ({"limit": 0}, "--limit"),
        ({"device": "tpu"}, "--device"),
        ({"method_file": "none.py"}, "none.py does not exist"),
    ],
)
def test_bad_input_is_an_error_of_one_line(options: dict[str, str], words: str, tmp_path: Path) -> None:
    with pytest.raises(harness.InputError, match=words) as caught:
        harness.run(**({"output": tmp_path / "run"} | options))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_the_package_says_what_it_offers_and_costs_nothing() -> None:
    assert {"run", "load", "InputError"} <= set(dir(harness))
    with pytest.raises(AttributeError, match="'rnu'"):
        harness.rnu  # noqa: B018
    heavy = "torch", "pandas", "rich", "pydantic", "typer"
    code = f"import sys, harness; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
