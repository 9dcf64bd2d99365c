"""`harness study`: the file, the matched options, the order of work, the clock, the page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from harness.engine.shape import ModelShape
from harness.errors import InputError, MissingPackage
from harness.measuring.roofline import NO_CEILINGS
from harness.models.load import describe, load
from harness.runner.catalog import METHODS, parse_methods
from harness.runner.loaded import Cell
from harness.runner.plan import plan
from harness.runner.progress import Advance
from harness.runner.samples import Prompt
from harness.runner.spec import WrongOption, cell_hash
from harness.runner.worker import WarmUp
from harness.storage.record import Record
from harness.storage.store import Manifest, Spent, load_manifest
from harness.storage.store import load as load_records
from harness.study.changed import check_code, with_redo
from harness.study.execute import Timed, TimeIsUp, _passed, run_study, stages
from harness.study.matching import TOLERANCE, asked_share, filled, match
from harness.study.outlook import outlook
from harness.study.runs import StudyRun, check_runs, study_runs
from harness.study.samples import detectable, samples_for
from harness.study.study_file import read_study
from tasks.needle import Needle
from tests.command import run
from tests.recorded import save
from tests.storage.test_store import record as any_record
from tests.test_cli import tiny

FIELD = Path(__file__).resolve().parents[2] / "studies/field.yaml"
QWEN = ModelShape("qwen2", 28, 1536, 8960, 12, 2, 128, 151936, 32768)
LLAMA = ModelShape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072)
STUDY = """
name: tiny
model: {model}
budgets: [0.25, 0.5]
methods:
  - full
  - snapkv:budget={{}}
  - 0.5: slim:block=16:budgets={{}}/{{0.5}}/{{0.3333}}
    0.25: slim:layers=1/2/3:block=16:budgets={{}}/{{0.5}}/{{0.3333}}
  - ashape:window=64
parts:
  - name: first
    tasks: [needle:depths=0.1/0.5/0.9:repeats=1, retrieval/multikey]
    lengths: [768]
    question: [prompt, after]
    limit: 3
  - name: speed
    tasks: speed:new_tokens=2:repeats=2
    lengths: [512, 1024]
"""


def written(folder: Path, text: str = STUDY) -> Path:
    path = folder / "study.yaml"
    path.write_text(text.format(model=tiny(folder)))
    return path


def runs_of(folder: Path, only: str = "*") -> list[StudyRun]:
    return study_runs(read_study(written(folder)), only=only)


# --- matched options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "length"), [(QWEN, 4096), (QWEN, 32000), (LLAMA, 8192), (LLAMA, 131000)])
@pytest.mark.parametrize("budget", ["0.5", "0.25", "0.125"])
def test_every_method_of_the_field_meets_every_budget(shape: ModelShape, length: int, budget: str) -> None:
    entries = read_study(FIELD).parts[0].methods
    templates = [entry.templates[budget].text for entry in entries if budget in entry.templates]
    found = [match(text, float(budget), shape, length) for text in templates if "{" in text]
    assert len(found) > 20 and [one.reason for one in found if one.label is None] == []
    for one in found:
        assert one.label is not None
        share, _ = asked_share(one.label, shape, length)
        assert share == one.share == pytest.approx(float(budget), rel=TOLERANCE)


def test_the_studies_leave_no_method_out() -> None:
    entries = [entry for study in FIELD.parent.glob("*.yaml") for entry in read_study(study).parts[0].methods]
    named = {parse_methods(filled(text.text, 0.5, 4096))[0].kind for one in entries for text in one.templates.values()}
    assert {METHODS.get(name) for name in METHODS.names()} - named == set()


def test_a_budget_that_options_cannot_meet_says_so() -> None:
    found = match("slim:budgets={}/{}/{}", 0.125, LLAMA, 8192)
    assert found.label is None and "keeps 32" in found.reason


def test_a_number_in_braces_is_a_share_or_tokens() -> None:
    assert filled("m:a={}/{0.5}:b={t}:c={0.25t}", 0.3, 1000) == "m:a=0.3/0.15:b=300:c=75"
    assert filled("m:a={2}", 0.7, 1000) == "m:a=1"


def test_methods_say_what_their_options_come_to() -> None:
    """Heads of 56 that keep everything, two layers read whole by Quest, whole blocks and the short last one of slim."""
    slim, _ = asked_share("slim:layers=14:budgets=200", QWEN, 1000)
    assert slim == pytest.approx((1000 + 2 * 64 + 40) / 2000)  # 1000 is 15 blocks and 40 tokens
    assert asked_share("duo:sparsity=0.5:sinks=0:recent=100", QWEN, 1000)[0] == pytest.approx(28 / 56 + 28 / 56 * 0.1)
    share, counted = asked_share("quest:budget=100", QWEN, 1000)
    assert share == pytest.approx((2 + 26 * 0.1) / 28) and counted == "attended"
    kinds = [METHODS.get(name) for name in METHODS.names()]
    assert {kind.name for kind in kinds if kind.counted == "attended"} == {"quest", "lychee", "retrieval"}


def test_a_method_in_a_file_of_its_own_is_matched_by_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {name: METHODS.get(name) for name in METHODS.names()}
    monkeypatch.setattr(METHODS, "_classes", known)
    file = tmp_path / "squared.py"
    file.write_text(
        "from harness.engine.method import Method\n"
        "from harness.options import Budget, OptionSet\n\n\n"
        "class Squared(Method):\n"
        "    name, summary, counted = 'squared', 'reads the square of its budget', 'attended'\n\n"
        "    class Options(OptionSet):\n"
        "        budget: Budget = 0.5\n\n"
        "    def asked_share(self, prompt_len):\n"
        "        return self.options.budget**2\n"
    )
    METHODS.load_file(file)
    found = match("squared:budget={}", 0.25, QWEN, 1000)
    assert found.label is not None and found.kind == "attended"
    assert found.share == pytest.approx(0.25, rel=TOLERANCE)
    assert float(found.label.partition("=")[2]) == pytest.approx(0.5, rel=TOLERANCE)


# --- the file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("budgets: [0.25, 0.5]", "budgets: [0.25, 2]", 4, "share between 0 and 1"),
        ("  - full\n", "", 6, "methods lack 'full'"),
        ("name: speed", "nam: speed", 17, "did you mean 'name'"),
        ("snapkv:budget", "snapkv:bugdet", 7, "bugdet"),
        ("0.5: slim", "0.4: slim", 8, "0.4"),
        ("name: speed", "name: first", 13, "two parts"),
        ("limit: 3", "limit: 3\n    seed: [0, 1]", 17, "one seed"),
        ("lengths: [768]", "lengths: [nan]", 14, "length 'nan': expected tokens"),
        ("lengths: [768]", "lengths: [0]", 14, "length '0': expected tokens"),
        ("limit: 3", "length: 0", 16, "length '0': expected tokens"),
        ("name: tiny", "points: inf", 2, "a number above 0"),
        ("budgets: [0.25, 0.5]", "budgets: [0.5, .50]", 4, "two budgets are one number"),
        ("snapkv:budget={{}}", "snapkv:budget={{1.2.3}}", 7, "got '{1.2.3}'"),
    ],
)
def test_a_bad_file_is_one_line_with_its_number(tmp_path: Path, old: str, new: str, line: int, said: str) -> None:
    assert old in STUDY
    path = written(tmp_path, STUDY.replace(old, new))
    with pytest.raises(InputError, match=f"line {line}: .*{re.escape(said)}"):
        study_runs(read_study(path))


def test_runs_are_points_and_patterns_choose_them(tmp_path: Path) -> None:
    folders = [run.folder for run in runs_of(tmp_path)]
    assert folders[:2] == ["first/kept=0.25-length=768-question=prompt", "first/kept=0.25-length=768-question=after"]
    assert len(folders) == 8
    assert len(runs_of(tmp_path, "speed/*1024*, first/kept=0.5-*after")) == 3
    with pytest.raises(InputError, match="fits none"):
        runs_of(tmp_path, "speed/*,last/*")


def test_fixed_options_run_at_the_first_budget_alone(tmp_path: Path) -> None:
    labels = {run.budget: run.spec.methods for run in runs_of(tmp_path, "speed/*512*")}
    assert "ashape:window=64" in labels[0.25] and "ashape" not in labels[0.5]


def test_a_part_without_braces_has_methods_of_its_own_and_no_budget(tmp_path: Path) -> None:
    own = "  - name: published\n    methods: [full, slim]\n    tasks: needle\n    lengths: [512]\n"
    runs = study_runs(read_study(written(tmp_path, STUDY + own)), only="published/*")
    assert [(run.folder, run.budget) for run in runs] == [("published/length=512-question=prompt", 0.0)]
    assert runs[0].spec.methods == "full,slim"
    with pytest.raises(InputError, match="line 2[0-9]: no method of this part has braces"):
        read_study(written(tmp_path, STUDY + own + "    budgets: [0.25]\n"))


def test_what_cannot_be_run_here_is_left_out_and_said(tmp_path: Path) -> None:
    good, lines = check_runs(study_runs(read_study(written(tmp_path, STUDY.replace("[512, 1024]", "[512, 4096]")))))
    assert len(good) == 6 and len(lines) == 1 and "4096" in lines[0] and "2048" in lines[0]


def test_options_that_exclude_each_other_end_the_study(tmp_path: Path) -> None:
    text = STUDY.replace("    limit: 3", "    batch: 2\n    tensor_parallel: 2")
    with pytest.raises(InputError, match="part 'first': --batch: .* not with --tensor-parallel"):
        check_runs(study_runs(read_study(written(tmp_path, text))))


def test_missing_packages_are_told_before_anything_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacks(self: Needle) -> str:
        raise MissingPackage("needles come with haystacks: pip install haystacks")

    monkeypatch.setattr(Needle, "fingerprint", lacks)
    path, folder = written(tmp_path), tmp_path / "out"
    assert run("study", path, "--output", folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "first: needles come with haystacks" in line and "--only 'speed/*' does without" in line
    assert not folder.exists()
    assert run("study", path, "--output", folder, "--only", "speed/*512*", "--dry-run") == 0


# --- the order of work --------------------------------------------------------------------------------------------


def test_stages_double_until_each_run_has_its_own_limit(tmp_path: Path) -> None:
    first, second = runs_of(tmp_path)[:2]
    other = replace(second, run=replace(second.run, spec=second.spec.model_copy(update={"limit": 6})))
    found = [(run.folder == first.folder, limit) for run, limit in stages([first, other])]
    assert found == [(True, 1), (False, 1), (True, 2), (False, 2), (True, 3), (False, 4), (False, 6)]
    assert [limit for _, limit in stages([first, other], samples=2)] == [1, 1, 2, 2]


def test_a_portion_is_whole_before_the_next_begins_and_budgets_come_in_order(tmp_path: Path) -> None:
    runs = runs_of(tmp_path)
    portions = [key for key, _ in groupby(stages(runs), key=lambda stage: stage[0].folder.partition("-question")[0])]
    assert portions == [
        *(f"{part}/kept=0.25-length={n}" for part, n in (("first", 768), ("speed", 512), ("speed", 1024))),
        *(f"{part}/kept=0.5-length={n}" for part, n in (("first", 768), ("speed", 512), ("speed", 1024))),
    ]


class Clocked(Timed):
    """Time is up behind so many records."""

    def __init__(self, records: float) -> None:
        super().__init__(Console(quiet=True), math.inf)
        self.left = records

    def check(self) -> None:
        if self.left <= 0:
            raise TimeIsUp

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Advance]:
        with super().task(label, total) as advance:
            yield lambda record: self._count(advance, record)

    def _count(self, advance: Advance, record: Record) -> None:
        self.left -= 1
        advance(record)


def counts(folder: Path) -> dict[str, int]:
    return {path.parent.name: len(load_records(path.parent)) for path in sorted(folder.rglob("manifest.json"))}


@pytest.mark.slow
def test_a_study_that_stops_is_balanced_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []

    def counted(model: str, *how: Any) -> Any:
        loads.append(model)
        return load(model, *how)

    warm, warm_up = list[str](), WarmUp._warm

    def noted(self: WarmUp, cell: Cell, prompt: Prompt) -> None:
        warm.append(cell.label)
        warm_up(self, cell, prompt)

    monkeypatch.setattr("harness.runner.loaded.load", counted)
    monkeypatch.setattr(WarmUp, "_warm", noted)
    runs, folder = runs_of(tmp_path, "first/kept=0.25-*"), tmp_path / "out"
    whole, _ = run_study(runs, folder, Clocked(19))
    # Two runs, two tasks, four methods: a round of one sample each is 16 requests, 3 more are of the next.
    assert not whole and sorted(counts(folder).values()) == [8, 11] and len(loads) == 1
    # One prompt length: each method was warmed up once, whatever the run, the task and the stage.
    assert len(warm) == len(set(warm)) == 4
    whole, failures = run_study(runs, folder, Clocked(math.inf))
    assert whole and not failures and set(counts(folder).values()) == {24}
    prompt, after = (set(load_records(folder / one.folder)["cell"]) for one in runs)
    assert len(prompt) == len(after) == 8 and not prompt & after, "one worker, but cells of two runs"
    for one in runs:
        assert load_manifest(folder / one.folder).status == "complete"
        assert not load_records(folder / one.folder).duplicated(["method", "task", "sample"]).any()
    loads.clear()
    assert run_study(runs, folder, Clocked(math.inf)) == (True, []) and loads == []


def of_other_code(
    folder: Path, runs: list[StudyRun], method: str, *, limit: int, status: str, spent: Spent | None = None
) -> None:
    """Records of one sample a cell of each run, by code that differs in one method from what is here."""
    for each in runs:
        planned, on = plan(each.spec), ("w", "torch.float32", "a, e")
        now = planned.sources()
        old = replace(now, methods=now.methods | {label: "old" for label in now.methods if label.startswith(method)})
        records = [
            any_record(
                method=own.label,
                task=task.label,
                cell=cell_hash(each.spec, own, task, *on, old.of(own.label, task.label)),
            )
            for task in planned.tasks
            for own in planned.methods
        ]
        facts: dict[str, Any] = {"weights_hash": "w", "dtype": "float32", "attention": "a", "engine": "e"}
        facts |= {"method_sources": old.methods, "task_sources": old.tasks}
        known = {"facts": facts, "latency_only": False, "spent": spent or Spent()}
        manifest = planned.manifest().model_copy(update=known)
        save(folder / each.folder, manifest, records)
        path = folder / each.folder / "manifest.json"
        text = path.read_text().replace('"limit": 3', f'"limit": {limit}')
        path.write_text(text.replace('"complete"', f'"{status}"'))


def test_code_that_changed_is_told_before_anything_is_asked(tmp_path: Path) -> None:
    runs, folder = runs_of(tmp_path, "first/kept=0.25-*"), tmp_path / "out"
    of_other_code(folder, runs, "snapkv", limit=1, status="incomplete")
    with pytest.raises(InputError, match="prompt and 1 more: code changed .*: method snapkv; --redo snapkv asks"):
        check_code(runs, folder)
    assert check_code(with_redo(runs, "snapkv"), folder) == []
    with pytest.raises(WrongOption, match="'h2o' fits no method of these runs"):
        with_redo(runs, "snapkv,h2o")


def test_runs_that_are_whole_are_asked_again_if_that_is_wanted_alone(tmp_path: Path) -> None:
    runs, folder = runs_of(tmp_path, "first/kept=0.25-*"), tmp_path / "out"
    of_other_code(folder, runs, "snapkv", limit=3, status="complete")
    (line,) = check_code(runs, folder)
    assert "not asked again, since nothing is missing" in line and "method snapkv" in line
    again = with_redo(runs, "snapkv")
    specs = [one.spec.model_copy(update={"limit": 1}) for one in (runs[0], again[0])]
    assert [_passed(spec, folder / runs[0].folder) for spec in specs] == [True, False]
    assert specs[0].run_hash() == specs[1].run_hash(), "what is asked again is the same run"


def test_what_is_left_takes_what_such_requests_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.runner.estimate.ceilings", lambda device, dtype: NO_CEILINGS)
    study, folder = read_study(written(tmp_path)), tmp_path / "results/out"
    first, second = study_runs(study, only="first/kept=0.25-*")
    of_other_code(folder, [first], "snapkv", limit=1, status="incomplete", spent=Spent(seconds=80, requests=8))
    said = outlook(study, [first, second], folder)
    # Four methods, two tasks, three samples each; of the first run one sample each is there, and took 10 s a request.
    assert "2 runs, 48 requests, 40 left: about 7 min at the recorded rate (2 runs)." in said
    assert f"| `{first.folder}` | 2 | 4 | 24 | 16 | 3 min | recorded rate |" in said
    again = outlook(study, with_redo([first], "snapkv"), folder)
    assert "24 requests, 18 left: about 3 min" in again, "what is asked again is not there"
    assert outlook(study, [first], folder, samples=1).count("| 8 | 0 | none |") == 1
    (other,) = study_runs(study, only="speed/kept=0.25-length=512*")
    assert "going by FLOPs" in outlook(study, [other], folder)


@pytest.mark.slow
def test_what_is_kept_is_what_was_matched(tmp_path: Path) -> None:
    runs, folder = runs_of(tmp_path, "speed/*length=1024*"), tmp_path / "out"
    run_study(runs, folder, Clocked(math.inf), samples=1)
    for each in runs:
        kept = load_records(folder / each.folder).set_index("method")["kept_fraction"]
        for one in each.methods:
            if one.budget == each.budget and one.label is not None:
                assert kept[one.label] == pytest.approx(each.budget, rel=0.05)


@pytest.mark.slow
def test_the_command_stops_in_time_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = written(tmp_path), tmp_path / "out"
    only = ("--only", "first/kept=0.25*prompt,speed/*512*", "--output", folder)
    assert run("study", path, *only, "--minutes", 0) == 0
    assert "time is up" in capsys.readouterr().out and not folder.exists()
    assert run("study", path, *only, "--dry-run") == 0
    assert "find a loss of" in capsys.readouterr().out
    assert run("study", path, *only, "--samples", 2) == 0
    said = capsys.readouterr().out
    assert "Which method for what" in said and (folder / "report/index.html").is_file()
    page = (folder / "report/methods/snapkv.html").read_text()
    assert "../runs/first/kept%3D0.25-length%3D768-question%3Dprompt/index.html#samples" in page or "Times" in page
    assert run("study", path, "--from", tmp_path / "nothing") == 2


def recorded(study: Path, folder: Path) -> Path:
    """Two runs of the first part, eight samples each, as if a model had answered."""
    shape = asdict(describe(tiny(study.parent)))
    for one in study_runs(read_study(study), only="first/kept=0.25-*"):
        spec = {"question": one.spec.question, "limit": 8}
        methods = [label.label for label in parse_methods(one.spec.methods)]
        facts = {"shape": shape, "weights_hash": "w", "dtype": "bfloat16"}
        manifest = Manifest(
            run_hash=one.folder,
            model="tiny.gguf",
            device="cpu",
            methods=methods,
            tasks=["needle"],
            spec=spec,
            facts=facts,
        )
        records = [answer(method, number) for method in methods for number in range(8)]
        save(folder / one.folder, manifest, records)
    return folder


def answer(method: str, number: int) -> Record:
    kept = 100 if method in ("full", "ashape:window=64") else 25
    score = float(number % 2 == 0 or method == "full")
    changes: dict[str, Any] = {"method": method, "cell": method, "score": score, "kv_bytes": kept}
    return any_record(str(number), prompt_tokens=100, context_tokens=100, tokens_kept=[kept, kept], **changes)


@pytest.mark.slow
def test_what_is_recorded_is_drawn_where_neither_model_nor_data_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_pictures: None
) -> None:
    path = written(tmp_path, STUDY.replace("budgets:", "notes: [Slim prunes early.]\nbudgets:", 1))
    folder = recorded(path, tmp_path / "out")
    path.write_text(path.read_text().replace("random:", "/nowhere/").replace("needle:", "longbench/qasper_e,needle:"))
    assert run("study", path, "--from", folder) == 0
    said = capsys.readouterr().out
    assert "Slim prunes early." in said and "6 of 8 runs have no records yet" in said
    assert "8 samples a method find a loss of" in said
    page = (folder / "report/index.md").read_text()
    assert run("study", path, "--from", folder, "--only", "*prompt", "--output", tmp_path / "page") == 0
    assert (tmp_path / "page/needs.md").is_file()
    assert "| `slim` | `0.25` | `768` | `slim:layers=1/2/3:block=16:" in page
    assert "Full attention scores 100." in page
    assert "question in the prompt, options as given" in page, "ashape keeps everything: no budget is met"


def test_a_run_that_does_not_say_its_shape_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path)
    folder = recorded(path, tmp_path / "out")
    for manifest in folder.rglob("manifest.json"):
        manifest.write_text(manifest.read_text().replace('"shape"', '"form"'))
    assert run("study", path, "--from", folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not say its model's shape" in line


def test_samples_and_loss_belong_together() -> None:
    assert detectable(samples_for(0.03, 0.3, 20), 0.3, 20) <= 0.03 < detectable(samples_for(0.03, 0.3, 20) - 1, 0.3, 20)
    assert detectable(50, 0.01, 1) == 0.06, "what nobody has seen may still be there"
    assert samples_for(0.03, 0.3, 1) == pytest.approx(785, abs=1)  # (1.96 + 0.842)^2 x 100
