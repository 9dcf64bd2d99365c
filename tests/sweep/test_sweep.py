"""`harness sweep`: the file, the cells, the estimate, the runs, the table and the plots."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

import harness
from harness.errors import InputError
from harness.models.random import ByteTokenizer
from harness.runner.catalog import build_tasks
from harness.runner.estimate import _samples
from harness.runner.plan import plan
from harness.runner.terminal import run as run_spec
from harness.sweep.cells import check, multiply
from harness.sweep.grid_file import read_grid
from harness.sweep.pages import write as draw
from harness.sweep.results import collect
from tasks.base import Sample, TaskContext
from tests.command import run
from tests.test_cli import tiny

GRIDS = sorted((Path(__file__).resolve().parents[2] / "results/reference").rglob("*.yaml"))


def written(folder: Path, text: str) -> Path:
    path = folder / "grid.yaml"
    path.write_text(text)
    return path


GRID = """
name: tiny
model: {model}
methods:
  - full
  - method: slim
    options:
      budgets: [0.75/0.375/0.25, [0.5, 0.5, 0.5]]
      w: [4, 8]
      block: 32
tasks: speed:repeats=2:new_tokens=2
lengths: [256, 512]
seed: [0, 1]
limit: 2
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the grid, its model and `out`, where it was run once."""
    folder = tmp_path_factory.mktemp("swept")
    assert run("sweep", written(folder, GRID.format(model=tiny(folder))), "--output", folder / "out") == 0
    return folder


def test_options_lists_and_run_axes_multiply(tmp_path: Path) -> None:
    sweep = multiply(read_grid(written(tmp_path, GRID.format(model=tiny(tmp_path)))))
    assert [run.folder for run in sweep.runs] == ["config.json-seed=0", "config.json-seed=1"]
    assert list(sweep.options) == [
        "full",
        "slim:block=32:budgets=0.75/0.375/0.25:w=4",
        "slim:block=32:budgets=0.75/0.375/0.25:w=8",
        "slim:block=32:budgets=0.5/0.5/0.5:w=4",
        "slim:block=32:budgets=0.5/0.5/0.5:w=8",
    ]
    first = sweep.runs[0].spec
    assert [task.label for task in plan(first).tasks] == [
        f"speed:repeats=2:new_tokens=2:lengths={length}" for length in (256, 512)
    ]
    assert first.limit == 2 and sweep.runs[1].spec.seed == 1


@pytest.mark.slow
def test_one_command_runs_the_grid_again_asks_nothing_and_draws_every_axis(
    swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, folder = swept / "grid.yaml", swept / "out"
    assert len(harness.load(folder / "config.json-seed=1")) == 5 * 2 * 2
    table = pd.read_csv(folder / "sweep.csv")
    assert len(table) == 5 * 2 * 2 and set(table["seed"]) == {0, 1}
    names = {path.stem for path in folder.glob("axis-*.svg")}
    assert names == {"axis-seed", "axis-length", "axis-slim-budgets", "axis-slim-w"}
    before = {path: path.read_bytes() for path in folder.glob("*/samples.jsonl")}
    assert run("sweep", grid, "--output", folder) == 0
    assert before == {path: path.read_bytes() for path in folder.glob("*/samples.jsonl")}
    assert "| `0` | `speed" in capsys.readouterr().out


@pytest.mark.slow
def test_records_alone_are_drawn_without_the_model_to_the_same_bytes(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = written(tmp_path, GRID.format(model=f"random:{tmp_path / 'config.json'}"))
    assert run("sweep", grid, "--from", tmp_path / "out") == 2
    assert "no records of" in capsys.readouterr().err
    folder = shutil.copytree(swept / "out", tmp_path / "out")
    drawn = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {path.suffix for path in drawn} == {".md", ".csv", ".png", ".svg"}
    for path in drawn:
        path.unlink()
    assert run("sweep", grid, "--from", folder) == 0
    assert drawn == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert run("sweep", grid, "--output", tmp_path / "other") == 2, "to run it, the model is needed"
    for option in (["--dry-run"], ["--output", folder]):
        assert run("sweep", grid, "--from", folder, *option) == 2
        assert "no --dry-run" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_point_on_an_axis_is_of_the_methods_with_that_value(swept: Path) -> None:
    results = collect(multiply(read_grid(swept / "grid.yaml")), swept / "out")
    axes = {axis.name: axis for axis in results.axes()}
    w = axes["slim w"]
    assert w.lines == ["full", "budgets=0.75/0.375/0.25", "budgets=0.5/0.5/0.5"] and w.values == ["4", "8"]
    found = next(r for r in w.readings if (r.x, r.line) == ("8", "budgets=0.5/0.5/0.5"))
    records = results.records
    own = records[records["method"] == "slim:block=32:budgets=0.5/0.5/0.5:w=8"].set_index(["cell", "sample"])["ttft_s"]
    full = records[records["method"] == "full"].set_index(["cell", "sample"])["ttft_s"]
    assert found.speed[1] < found.speed[0] < found.speed[2]
    assert (full / own).min() <= found.speed[0] <= (full / own).max()
    assert {r.line for r in axes["seed"].readings} == set(results.sweep.options)


def test_an_unfinished_sweep_shows_what_there_is(tmp_path: Path) -> None:
    text = GRID.format(model=tiny(tmp_path)).replace("[4, 8]", "4").replace("[256, 512]", "[64]")
    sweep, folder = multiply(read_grid(written(tmp_path, text))), tmp_path / "out"
    assert draw(sweep, folder) == []
    run_spec(sweep.runs[0].spec, folder / sweep.runs[0].folder)
    page = draw(sweep, folder)[0].read_text()
    assert "1 runs have no records yet" in page and "`speed" in page


@pytest.mark.slow
def test_a_dry_run_prints_cells_and_says_where_its_estimate_is_from(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, folder = swept / "grid.yaml", tmp_path / "runs/out"
    assert run("sweep", grid, "--dry-run", "--output", folder) == 0
    printed = capsys.readouterr().out
    assert "20 cells, 40 requests" in printed and "from FLOPs and ceilings (20 cells)" in printed
    assert not folder.exists()
    assert run("sweep", grid, "--dry-run", "--output", swept / "out") == 0
    assert "from recorded requests (20 cells)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["ruler/vt:lengths=1024/2048", "ruler/niah_single_1", "retrieval/multikey", "speed"])
def test_generated_samples_are_counted_without_a_prompt(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*_: object) -> list[Sample]:
        raise AssertionError("a prompt was made")

    for limit in (None, 3):
        for task in build_tasks(text, TaskContext(limit=limit)):
            total = task.count()
            monkeypatch.setattr(type(task), "samples", made)
            assert total is not None and _samples(task) == (limit or total)


def test_what_a_task_counts_is_what_it_asks() -> None:
    lengths = "lengths=1500/2048:repeats=2"
    texts = ["needle:depths=0.5:" + lengths, "speed:" + lengths, "graphwalks/bfs:repeats=2", "turns:turns=2:" + lengths]
    for text in [*texts, "retrieval/multikey:repeats=1", "retrieval/common-words:repeats=2"]:
        for task in build_tasks(text, TaskContext()):
            assert task.count() == len(list(task.samples(ByteTokenizer())))


BAD = [
    ("methods: [full]\ntasks: [needle]\nmodell: smollm2\n", 3, "did you mean 'model'"),
    ("methods: [full]\n", 1, "no 'tasks'"),
    ("methods: []\ntasks: [needle]\n", 1, "'methods' has no values"),
    ("methods:\n  - full\n  - method: slim\n    options:\n      w: []\ntasks: [needle]\n", 5, "'w' has no values"),
    ("methods:\n  - full\n  - slimm\ntasks: [needle]\n", 3, "did you mean 'slim'"),
    ("methods:\n  - full\n  - method: slim\n    opts: 1\ntasks: needle\n", 4, "did you mean 'options'"),
    ("methods:\n  - full\n  - method: slim\n    options:\n      ww: [4]\ntasks: needle\n", 3, "unknown option"),
    ("methods:\n  - full\n  - slim:layers=10/20/40\ntasks: needle\n", 3, "must lie in 1..29"),
    ("methods:\n  - full\n  - full\ntasks: needle\n", 3, "listed twice"),
    ("methods:\n  - slim\ntasks: needle\n", 2, "lack 'full'"),
    ("methods: full\ntasks:\n  - needle\n  - neddle\n", 4, "did you mean 'needle'"),
    ("methods: full\ntasks: needle\nlengths: [64]\n", 2, "lengths"),
    ("methods: full\ntasks: needle\nseed: [0, one]\n", 3, "seed"),
    ("methods: full\ntasks: needle\nlimit: 0\n", 3, "limit"),
    ("methods: full\ntasks: needle\nmodel: [smollm2, no/such/model]\n", 3, "no/such/model"),
    ("methods: full\ntasks: needle\nseed: [1, 1]\n", 3, "'1' twice"),
    ("methods: full\ntasks: needle\ntasks: needle\n", 3, "stands twice"),
    ("methods: [full\ntasks: needle\n", 2, "not YAML"),
    ("- full\n", 1, "'key: value'"),
]


@pytest.mark.parametrize(("text", "line", "words"), BAD, ids=[words for _, _, words in BAD])
def test_a_bad_file_is_one_line_that_says_where(
    text: str, line: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = written(tmp_path, text)
    assert run("sweep", grid, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"grid.yaml line {line}: " in error and words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_grid(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="is empty"):
        read_grid(written(tmp_path, "# nothing\n"))


@pytest.mark.parametrize("path", GRIDS, ids=[path.stem for path in GRIDS])
def test_the_grids_of_the_project_can_be_run(path: Path) -> None:
    grid = read_grid(path)
    files = [model.text for model in grid.runs["model"] if model.text.endswith(".gguf")]
    if not all(Path(model).is_file() for model in files):
        pytest.skip(f"{files} is not here")
    check(multiply(grid))


@pytest.mark.usefixtures("forget_methods")
def test_a_method_of_a_file_is_swept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from harness.engine.method import Method\n\n\n"
        "class Mine(Method):\n"
        "    name, summary = 'swept-alone', 'keeps all'\n"
    )
    grid = written(tmp_path, f"methods: [full, swept-alone]\nmodel: {tiny(tmp_path)}\ntasks: [speed]\nlengths: 64\n")
    asked = ("sweep", grid, "--from", tmp_path)
    assert run(*asked) == 2 and "unknown method 'swept-alone'" in capsys.readouterr().err
    assert run(*asked, "--method-file", file) == 2 and "holds no records" in capsys.readouterr().err
