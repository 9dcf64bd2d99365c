"""`--tensor-parallel`: processes that share a model, the records they make together, and what ends them."""

from __future__ import annotations

import copy
import gc
import multiprocessing
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch

import harness
from harness.engine import parallel
from harness.engine.engine import Engine
from harness.engine.parallel import ALONE, RankGroup, Ranks, meeting_place
from harness.engine.request import Request
from harness.errors import InputError
from harness.runner.plan import plan
from harness.runner.spec import RunSpec
from harness.runner.team import FOLLOW, _of_one_kind
from harness.storage.store import load_manifest
from tests.checkpoint import save_checkpoint
from tests.executors.conftest import forked_workers as forked_workers
from tests.test_cli import random_model
from tests.tiny import build, random_ids, tiny_model, tiny_shape

METHODS = "full,slim:layers=2/4:budgets=128/96:block=16:score=token_peak,lazyllm,adakv:budget=64,quest:budget=64"
TASK = "needle:lengths=256:depths=0.5:repeats=1:new_tokens=4"
DEVICE = "cuda" if torch.cuda.device_count() > 1 else "cpu"
ALIKE = ["method", "sample", "new_tokens", "tokens_requested", "tokens_kept", "kv_bytes", "prefill_flops"]
"""What the whole model's records say, however many devices it is on."""

FAILING = '''
import os, signal
from pathlib import Path

from harness.engine import parallel
from harness.engine.method import Method

parallel.TOGETHER = 2.0


class Failing(Method):
    """Full attention that ends, request by request, as the file says: "all,one,kill"."""

    name, summary, parallel = "failing", "ends", True
    asked = -1

    def begin(self, prompt_len, max_new_tokens):
        super().begin(prompt_len, max_new_tokens)
        self.asked += prompt_len > 1

    def attend(self, layer, heads, step):
        how = Path({path!r}).read_text().split(",")[self.asked]
        if layer == 3 and (how == "all" or self.model.ranks.rank == 1):
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("my own bug")
        return super().attend(layer, heads, step)
'''


def run(model: str, folder: Path, **more: Any) -> pd.DataFrame:
    asked: dict[str, Any] = {"tasks": TASK, "device": DEVICE, "dtype": "float32", "progress": False}
    return harness.run(model=model, output=folder, **asked | more)


def others() -> list[str | BaseProcess]:
    """Ranks that this process has started and that are still there, fresh or forked."""
    lines = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    return [*(line for line in lines if line.endswith(FOLLOW)), *multiprocessing.active_children()]


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.cluster)])
def test_records_are_those_of_one_device_but_for_times(
    fresh: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not fresh:
        request.getfixturevalue("forked_workers")
    model = save_checkpoint(tmp_path / "model")
    alone, spread = (run(model, tmp_path / str(size), methods=METHODS, tensor_parallel=size) for size in (1, 2))
    assert spread[ALIKE].equals(alone[ALIKE]) and spread["prediction"].equals(alone["prediction"])
    assert not set(spread["cell"]) & set(alone["cell"])
    for one, other in zip(spread["extra"], alone["extra"], strict=True):
        assert {name: one[name] for name in other} == other
    assert (spread["ttft_s"] > 0).all() and (spread["decode_floor_s"] < alone["decode_floor_s"]).all()
    assert all(who["ranks"] == 2 for who in spread["worker"])
    assert load_manifest(tmp_path / "2").spec["tensor_parallel"] == 2
    assert not others()


@pytest.mark.cluster
@pytest.mark.usefixtures("forget_methods", "forked_workers")
def test_a_rank_that_ends_ends_the_run_in_a_line_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "TOGETHER", 2.0)
    model, how, file = random_model(tmp_path), tmp_path / "how", tmp_path / "failing.py"
    shape = tmp_path / "config.json"
    shape.write_text(shape.read_text().replace("49152", "300"))  # a tokenizer of bytes
    file.write_text(FAILING.format(path=str(how)))
    asked: dict[str, Any] = {"methods": "full,failing", "method_file": file, "tensor_parallel": 2, "timing": False}
    asked["tasks"] = TASK.replace("repeats=1", "repeats=2")
    # First both ranks fail, which is a failed request; then one of them; and, when it goes on, one is killed.
    for ends, words in (("all,one", "ValueError: my own bug"), ("kill", "rank 1 of 2: it was killed by SIGKILL")):
        how.write_text(ends)
        with pytest.raises(InputError, match=words) as told:
            run(model, tmp_path / "run", **asked)
        assert "\n" not in str(told.value) and not others()
        assert load_manifest(tmp_path / "run").status == "incomplete"
        assert list(harness.load(tmp_path / "run")["method"]) == ["full", "failing"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"tensor_parallel": 4}, "the 2 key/value heads of random:.* do not share out among 4"),
        ({"methods": "full,retrieval"}, "retrieval has not been shown to choose alike"),
        ({"methods": "full", "batch": 2}, "--batch: .* not with --tensor-parallel"),
        ({"methods": "full", "tasks": "speed:rate=2"}, "--tensor-parallel: requests that arrive at a rate"),
        ({"ledger": True}, "--ledger: .* not with --tensor-parallel"),
    ],
)
def test_what_cannot_be_spread_is_refused_in_a_line(asked: dict[str, Any], words: str, tmp_path: Path) -> None:
    spec = {"model": random_model(tmp_path), "tasks": TASK, "device": "cpu", "tensor_parallel": 2}
    with pytest.raises(InputError, match=words) as told:
        plan(RunSpec.read(spec | asked))
    assert "\n" not in str(told.value)


def test_executors_and_devices_that_are_not_there_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = RunSpec.read({"model": random_model(tmp_path), "tasks": TASK, "tensor_parallel": 2})
    with pytest.raises(InputError, match="not with --executor"):
        plan(spec, elsewhere=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("harness.runner.plan.limit_memory", lambda *_: None)
    with pytest.raises(InputError, match="2 devices were asked for, 1 visible"):
        plan(spec)


def test_devices_of_several_kinds_are_refused() -> None:
    alike = [{"device": "H200"}, {"device": "H200"}]
    assert _of_one_kind(alike) == alike
    with pytest.raises(InputError, match="the first 2 visible devices are A100 and H200"):
        _of_one_kind([{"device": "H200"}, {"device": "A100"}])


def test_a_run_on_one_device_is_the_run_that_it_was() -> None:
    assert "tensor_parallel" not in RunSpec().identity()
    assert RunSpec(tensor_parallel=2).identity()["tensor_parallel"] == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs a GPU")
def test_sums_over_ranks_are_recorded() -> None:
    """A group of one: its sums change nothing, but they are there when a step is captured."""
    ranks = RankGroup(0, 1, meeting_place(1), "cpu:gloo,cuda:nccl")
    try:
        found = recorded(ranks)
        gc.collect()  # graphs with sums in them
    finally:
        ranks.close()
    assert found == recorded(ALONE)


def recorded(ranks: Ranks) -> list[int]:
    """Tokens of steps that are CUDA graphs."""
    engine = Engine(copy.deepcopy(tiny_model()).bfloat16().cuda(), tiny_shape(), kind="graphed", ranks=ranks)
    stream = engine.stream(build("full", engine), Request(random_ids(100).cuda(), 8))
    tokens = list(stream)
    assert stream.work.recorded is not None and stream.work.captures
    return tokens
