"""`harness run --dry-run`: what would run, how long, and whether it fits, without weights and without a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.measuring.roofline import NO_CEILINGS
from harness.models.load import outline
from harness.runner.plan import plan
from harness.runner.spec import RunSpec
from harness.storage.store import RunStore
from tests.command import run
from tests.runner.test_changes import FACTS, answers
from tests.test_cli import tiny

TASKS = "needle:lengths=512:depths=0.5:repeats=2,turns:lengths=512:repeats=1:turns=3"


@pytest.fixture(autouse=True)
def _no_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.runner.estimate.ceilings", lambda device, dtype: NO_CEILINGS)


def dry(folder: Path, *arguments: object, methods: str = "full,snapkv:budget=0.5", tasks: str = TASKS) -> int:
    asked = ["--methods", methods, "--tasks", tasks, "--model", tiny(folder), "--device", "cpu"]
    return run("run", *asked, "--output", folder / "run", "--dry-run", *arguments)


def test_it_says_what_would_run_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("harness.models.random.RandomModel.load")
    assert dry(tmp_path) == 0
    said = capsys.readouterr().out
    assert "| `snapkv:budget=0.5` | `budget=0.5:window=32:" in said
    assert "| `needle:lengths=512:depths=0.5:repeats=2` | `full` | 2 | 512 |" in said
    assert "| `turns:lengths=512:repeats=1:turns=3` | `snapkv:budget=0.5` | 3 |" in said
    assert "10 requests, 10 left: 1 s at least, going by FLOPs" in said
    assert ": fits, " in said and not (tmp_path / "run").exists()


def test_what_is_there_is_not_ahead_and_other_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks, methods = "speed:lengths=256:repeats=3", "full,snapkv:budget=0.5"
    planned = plan(RunSpec(model=tiny(tmp_path), methods=methods, tasks=tasks, device="cpu"))
    sources = planned.sources()
    with RunStore(tmp_path / "run", planned.manifest(), {"packages": dict(sources.versions)}) as store:
        store.describe(**FACTS, method_sources=sources.methods, task_sources=sources.tasks)
        for record in answers(planned, sources, samples=2):
            store.append(record.model_copy(update={"prompt_tokens": 256, "tpot_s": 0.01}))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert dry(tmp_path, tasks=tasks) == 0
    assert "6 requests, 2 left: about 3 s going by requests like these" in capsys.readouterr().out
    assert dry(tmp_path, "--seed", 1, tasks=tasks) == 2
    assert "holds a different run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    manifest = tmp_path / "run/manifest.json"
    manifest.write_text(manifest.read_text().replace(sources.methods["full"], "old"))
    samples = tmp_path / "run/samples.jsonl"
    samples.write_text(samples.read_text().replace(answers(planned, sources)[0].cell, "old"))
    assert dry(tmp_path, tasks=tasks) == 2
    assert "code changed since it was started" in capsys.readouterr().err


def test_it_says_what_will_not_fit_and_what_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = outline(tiny(tmp_path)).shape
    weights = 4 * (shape.layers * shape.linear_params + shape.head_params)
    for short, free, code, said in (
        (False, weights + 100_000, 0, "WILL NOT FIT"),
        (True, weights - 1, 2, "GiB of cpu memory are free"),
    ):
        for module in ("harness.models.memory", "harness.runner.outlook"):
            monkeypatch.setattr(f"{module}.free_bytes", lambda device, free=free: free)
        assert dry(tmp_path) == code
        printed = capsys.readouterr()
        assert said in (printed.err if short else printed.out)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--max-length", 4096], "has a context of 2048 tokens"),
        (["--batch", 2], "several questions over one cache"),
        (["--executor", "local"], "no --executor"),
        (["--json"], "no --json"),
    ],
)
def test_what_the_run_refuses_it_refuses(
    given: list[object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry(tmp_path, *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not (tmp_path / "run").exists()


def test_data_that_the_run_would_refuse_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text('{"id": "a"}\n')
    assert dry(tmp_path, tasks=f"jsonl:file={data}") == 2
    assert "mine.jsonl" in capsys.readouterr().err
