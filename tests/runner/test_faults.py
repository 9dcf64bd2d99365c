"""A method's own fault costs it the request, and nobody else theirs: it is told, recorded, counted, and tried again."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

import harness
from harness.conformance.kit import Subject, run_check
from harness.runner.catalog import METHODS, TASKS, parse_methods
from harness.runner.faults import ran_out, told
from harness.storage.store import load_manifest
from tests.checkpoint import save_checkpoint
from tests.command import run
from tests.test_cli import random_model

pytestmark = pytest.mark.slow

HEAD = """import torch
from dataclasses import replace
from harness.engine.method import Method

class Own(Method):
    name = "own"
    summary = "with one fault"
"""
TASK = "speed:lengths=96:new_tokens=3:repeats=2"
FAULTS = {
    "raises": (
        "    def attend(self, layer, heads, step):\n        return self.helper(layer, heads, step)\n"
        "    def helper(self, layer, *rest):\n        if layer == 2:\n            raise ValueError('my own bug')\n"
        "        return super().attend(layer, *rest)\n",
        "attend, layer 2: ValueError: my own bug (own.py:12)",
    ),
    "none": (
        "    def attend(self, layer, heads, step):\n        return None\n",
        "attend, layer 0: returned None; expected float32 [96, 64], a row for each query (own.py:8)",
    ),
    "a row less": (
        "    def attend(self, layer, heads, step):\n        return super().attend(layer, heads, step)[:-1]\n",
        "attend, layer 0: returned float32 [95, 64] on cpu; expected float32 [96, 64], a row for each query (own.py:8)",
    ),
    "broadcast": (
        "    def attend(self, layer, heads, step):\n        return super().attend(layer, heads, step)[:1]\n",
        "attend, layer 0: returned float32 [1, 64] on cpu",
    ),
    "another type": (
        "    def attend(self, layer, heads, step):\n        return super().attend(layer, heads, step).double()\n",
        "attend, layer 0: returned float64 [96, 64]",
    ),
    "in decode": (
        "    def attend(self, layer, heads, step):\n        return super().attend(layer, heads, step)"
        "[: 0 if step.phase == 'decode' else None]\n",
        "attend, layer 0: returned float32 [0, 64] on cpu; expected float32 [1, 64]",
    ),
    "lost attended": (
        "    def after_attention(self, layer, rows, heads, step):\n        return replace(rows, attended=None)\n",
        "after_attention, layer 0: returned Rows of hidden float32 [96, 64] on cpu",
    ),
    "no rows": (
        "    def after_layer(self, layer, rows, heads, step):\n        return rows.select(torch.arange(0))\n",
        "after_layer, layer 0: returned Rows of hidden float32 [0, 64] on cpu",
    ),
    "hidden alone": (
        "    def after_layer(self, layer, rows, heads, step):\n        return rows.hidden\n",
        "after_layer, layer 0: returned float32 [96, 64] on cpu; expected Rows",
    ),
    "no prompt": (
        "    def prompt(self, ids, run):\n        return ids[:0]\n",
        "prompt: returned int64 [0] on cpu; expected int64 [m], m from 1 to 96 (own.py:8)",
    ),
    "no caches": (
        "    def begin(self, prompt_len, max_new_tokens):\n        self.prompt_len = prompt_len\n",
        "begin: left no `cache` for each of 6 layers",
    ),
    "question": (
        "    def question_tokens(self, prompt_len, question):\n        return prompt_len\n",
        "question_tokens: returned 96; expected an int from 0 to 95 (own.py:8)",
    ),
    "too few requested": (
        "    def tokens_requested(self):\n        return [self.prompt_len] * 5\n",
        "tokens_requested: returned [96, 96, 96, 96, 96]; expected an int for each of 6 layers (own.py:8)",
    ),
    "kept": (
        "    def tokens_kept(self):\n        return [float('nan')] * 6\n",
        "tokens_kept: returned [nan, nan, nan, nan, nan, nan]; expected a number for each of 6 layers",
    ),
    "bytes": (
        "    def kv_bytes(self):\n        return -1\n",
        "kv_bytes: returned -1; expected an int of 0 or more (own.py:8)",
    ),
    "notes": (
        "    def notes(self):\n        return {'worst': torch.ones(2)}\n",
        "notes: returned {'worst': tensor([1., 1.])}; expected a dictionary of JSON values (own.py:8)",
    ),
    "end": (
        "    def end(self):\n        self.stores.clear()\n",
        "end: AttributeError: 'Own' object has no attribute 'stores' (own.py:9)",
    ),
    "cannot be made": (
        "    def __init__(self, options, model):\n        super().__init__(options, model)\n        self.table[0]\n",
        "__init__: AttributeError: 'Own' object has no attribute 'table' (own.py:10)",
    ),
    "a file of somebody": (
        "    def begin(self, prompt_len, max_new_tokens):\n        open('/nobody/at/home/weights.pt')\n",
        "begin: FileNotFoundError: [Errno 2] No such file or directory: 'weights.pt' (own.py:9)",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command line loads is forgotten after the test."""
    for registry in (METHODS, TASKS):
        registry.names()
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))


@pytest.fixture
def model(tmp_path: Path) -> str:
    return random_model(tmp_path)


def asked(folder: Path, model: str, code: str, methods: str = "full,own", task: str = TASK, redo: str = "") -> int:
    """Runs the method that is written into a file beside the results."""
    file = folder / "own.py"
    file.write_text(HEAD + code)
    words = ["--model", model, "--methods", methods, "--tasks", task, "--device", "cpu", "--output", folder / "run"]
    return run("run", "--method-file", file, *words, "--redo", redo)


def records_of(method: str, folder: Path) -> pd.DataFrame:
    records = harness.load(folder / "run")
    return records[records["method"] == method]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_with_hook_layer_and_line(
    fault: str, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, words = FAULTS[fault]
    assert asked(tmp_path, model, code) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith(f"harness: own on {TASK} failed, 2 of 2 requests: {words}")
    own, full = records_of("own", tmp_path), records_of("full", tmp_path)
    assert all(extra["failed"].startswith(words) for extra in own["extra"])
    assert full["ttft_s"].notna().all() and own["ttft_s"].isna().all() and own["kept_fraction"].isna().all()


@pytest.mark.parametrize(("task", "scored"), [(TASK, False), ("needle:lengths=192:depths=0.1/0.9:repeats=1", True)])
def test_a_failed_cell_is_counted_and_makes_the_run_incomplete(tmp_path: Path, task: str, scored: bool) -> None:
    model = save_checkpoint(tmp_path / "model") if scored else random_model(tmp_path)
    assert asked(tmp_path, model, FAULTS["raises"][0], task=task) == 1
    table = (tmp_path / "run" / "table.md").read_text()
    words = f"(extra.failed of a record says where), and so without numbers: own on {task}: 2 of 2 requests."
    assert f"**Failed** {words}" in table and "`own` | 0 |" in table and "`full` | 2 |" in table
    manifest = load_manifest(tmp_path / "run")
    assert manifest.status == "incomplete" and "attend, layer 2" in manifest.reasons[0]
    assert run("report", tmp_path / "run") == 0
    assert f"Failed {words}" in (tmp_path / "run" / "report" / "index.html").read_text()


def test_what_failed_is_tried_again_and_nothing_else(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(tmp_path, model, FAULTS["raises"][0]) == asked(tmp_path, model, FAULTS["raises"][0]) == 1
    assert len(harness.load(tmp_path / "run")) == 4
    full = records_of("full", tmp_path)["e2e_s"].tolist()
    capsys.readouterr()
    assert asked(tmp_path, model, "") == 0  # mended, in the same folder
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines()[1:]] == ["own:"] * 2
    assert records_of("full", tmp_path)["e2e_s"].tolist() == full
    assert records_of("own", tmp_path)["ttft_s"].notna().tolist() == [True, True]
    assert load_manifest(tmp_path / "run").status == "complete"


def test_answers_of_other_code_are_never_mixed(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    second = "    count = 0\n    def begin(self, *lengths):\n        super().begin(*lengths)\n        self.count += 1\n"
    assert asked(tmp_path, model, second + "        assert self.count < 3\n") == 1
    assert records_of("own", tmp_path)["ttft_s"].notna().tolist() == [True, False]
    assert asked(tmp_path, model, second) == 2
    assert "code changed since it was started: method own; --redo own asks again" in capsys.readouterr().err
    assert asked(tmp_path, model, second, redo="own") == 0
    assert "3 requests of 2 methods are asked again" in capsys.readouterr().err
    assert harness.load(tmp_path / "run")["redo"].tolist() == [1] * 4, "times alone: full attention's, too"
    assert asked(tmp_path, model, second, redo="own") == 0 and len(harness.load(tmp_path / "run")) == 4


def test_a_fault_while_checking_options_stops_before_the_model_loads(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "    @classmethod\n    def check(cls, options, shape):\n        options.keep\n"
    assert asked(tmp_path, model, code) == 2
    error = capsys.readouterr().err
    assert error == "harness: method own: check: AttributeError: 'Options' object has no attribute 'keep' (own.py:10)\n"


def test_options_that_are_none_are_one_line(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(tmp_path, model, "    class Options:\n        keep = 1\n") == 2
    words = "harness: method own: AttributeError: type object 'Options' has no attribute 'read'"
    error = capsys.readouterr().err
    assert error.startswith(words) and error.count("\n") == 1


@pytest.mark.parametrize("hook", ["longest_prompt", "fingerprint"])
def test_what_a_task_fails_to_say_before_the_model_loads_is_one_line(
    hook: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked_of_task(tmp_path, SAMPLES + f"    def {hook}(self):\n        return self.nothing\n", scored=False) == 2
    words = f"harness: own: {hook}: AttributeError: 'Own' object has no attribute 'nothing' (owntask.py:12)"
    assert capsys.readouterr().err == words + "\n"


def test_a_device_that_a_method_broke_stops_the_run(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", lost)
    assert asked(tmp_path, model, FAULTS["raises"][0]) == 2
    assert (
        "own: attend, layer 2: ValueError: my own bug (own.py:12); the GPU does no more work" in capsys.readouterr().err
    )
    assert load_manifest(tmp_path / "run").status == "incomplete"


def test_the_kit_names_the_same_place(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(HEAD + FAULTS["raises"][0])
    METHODS.load_file(file)
    (spec,) = parse_methods("own")
    finding = run_check("lengths", Subject(spec, models=[]))
    assert finding.detail == "llama, GQA, prompt of 1: attend, layer 2: ValueError: my own bug (own.py:12)"


def test_an_error_that_no_owner_made_is_told_as_it_is() -> None:
    try:
        raise KeyError("here")
    except KeyError as error:
        assert told(METHODS.get("full"), error).startswith("KeyError: 'here' (test_faults.py:")


TASKS_HEAD = """from tasks.base import Sample, Task

class Own(Task):
    name = "own"
    summary = "with one fault"
    def score(self, sample, prediction):
        return 1.0
"""
SAMPLES = (
    "    def samples(self, tokenizer):\n"
    "        for number in range(3):\n            yield Sample(str(number), 'hello ' * (3 + number), ('x',), 2)\n"
)


def asked_of_task(folder: Path, code: str, tasks: str = "own", scored: bool = True) -> int:
    """Runs the task that is written into a file beside the results; answers of a checkpoint are scored."""
    file = folder / "owntask.py"
    file.write_text(TASKS_HEAD + code)
    model = save_checkpoint(folder / "model") if scored else random_model(folder)
    words = ["--model", model, "--methods", "full", "--tasks", tasks, "--device", "cpu", "--output", folder / "run"]
    return run("run", "--task-file", file, *words)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("float('nan')", "score returned nan; expected 0 to 1, or None"),
        ("100", "score returned 100; expected 0 to 1"),
        ("'right'", "score returned 'right'; expected 0 to 1"),
        ("1 / 0", "score: ZeroDivisionError: division by zero (owntask.py:12)"),
    ],
)
def test_an_answer_without_a_score_is_counted_and_told(
    returned: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score = f"    def score(self, sample, prediction):\n        return {returned} if sample.id == '1' else 1.0\n"
    assert asked_of_task(tmp_path, SAMPLES + score) == 1
    assert f"harness: full on own failed, 1 of 3 requests: not scored: {words}" in capsys.readouterr().err
    records = harness.load(tmp_path / "run").set_index("sample")
    assert records["score"].isna().tolist() == [False, True, False] and records["ttft_s"].notna().all()
    assert records["extra"].tolist()[1]["not_scored"].startswith(words)
    assert "**Not scored** (extra.not_scored of a record says why): full on own: 1 of 3 requests." in (
        (tmp_path / "run" / "table.md").read_text()
    )


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ("'0', 'hello', ('x',), 2, stop=('',)", "own, sample 0: a stop text is empty"),
        ("'0', 'hello', ('x',), 2, extra={'note': '\\ud800'}", "own, sample 0: holds half of a surrogate pair"),
        ("'0', 'hello', ('\\udc00',), 2", "own, sample 0: holds half of a surrogate pair"),
        ("'0', 'hello', ('x',), 2, extra={'note': {1, 2}}", "own, sample 0: holds something that JSON cannot"),
        ("'0', 'hello', ('x',), 2, extra={'a': [math.nan]}", "own, sample 0: holds something that JSON cannot: Out of"),
        (
            "'0', 'hello', ('x',), 2, extra={'failed': False}",
            "own, sample 0: a run writes 'failed' into a record's extra",
        ),
        ("'0', 'hello', ('x',), 2, extra={'needles': 'x'}", "own, sample 0: field 'needles': Input should be"),
        ("'0', 'hello', 'x', 2", "own, sample 0: field 'answers': Input should be a valid tuple"),
        ("'0', 'hello', ('x',), 0", "own, sample 0: max_new_tokens must be at least 1, not 0"),
        ("0, 'hello', ('x',), 2", "own, sample 0: field 'id': Input should be a valid string"),
        ("'0', 'hello', ('x',), 2, choices=('a', '')", "sample 0: the choice '' has no tokens of its own to rate"),
        ("'0', 'hello'", "own: samples: TypeError: Sample.__init__() missing 2 required positional arguments"),
    ],
)
def test_samples_that_cannot_be_asked_stop_the_run_before_its_first_request(
    sample: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = f"    def samples(self, tokenizer):\n        import math\n        yield Sample({sample})\n"
    assert asked_of_task(tmp_path, code, "needle:lengths=192:depths=0.5:repeats=1,own", scored=False) == 2
    loading, error = capsys.readouterr().err.splitlines()
    assert loading.startswith("loading ") and error.startswith(f"harness: {words}")
    assert not (tmp_path / "run").exists()


def test_a_method_that_keeps_more_than_it_asks_for_is_a_warning(tmp_path: Path, model: str) -> None:
    code = "    def tokens_requested(self):\n        return [self.prompt_len // 2] * 6\n"
    assert asked(tmp_path, model, code) == 0
    words = f"Kept more tokens than requested: own on {TASK}: 2 of 2 requests."
    assert f"**{words[:31]}**{words[31:]}" in (tmp_path / "run" / "table.md").read_text()
    assert run("report", tmp_path / "run") == 0
    assert words in (tmp_path / "run" / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    ("error", "has_run_out"),
    [
        (torch.OutOfMemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_what_says_that_memory_has_run_out(error: Exception, has_run_out: bool) -> None:
    assert ran_out(error) is has_run_out
    later = RuntimeError("capture")
    later.__context__ = error
    assert ran_out(later) is has_run_out
