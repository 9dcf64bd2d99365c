"""Processes of this machine: the same records as in one process, and nothing lost or doubled whatever dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from harness.errors import InputError
from harness.executors.executor import Event
from harness.executors.fleet import Fleet
from harness.executors.local import LocalExecutor, local_executor
from harness.measuring import provenance
from harness.storage.store import load_manifest
from tests.command import run
from tests.executors.runs import comparable, expected, keys, light_run, rows, settle, start_light
from tests.test_cli import random_model

LOCAL = Fleet("local", workers=2)
TASKS = "needle:lengths=192:depths=0.5:repeats=4:new_tokens=4"


@pytest.mark.cluster
def test_two_workers_give_the_records_of_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    asked = ["run", "--methods", "full,slim,lazyllm", "--tasks", TASKS, "--device", "cpu"]
    asked += ["--model", random_model(tmp_path)]
    assert run(*asked, "--output", one) == 0
    capsys.readouterr()
    assert run(*asked, "--output", two, "--executor", "local", "--workers", 2) == 0
    assert comparable(two) == comparable(one) and len(comparable(one)) == 12
    alone, shared = load_manifest(one), load_manifest(two)
    assert (alone.run_hash, alone.facts, alone.device) == (shared.run_hash, shared.facts, shared.device)
    by_sample: dict[str, set[int]] = {}
    for row in rows(two):
        by_sample.setdefault(row["sample"], set()).add(row["worker"]["process"])
    processes = set.union(*by_sample.values())
    assert all(len(of_sample) == 1 for of_sample in by_sample.values()) and len(processes) == 2
    assert os.getpid() not in processes and {row["worker"]["process"] for row in rows(one)} == {os.getpid()}
    assert {row["worker"]["host"] for row in rows(two)} == {shared.environments[0]["host"]}
    said = capsys.readouterr().err
    assert "units 2/2" in said and "12/12" in said


def test_all_is_asked_once_and_a_second_time_nothing(tmp_path: Path) -> None:
    settle(tmp_path, 40)
    assert light_run(tmp_path, LOCAL) == []
    assert keys(tmp_path / "run") == expected(40) and load_manifest(tmp_path / "run").status == "complete"
    assert light_run(tmp_path, LOCAL) == []
    assert len((tmp_path / "asked").read_text().splitlines()) == 80


def test_more_samples_are_asked_behind_those_that_are_there(tmp_path: Path) -> None:
    settle(tmp_path, 4)
    light_run(tmp_path, LOCAL)
    settle(tmp_path, 10)
    light_run(tmp_path, LOCAL)
    assert keys(tmp_path / "run") == expected(10) and len((tmp_path / "asked").read_text().splitlines()) == 20


@pytest.mark.slow
def test_workers_that_are_killed_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settle(tmp_path, 20)
    for sample in (0, 7, 19):
        (tmp_path / f"die-{sample}").touch()
    assert light_run(tmp_path, LOCAL) == []
    assert keys(tmp_path / "run") == expected(20)
    # What was answered ahead of a death is not asked again.
    assert len((tmp_path / "asked").read_text().splitlines()) == 40
    assert capsys.readouterr().err.count("its worker died: killed by SIGKILL; it starts again") == 3


@pytest.mark.slow
def test_a_unit_whose_workers_die_three_times_is_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settle(tmp_path, 6)
    one = Fleet("local", workers=1)
    for sample in (2, 3, 4):
        (tmp_path / f"die-{sample}").touch()
    lines = light_run(tmp_path, one)
    assert lines == ["4 requests have no answer: its worker died: killed by SIGKILL"]
    assert keys(tmp_path / "run") == expected(4)
    ended = load_manifest(tmp_path / "run")
    assert (ended.status, ended.reasons) == ("incomplete", lines)
    assert "it is given up" in capsys.readouterr().err
    assert light_run(tmp_path, one) == [] and keys(tmp_path / "run") == expected(6)


def test_what_a_worker_left_out_is_asked_again_and_nothing_where_all_was_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settle(tmp_path, 20)
    for name in ("leave-3", "late-19"):
        (tmp_path / name).touch()
    assert light_run(tmp_path, LOCAL) == [] and keys(tmp_path / "run") == expected(20)
    assert capsys.readouterr().err.count("its worker left requests out; it starts again") == 1
    assert not (tmp_path / "late-19").exists() and len((tmp_path / "asked").read_text().splitlines()) == 40


def test_a_disk_that_is_full_costs_a_unit_a_new_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settle(tmp_path, 20)
    (tmp_path / "full-5").touch()
    assert light_run(tmp_path, LOCAL) == []
    assert keys(tmp_path / "run") == expected(20)
    assert "No space left on device; it starts again" in capsys.readouterr().err


def test_a_worker_with_other_packages_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, 6)
    monkeypatch.setenv("LIGHT_HOST", "node7")
    lines = with_other_packages_behind_the_survey(tmp_path)
    reason = "node7 is refused: torch is 2 there, and 1 where the run began"
    assert lines == [f"12 requests have no answer: {reason}"] and not keys(tmp_path / "run")


def with_other_packages_behind_the_survey(folder: Path) -> list[str]:
    """Who says what there is to ask has one version, who is to answer another."""
    original = LocalExecutor.start

    def changed(self: LocalExecutor, number: int, order: bytes) -> None:
        if number:
            (folder / "other-node7").touch()
        original(self, number, order)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalExecutor, "start", changed)
        return light_run(folder, Fleet("local", workers=1))


def test_a_record_that_comes_twice_is_taken_once(tmp_path: Path) -> None:
    settle(tmp_path, 3)
    with pytest.MonkeyPatch.context() as patch:
        original = LocalExecutor.next
        seen: list[Event] = []

        def twice(self: LocalExecutor) -> Event:
            if seen and seen[-1].message is not None and b'"record"' in seen[-1].message:
                return seen.pop()
            seen.append(original(self))
            return seen[-1]

        patch.setattr(LocalExecutor, "next", twice)
        assert light_run(tmp_path, Fleet("local", workers=1)) == []
    assert keys(tmp_path / "run") == expected(3)


@pytest.mark.slow
def test_workers_end_with_their_driver(tmp_path: Path) -> None:
    settle(tmp_path, 6, seconds=0.5)
    driver = start_light(tmp_path, LOCAL)
    while not (tmp_path / "asked").exists():
        assert driver.is_alive()
        time.sleep(0.01)
    driver.kill()
    driver.join()
    time.sleep(1.0)
    before = (tmp_path / "asked").read_text()
    time.sleep(1.5)
    assert (tmp_path / "asked").read_text() == before
    settle(tmp_path, 6)
    assert light_run(tmp_path, LOCAL) == [] and keys(tmp_path / "run") == expected(6)


def test_ctrl_c_ends_workers_and_leaves_a_valid_folder(tmp_path: Path) -> None:
    settle(tmp_path, 400, seconds=0.3)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def interrupt() -> None:
        while not (tmp_path / "run/samples.jsonl").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        light_run(tmp_path, Fleet("local", workers=1))
    assert load_manifest(tmp_path / "run").reasons == ["interrupted"]


def test_each_process_sees_a_gpu_of_its_own() -> None:
    seen: dict[int, str] = {}
    with closing(LocalExecutor("tests.executors.light:card", "cuda", ["GPU-a", "GPU-b"])) as executor:
        for numbers in ((0, 1), (2, 3)):
            for number in numbers:
                executor.start(number, b"{}")
            ended = 0
            while ended < 2:
                event = executor.next()
                assert not event.death
                if event.message is None:
                    ended += 1
                else:
                    seen[event.number] = event.message.decode()
    assert {seen[0], seen[1]} == {seen[2], seen[3]} == {"GPU-a", "GPU-b"}


class TestPlaces:
    """Which GPUs get a worker."""

    def cards(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        found = [{"name": name, "uuid": f"GPU-{number}"} for number, name in enumerate(names)]
        monkeypatch.setattr("harness.executors.local.gpus", lambda: found)

    def places(self, *, alone: bool = False, workers: int | None = None, accelerator: str | None = None) -> list[str]:
        executor = local_executor("a:b", "cuda", alone=alone, workers=workers, accelerator=accelerator)
        return [place.environment["CUDA_VISIBLE_DEVICES"] for place in executor._free]

    def test_every_visible_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cards(monkeypatch, "H200", "H200")
        assert self.places() == ["GPU-0", "GPU-1"]

    def test_timed_requests_have_the_machine_to_themselves_unless_told_otherwise(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.cards(monkeypatch, "H200", "H200")
        assert self.places(alone=True) == ["GPU-0"] and self.places(alone=True, workers=2) == ["GPU-0", "GPU-1"]
        note = local_executor("a:b", "cuda", alone=True, workers=None, accelerator=None).note
        assert "--workers 2" in note and "--no-timing" in note

    def test_gpus_of_one_kind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cards(monkeypatch, "NVIDIA H200", "NVIDIA A100", "NVIDIA H200")
        with pytest.raises(InputError, match="2 kinds: NVIDIA A100, NVIDIA H200; choose one with --accelerator"):
            self.places()
        assert self.places(accelerator="h200") == ["GPU-0", "GPU-2"]
        with pytest.raises(InputError, match="called B200"):
            self.places(accelerator="B200")
        with pytest.raises(InputError, match="--workers: 3 are more than the 2"):
            self.places(accelerator="h200", workers=3)


def test_workers_share_the_threads_unless_somebody_said_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.executors.local.usable_cpus", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert (
        LocalExecutor("a:b", "cpu", [None] * 2).threads == 4 and LocalExecutor("a:b", "cuda", ["GPU-a"]).threads is None
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert LocalExecutor("a:b", "cpu", [None] * 2).threads is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--workers", "2"], "--workers needs --executor local|ray"),
        (["--executor", "local", "--ray-address", "auto"], "--ray-address needs --executor ray"),
        (["--executor", "slurm"], "unknown executor 'slurm'; known: local, ray"),
        (["--no-timing", "--parts"], "--timing: --parts are parts of a time (got False)"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("run", *options) == 2
    assert capsys.readouterr().err == f"harness: {reason}\n"


def test_a_host_is_recorded_without_its_name() -> None:
    import platform

    assert platform.node() not in str(provenance.environment()) + str(provenance.worker("cpu"))
