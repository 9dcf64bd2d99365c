"""A Ray cluster of several machines, all of them here: the same records, and nothing lost or doubled whatever dies."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from harness.errors import InputError
from harness.executors import cluster as executor_module
from harness.executors.cluster import TIMING, ray_module
from harness.executors.fleet import Fleet
from harness.storage.store import load_manifest
from tests.command import run
from tests.executors.runs import comparable, expected, keys, light_run, rows, settle, start_light
from tests.test_cli import random_model

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'harness[ray]'"),
]

NODE = {"num_cpus": 1, "resources": {TIMING: 1}, "object_store_memory": 80 * 2**20}


class Machines:
    """A cluster whose head carries out nothing; each other machine has a name."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 * 2**20},
        )
        self.nodes: dict[str, Any] = {}

    def join(self, name: str) -> None:
        self.nodes[name] = self.cluster.add_node(**NODE, env_vars={"LIGHT_HOST": name})

    def leave(self, name: str) -> None:
        self.cluster.remove_node(self.nodes.pop(name), allow_graceful=False)

    @property
    def fleet(self) -> Fleet:
        return Fleet("ray", address=self.cluster.address)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray = ray_module()
        made = Machines()
        for name in ("one", "two"):
            made.join(name)
        yield made
        ray.shutdown()
        made.cluster.shutdown()


def hosts(folder: Path) -> Counter[str]:
    """How many requests each machine carried out."""
    return Counter(line.split()[2] for line in (folder / "asked").read_text().splitlines())


def test_all_is_asked_once(machines: Machines, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settle(tmp_path, 16, seconds=0.1)
    assert light_run(tmp_path, machines.fleet) == []
    assert keys(tmp_path / "run") == expected(16) and hosts(tmp_path).total() == 32
    assert set(hosts(tmp_path)) == {"one", "two"} == {row["worker"]["host"] for row in rows(tmp_path / "run")}
    assert "runs on one" in (said := capsys.readouterr().err) and "units 2/2" in said
    assert light_run(tmp_path, machines.fleet) == [] and hosts(tmp_path).total() == 32


def test_workers_that_are_killed_lose_nothing(machines: Machines, tmp_path: Path) -> None:
    settle(tmp_path, 20)
    for sample in (0, 7, 19):
        (tmp_path / f"die-{sample}").touch()
    assert light_run(tmp_path, machines.fleet) == []
    assert keys(tmp_path / "run") == expected(20)


def test_a_machine_whose_disk_is_full_is_left_out(machines: Machines, tmp_path: Path) -> None:
    settle(tmp_path, 20, seconds=0.1)
    (tmp_path / "full-5").touch()
    assert light_run(tmp_path, machines.fleet) == []
    assert keys(tmp_path / "run") == expected(20)


def test_a_machine_with_other_packages_is_refused_and_the_others_go_on(
    machines: Machines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settle(tmp_path, 24, seconds=0.1)
    (tmp_path / "other-two").touch()
    assert light_run(tmp_path, machines.fleet) == []
    assert keys(tmp_path / "run") == expected(24)
    # Whoever begins sets the terms.
    (begun,) = hosts(tmp_path)
    refused = {"one": "two is refused: torch is 2 there, and 1", "two": "one is refused: torch is 1 there, and 2"}
    assert f"{refused[begun]} where the run began; it starts again" in capsys.readouterr().err


def test_a_machine_that_leaves_and_one_that_joins(machines: Machines, tmp_path: Path) -> None:
    settle(tmp_path, 20, seconds=0.2)
    driver = start_light(tmp_path, machines.fleet)
    while not (tmp_path / "asked").exists() or len(hosts(tmp_path)) < 2:
        assert driver.is_alive()
        time.sleep(0.05)
    machines.leave("two")
    machines.join("three")
    driver.join(300)
    assert driver.exitcode == 0 and keys(tmp_path / "run") == expected(20)
    assert load_manifest(tmp_path / "run").status == "complete"


def test_a_driver_that_is_killed_takes_its_workers_along(machines: Machines, tmp_path: Path) -> None:
    settle(tmp_path, 12, seconds=0.5)
    driver = start_light(tmp_path, machines.fleet)
    while not (tmp_path / "asked").exists():
        assert driver.is_alive()
        time.sleep(0.05)
    driver.kill()
    driver.join()
    time.sleep(5)
    before = hosts(tmp_path)
    time.sleep(2)
    assert hosts(tmp_path) == before
    settle(tmp_path, 12)
    assert light_run(tmp_path, machines.fleet) == [] and keys(tmp_path / "run") == expected(12)


def test_the_records_are_those_of_one_process(machines: Machines, tmp_path: Path) -> None:
    asked = ["run", "--methods", "full,slim,lazyllm", "--device", "cpu", "--model", random_model(tmp_path)]
    asked += ["--tasks", "needle:lengths=192:depths=0.5:repeats=4:new_tokens=4"]
    assert run(*asked, "--output", tmp_path / "one") == 0
    address = ["--executor", "ray", "--ray-address", machines.cluster.address]
    assert run(*asked, "--output", tmp_path / "ray", *address) == 0
    assert comparable(tmp_path / "ray") == comparable(tmp_path / "one") and len(comparable(tmp_path / "one")) == 12
    alone, shared = load_manifest(tmp_path / "one"), load_manifest(tmp_path / "ray")
    assert (alone.run_hash, alone.facts) == (shared.run_hash, shared.facts)


def test_timed_requests_need_machines_that_they_can_have_alone(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(tmp_path, 2)
    monkeypatch.setattr(executor_module, "TIMING", "nothing")
    with pytest.raises(InputError, match="start Ray with --resources=.*or measure no times with --no-timing"):
        light_run(tmp_path, machines.fleet)


def test_a_cluster_without_machines_ends_the_run(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(tmp_path, 4)
    monkeypatch.setattr(executor_module, "PATIENCE_S", 0.0)
    monkeypatch.setattr(executor_module, "_POLL_S", 0.2)
    monkeypatch.setattr(executor_module.RayExecutor, "_places", lambda self: [] if self._running else self._alive())
    monkeypatch.setattr(executor_module.RayExecutor, "_needs", lambda self: {"num_cpus": 7})
    with pytest.raises(InputError, match="the cluster has had no machine for this run for 0 s"):
        light_run(tmp_path, machines.fleet)
