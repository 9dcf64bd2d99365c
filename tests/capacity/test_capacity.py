"""`harness capacity` on a CPU whose caches may take so many bytes: what fits, what is known, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.capacity import fill, found
from harness.capacity.accuracy import Accuracy, Judged
from harness.capacity.held import Capacity, Held
from harness.capacity.page import accuracy_figure
from harness.engine.batch import Batch
from harness.engine.cache import LayerCache
from tests.command import run
from tests.report.test_report import record
from tests.report.test_report import write as write_run
from tests.test_cli import random_model

pytestmark = pytest.mark.slow

TOKEN = 6 * 2 * 2 * 16 * 4
"""Bytes of a token's keys and values: 6 layers, 2 KV heads, 16 channels, float32."""
FULL = (128 + 8) * TOKEN
METHODS = "full,snapkv:budget=64:window=8,adakv:budget=64:window=8"


class Scarce:
    """Memory of which only keys and values take any; what they lack is refused as PyTorch refuses it."""

    def __init__(self, size: int, patch: pytest.MonkeyPatch) -> None:
        self.size, self._caches, self._peak = size, WeakSet[LayerCache](), 0
        reserve = LayerCache._reserve

        def scarce(cache: LayerCache, *args: Any) -> None:
            reserve(cache, *args)
            self._caches.add(cache)
            self._peak = max(self._peak, self.allocated())
            if self.allocated() > self.size:
                cache.reset()
                raise torch.OutOfMemoryError

        patch.setattr(LayerCache, "_reserve", scarce)
        patch.setattr(found, "can_be_full", lambda device: True)
        patch.setattr(found, "memory_of", lambda device, limit: self)

    def allocated(self) -> int:
        return sum(cache.nbytes for cache in self._caches)

    def peak(self) -> int:
        return self._peak

    def restart(self) -> None:
        self._peak = self.allocated()


def capacity(folder: Path, *more: object, methods: str = METHODS) -> int:
    asked = ("--model", random_model(folder), "--length", 128, "--new-tokens", 8, "--output", folder / "out")
    return run("capacity", "--methods", methods, *asked, *more)


def held(folder: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((folder / "out" / "capacity.json").read_text())
    return {one["method"]: one for one in found["methods"]}


def test_as_many_as_fit_are_held_and_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = Scarce(int(5.5 * FULL), monkeypatch)
    assert capacity(tmp_path) == 0
    full, snapkv, adakv = held(tmp_path).values()
    assert (full["batch"], full["predicted"], full["kv_bytes"], full["kept"]) == (5, 5, FULL, 1)
    assert snapkv["batch"] == snapkv["predicted"] == int(5.5 * FULL / (72 * TOKEN))
    assert snapkv["kept"] == 0.5 and adakv["batch"] == snapkv["batch"]
    for one in (full, snapkv, adakv):
        assert one["bound"] == "memory" and one["peak_bytes"] <= 5.5 * FULL + FULL
        assert one["tokens_per_s"] == pytest.approx(one["batch"] / one["step_s"]) and one["ttft_s"] > 0
        assert one["floor_s"] > 0
    assert memory.allocated() == 0
    printed = capsys.readouterr()
    assert "| `full` | 100 %" in printed.out and "full: 5 requests" in printed.err
    assert (tmp_path / "out" / "capacity.svg").is_file()
    rows = (tmp_path / "out" / "capacity.csv").read_text().splitlines()
    assert len(rows) == 4


@pytest.mark.slow
def test_the_same_command_finds_out_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Scarce(int(3.5 * FULL), monkeypatch)
    assert capacity(tmp_path, methods="full") == 0
    before = held(tmp_path)
    monkeypatch.setattr(found, "hold", lambda *_: pytest.fail("is known"))
    assert capacity(tmp_path, methods="full") == 0 and held(tmp_path) == before
    monkeypatch.undo()
    Scarce(int(3.5 * FULL), monkeypatch)
    assert capacity(tmp_path, "--json", methods="snapkv:budget=64:window=8,full") == 0
    after = held(tmp_path)
    assert after["full"] == before["full"] and len(after) == 2
    printed = capsys.readouterr()
    assert "full: 3" in printed.err and json.loads(printed.out[printed.out.index("{") :])["length"] == 128
    Scarce(int(2.5 * FULL), monkeypatch)
    assert capacity(tmp_path, methods="full") == 2 and "something else" in capsys.readouterr().err


@pytest.mark.slow
def test_more_is_tried_only_where_more_might_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Scarce(int(3.5 * FULL), monkeypatch)
    tried: list[str] = []
    hold = fill.hold

    def noted(demand: fill.Demand, spec: Any, key: str) -> Any:
        tried.append(spec.label)
        return hold(demand, spec, key)

    monkeypatch.setattr(found, "hold", noted)
    for most, full, snapkv in ((4, 3, 4), (5, 3, 5), (20, 3, 6), (30, 3, 6)):
        assert capacity(tmp_path, "--most", most, methods="full,snapkv:budget=64:window=8") == 0
        found_now = held(tmp_path)
        assert found_now["full"]["batch"] == full and found_now["full"]["bound"] == "memory"
        one = found_now["snapkv:budget=64:window=8"]
        assert one["batch"] == snapkv and one["bound"] == ("memory" if most > 6 else "most")
    assert tried == ["full", *["snapkv:budget=64:window=8"] * 3]


def test_what_can_be_prefilled_but_not_decoded_is_one_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Scarce(int(5.5 * FULL), monkeypatch)
    steps, sizes = Batch.steps, []

    def scarce(batch: Batch) -> Any:
        sizes.append(len(batch.slots))
        if len(batch.slots) > 4:
            raise torch.OutOfMemoryError
        if len(batch.slots) > 3:
            try:
                raise torch.OutOfMemoryError
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        return steps(batch)

    monkeypatch.setattr(Batch, "steps", scarce)
    assert capacity(tmp_path, methods="full") == 0
    assert sizes == [5, 4, 3]
    (full,) = held(tmp_path).values()
    assert full["batch"] == 3 and full["bound"] == "memory" and full["tokens_per_s"] > 0


def test_not_even_one_may_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Scarce(int(0.6 * FULL), monkeypatch)
    assert capacity(tmp_path) == 0
    full, snapkv, _ = held(tmp_path).values()
    assert full["batch"] == 0 and full["tokens_per_s"] is None and snapkv["batch"] == 1
    page = (tmp_path / "out" / "capacity.md").read_text()
    assert "| `full` |" in page and "nan" not in page


BOOM = '''
from harness.engine.method import Method


class Boom(Method):
    """Fails in decode."""

    name = summary = "boom"

    def attend(self, layer, heads, step):
        if step.phase == "decode":
            raise ValueError("my own bug")
        return super().attend(layer, heads, step)
'''


@pytest.mark.usefixtures("forget_methods")
def test_a_method_that_fails_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = Scarce(int(2.5 * FULL), monkeypatch)
    (tmp_path / "boom.py").write_text(BOOM)
    asked = ("--method-file", tmp_path / "boom.py")
    for _ in range(2):
        assert capacity(tmp_path, *asked, methods="boom,full") == 0
        assert "boom: failed in attend, layer 0: ValueError: my own bug (boom.py" in capsys.readouterr().err
    assert held(tmp_path)["full"]["batch"] == 2 and memory.allocated() == 0


def test_requests_have_texts_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Scarce(int(3.5 * FULL), monkeypatch)
    prompts: list[Tensor] = []
    add = Batch.add

    def noted(batch: Batch, request: Any, room: int) -> Any:
        prompts.append(request.prompt)
        return add(batch, request, room)

    monkeypatch.setattr(Batch, "add", noted)
    assert capacity(tmp_path, methods="full") == 0
    assert len(prompts) == 4 and {len(prompt) for prompt in prompts} == {128}
    assert len({tuple(prompt.tolist()) for prompt in prompts}) == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "needs a CUDA device"),
        (("--methods", "nothing"), "needs a CUDA device"),
    ],
)
def test_a_cpu_is_refused(
    tmp_path: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert capacity(tmp_path, "--device", "cpu", *more) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("methods", "message"),
    [("lazyllm", "revive=false"), ("nothing", "unknown method"), ("h2o:budget=0", "budget")],
)
def test_bad_input_is_one_line_before_a_model_loads(
    tmp_path: Path, methods: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(found, "can_be_full", lambda device: True)
    monkeypatch.setattr(found, "load_run", lambda plan: pytest.fail("a model is loaded"))
    assert capacity(tmp_path, methods=methods) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_throughput_stands_beside_what_a_run_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Scarce(int(3.5 * FULL), monkeypatch)
    assert capacity(tmp_path, methods="full,snapkv:budget=64:window=8") == 0
    scores = {"full": 1.0, "snapkv:budget=64:window=8": 0.0, "knorm": 1.0}
    records = [
        record(method, "needle", number, score=score if number % 2 else 1.0)
        for method, score in scores.items()
        for number in range(12)
    ]
    write_run(tmp_path / "run", records, tasks=["needle"])
    capsys.readouterr()
    asked = ("capacity", "--redraw", "--output", tmp_path / "out", "--accuracy")
    assert run(*asked, tmp_path / "run") == 0
    page = capsys.readouterr().out
    assert "paired difference from full" in page and "`run`" in page and "knorm" not in page
    full, snapkv = (line for line in page.splitlines() if line.startswith("| `"))
    assert full.endswith("| 100.0 % | - |") and "| 50.0 % | -50.0 [-" in snapkv
    assert (tmp_path / "out" / "capacity-accuracy.svg").is_file()
    assert run(*asked, tmp_path / "out") == 2 and "out" in capsys.readouterr().err
    assert run("capacity", "--redraw", "--output", tmp_path) == 2 and "capacity.json" in capsys.readouterr().err


def test_the_line_joins_whom_nobody_beats_in_both() -> None:
    rates = {"full": 10.0, "a": 20.0, "b": 40.0, "c": 30.0, "unknown": 50.0}
    held = [Held(key=name, method=name, batch=1, bound="memory", tokens_per_s=rate) for name, rate in rates.items()]
    found = Capacity(model="m", length=8, new_tokens=3, asked={}, memory_bytes=1, environment={}, methods=held)
    scores = {"full": 90.0, "a": 95.0, "b": 60.0, "c": 50.0}
    methods = {name: Accuracy(score, score - 90, score - 92, score - 88) for name, score in scores.items()}
    figure = accuracy_figure(found, held, Judged("a run", methods))
    assert figure is not None
    (line,) = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert np.asarray(line.get_xydata()).tolist() == [[40, 60], [20, 95]]
    bars = [np.asarray(line.get_ydata()).tolist() for line in figure.axes[0].lines if line.get_linestyle() == "-"]
    assert bars == [[score - 2, score + 2] for score in scores.values()]
    assert accuracy_figure(found, held, Judged("a run", {})) is None
