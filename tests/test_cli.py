"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer.main

import harness
import harness.__main__
from harness.cli import app
from harness.report.summary import COLUMNS
from harness.storage.store import load_manifest
from tests.command import run
from tests.process import start

SMALL = ["--tasks", "needle:lengths=192:depths=0.5:repeats=2"]


def random_model(folder: Path, **shape: int) -> str:
    """Name of a small model with random weights, most of them its words', described in that folder."""
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": 49152,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | shape))
    return f"random:{folder / 'config.json'}"


def tiny(folder: Path, **shape: int) -> str:
    """The same without a vocabulary of words."""
    return random_model(folder, **{"hidden_size": 32, "intermediate_size": 64, "vocab_size": 300} | shape)


@pytest.mark.slow
def test_one_command_gives_records_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert run("run", *SMALL, "--output", str(folder)) == 0
    records = harness.load(folder)
    assert len(records) == 6 and set(records.method) == {"full", "slim", "lazyllm"}
    assert (records.ttft_s > 0).all() and (records.e2e_s >= records.ttft_s).all() and records.score.isin([0, 1]).all()
    summary = pd.read_csv(folder / "summary.csv")
    assert list(summary.columns) == COLUMNS
    assert summary.set_index("method").ttft_speedup["full"] == 1
    assert summary.set_index("method").kept_fraction["slim"] < 1
    assert load_manifest(folder).status == "complete"
    assert (folder / "accuracy_ttft.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.endswith(f"wrote 4 files in {folder}; open {folder / 'table.md'}\n") and "| `needle" in printed
    before = (folder / "samples.jsonl").read_text()
    assert run("resume", folder) == 0 and (folder / "samples.jsonl").read_text() == before


def test_the_same_command_again_asks_nothing_and_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--model", random_model(tmp_path), "--output", tmp_path / "run"]
    arguments = ["run", "--methods", "full", *SMALL, *place]
    assert run(*arguments, "--limit", "1") == 0
    first = (tmp_path / "run/samples.jsonl").read_text()
    assert run(*arguments) == 0
    both = (tmp_path / "run/samples.jsonl").read_text()
    assert both.startswith(first) and both.count("\n") == 2
    assert run(*arguments, "--seed", "1") == 2
    assert "holds a different run (seed: 0, not 1); choose another --output" in capsys.readouterr().err


def test_resume_extends_a_run_and_asks_nothing_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = tmp_path / "run", ["--model", random_model(tmp_path)]
    assert run("run", "--methods", "full", *SMALL, "--limit", "1", *model, "--output", folder) == 0
    first = (folder / "samples.jsonl").read_text()
    assert run("resume", folder, "--samples", "2", *model) == 0
    both = (folder / "samples.jsonl").read_text()
    assert both.startswith(first) and both.count("\n") == 2
    assert run("resume", folder, *model) == 0 and "no more samples" not in capsys.readouterr().err
    assert run("resume", folder, "--samples", "3", *model) == 0
    assert "there are no more samples than these" in capsys.readouterr().err.splitlines()[-1]
    assert (folder / "samples.jsonl").read_text() == both
    assert run("resume", str(tmp_path / "nothing")) == 2


@pytest.mark.slow
def test_every_instrument_can_be_switched_on(tmp_path: Path) -> None:
    flags = ["--parts", "--ledger", "--noise-floor"]
    speed = ["--methods", "full,slim", "--tasks", "speed:lengths=256:new_tokens=4:repeats=1"]
    assert run("run", "--model", random_model(tmp_path), *speed, *flags, "--output", str(tmp_path / "run")) == 0
    records = harness.load(tmp_path / "run").set_index("method")
    assert set(records.index) == {"full", "slim", "full#aa"}
    assert records.score.isna().all() and (records.new_tokens == 4).all() and (records.prompt_tokens == 256).all()
    for parts, ttft in zip(records.parts_s, records.ttft_s, strict=True):
        assert {"attention", "feed forward", "project"} <= set(parts) and sum(parts.values()) < 1.1 * ttft + 0.01
    assert "score" in records.parts_s["slim"] and "score" not in records.parts_s["full"]
    assert records.ledger["full"]["kv_after_prefill"] > records.ledger["slim"]["kv_steady"]
    assert records.prefill_flops["slim"] < records.prefill_flops["full"] == records.dense_flops["full"]
    assert (records.prefill_floor_s > 0).all() and (records.decode_floor_s > 0).all()


def test_paths_are_not_recorded(tmp_path: Path) -> None:
    (tmp_path / "of-this-machine").mkdir()
    model = random_model(tmp_path / "of-this-machine")
    assert run("run", "--methods", "full", "--model", model, *SMALL, "--output", str(tmp_path / "run")) == 0
    files = [(tmp_path / "run" / name).read_text() for name in ("manifest.json", "samples.jsonl")]
    assert all("of-this-machine" not in text for text in files)


def test_random_weights_are_marked_latency_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", "--model", random_model(tmp_path), *SMALL, "--output", str(tmp_path / "run")) == 0
    records = harness.load(tmp_path / "run")
    assert records.score.isna().all() and records.prediction.isna().all() and (records.ttft_s > 0).all()
    assert "latency only" in capsys.readouterr().out


BAD = [
    (["--methods", "slimm"], "did you mean 'slim'"),
    (["--methods", "slim:budgets=0.5/0/0.1"], "keeps nothing"),
    (["--methods", "slim:budgets"], "expected key=value"),
    (["--methods", "slim:scores=absdot"], "did you mean 'score'"),
    (["--methods", "slim:layers=10/20/30"], "must lie in 1..29"),
    (["--tasks", "neddle"], "did you mean 'needle'"),
    (["--tasks", "needle:depth=0.5"], "did you mean 'depths'"),
    (["--tasks", "needle:lengths=100000"], "context of 8192"),
    (["--tasks", "longbench/trec_e", "--data-dir", "nowhere"], "LONGBENCH_DIR"),
    (["--max-length", "9000"], "context of 8192"),
    (["--limit", "0"], "--limit"),
    (["--model", "no/such/model"], "no/such/model"),
    (["--model", "missing.gguf"], "missing.gguf"),
    (["--device", "tpu"], "--device"),
    (["--limti", "3"], "--limit"),
    (["--limit", "three"], "valid integer"),
    (["extra"], "extra"),
    (["--dtype", "int3"], "--dtype"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run("run", *arguments, "--output", str(folder)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not folder.exists()


def test_cuda_where_there_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert run("run", "--device", "cuda") == 2
    assert "CUDA" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["methods", "tasks"])
def test_what_there_is_is_listed_with_a_line_each(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(what) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)
    assert {"full", "slim", "lazyllm", "needle", "longbench"} & {line.split()[0] for line in lines}


def test_a_task_says_where_its_data_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tasks") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("longbench "))
    assert line.rstrip().endswith("--data-dir, LONGBENCH_DIR or the hub")
    assert run("tasks", "longbench") == 0
    assert "languages: English, Chinese, code; licence: MIT" in capsys.readouterr().out
    assert run("tasks", "ruler/vt") == 0
    assert "data: generated, offline (extra ruler)" in capsys.readouterr().out


OPTIONS = [
    (["methods", "slim"], "budgets", "tokens (8192) or a share (0.5), joined by /", "0.75/0.375/0.25"),
    (["methods", "slim"], "layers", "integer, joined by /", "by itself"),
    (["methods", "slim"], "gamma", "number 0 to 1", "0.9"),
    (["methods", "slim"], "w", "integer >= 1", "32"),
    (["methods", "h2o"], "mode", "port, drop", "port"),
    (["methods", "lazyllm"], "revive", "true, false", "true"),
    (["tasks", "needle"], "lengths", "integer >= 192, joined by /", "1024"),
    (["tasks", "jsonl"], "file", "path", "required"),
    (["tasks", "jsonl"], "metric", "exact_match, contains, qa_f1, rouge_l, code_sim", "by itself"),
    (["tasks", "retrieval/multikey"], "keys", "integer 1 to 20", "4"),
]


@pytest.mark.parametrize(("command", "option", "values", "default"), OPTIONS)
def test_an_option_shows_what_it_can_be(
    command: list[str], option: str, values: str, default: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*command) == 0
    rows = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert [cell for cell in rows[1] if cell] == ["option", "values", "default", "meaning"]
    assert next(row[1:3] for row in rows if row[0] == option) == [values, default]


def test_a_method_without_options_and_one_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("methods", "full") == 0 and capsys.readouterr().out.count("\n") == 1
    assert run("methods", "slimm") == 2 and "did you mean 'slim'" in capsys.readouterr().err


def test_json_is_all_there_is_on_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--model", random_model(tmp_path), "--output", tmp_path / "run"]
    assert run("run", "--methods", "full,slim", *SMALL, *place, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["folder"] == str(tmp_path / "run") and found["status"] == "complete" and found["device"] == "cpu"
    assert [row["method"] for row in found["results"]] == ["full", "slim"]
    summary = pd.read_csv(tmp_path / "run/summary.csv").set_index("method")
    for row in found["results"]:
        assert list(row) == [*COLUMNS, "failed"] and row["n"] == 2 and row["failed"] == 0 and row["score"] is None
        assert row["ttft_s"] == summary.ttft_s[row["method"]] and row["kv_bytes"] == summary.kv_bytes[row["method"]]


def test_the_version_and_help_are_for_asking(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert re.fullmatch(r"harness \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)
    assert run() == 0
    assert "Commands:" in capsys.readouterr().out
    assert run("rnu") == 2
    error = capsys.readouterr().err
    assert "'run'" in error and error.count("\n") == 1


def test_every_command_names_its_output_alike() -> None:
    group = typer.main.get_command(app)
    names = {option.name: set(option.opts) for command in commands(group) for option in command.params}
    assert {"--output", "-o", "--out"} <= names["output"]
    assert not {"out", "directory"} & names.keys()
    for command in commands(group):
        flags = [flag for option in command.params for flag in option.opts]
        assert ("--output" in flags) == ("--out" in flags) == ("-o" in flags)


def commands(command: Any) -> Iterator[Any]:
    """Every command below one that groups them, or the command."""
    below = getattr(command, "commands", {})
    yield from (one for name in below for one in commands(below[name])) if below else [command]


@pytest.mark.parametrize("module", ["harness", "harness.cli"])
def test_the_package_and_the_module_are_the_command_too(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("harness ")


def test_shells_complete_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"_HARNESS_COMPLETE": "complete_bash", "COMP_WORDS": "harness re", "COMP_CWORD": "1"}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    assert run() == 0
    assert capsys.readouterr().out.split() == ["resume", "report", "reproduce"]


@pytest.mark.slow
def test_ctrl_c_leaves_a_valid_folder_that_says_it_is_incomplete(tmp_path: Path) -> None:
    folder, errors = tmp_path / "run", tmp_path / "errors"
    speed = ["--methods", "full", "--tasks", "speed:lengths=192:new_tokens=8:repeats=1000"]
    process = start("run", "--model", random_model(tmp_path), *speed, "--output", folder, errors=errors)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not _has_records(folder):
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    error = errors.read_text()
    assert process.exitcode == 130, error
    assert load_manifest(folder).status == "incomplete" and len(harness.load(folder)) >= 1
    assert "interrupted" in error and "Traceback" not in error
    assert "ncomplete" in (folder / "table.md").read_text()


def _has_records(folder: Path) -> bool:
    """Two: the signal may take back the one that is just being written."""
    path = folder / "samples.jsonl"
    return path.exists() and path.read_bytes().count(b"\n") > 1


@pytest.mark.parametrize("group", [[], ["reproduce"], ["calibrate"]])
def test_a_terminal_of_80_columns_shows_what_each_command_does_whole(
    group: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(*group, "--help") == 0
    commands = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    assert len(commands) > 1 and not [line for line in commands if "..." in line]


def test_ctrl_c_is_one_line_whenever_it_comes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a command that has nothing to keep, and before there is one: while modules are imported."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.storage.runs.past_runs", interrupted)
    assert run("runs") == 130
    assert capsys.readouterr().err == "harness: interrupted\n"
    monkeypatch.setattr("harness.cli.main", interrupted)
    with pytest.raises(SystemExit) as stop:
        harness.__main__.main()
    assert stop.value.code == 130 and capsys.readouterr().err == "harness: interrupted\n"
