"""Processes of a Ray cluster: one that runs already, or one of this machine alone that is started here.

Each order is a task, and Ray's workers live on: a worker has a `Place` of its machine, where each order has a fresh
process, whose memory and CUDA context end with it. A place ends with its worker. Messages are a stream of the task, a
few kilobytes each: nothing is put into Ray's object store. Ray itself retries nothing: it would carry out the whole
order again, while who gave it knows what is missing and gives out an order for that.

An order takes its share of the resource `timing`, of which each machine has 1: all of it where it is to be alone.
"""

from __future__ import annotations

import os
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from harness.errors import InputError
from harness.executors.executor import Event
from harness.executors.place import Place

TIMING = "timing"
_KIND = "accelerator_type:"
_NODE_ID = "ray.io/node-id"
PATIENCE_S = 120.0
"""Seconds that a cluster may be without any machine that could go on."""
_POLL_S = 5.0
_OF_THE_TASK = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
"""Variables that Ray sets for each task."""
_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_worker_niceness": "0"}
_OBJECT_STORE_BYTES = 100 * 2**20


def ray_module() -> Any:
    """Ray, which sends no usage statistics; workers of a cluster that it starts compute at the priority of any process.

    Raises:
        InputError: it is not installed.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise InputError("--executor ray needs Ray: pip install 'harness[ray]'") from None
    return ray


def connect(address: str | None, workers: int | None) -> Any:
    """Joins a cluster, or starts one of this machine; one that was joined or started before is kept.

    Args:
        address: of a cluster, "auto" or "HOST:PORT"; None starts one.
        workers: CPUs of the one that is started, if it is to have fewer or more than there are.

    Raises:
        InputError: there is no cluster at the address.
    """
    ray = ray_module()
    if ray.is_initialized():
        return ray
    # What can be imported here can be imported by processes that are started here.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    here = {
        "num_cpus": workers,
        "resources": {TIMING: 1},
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    try:
        ray.init(address=address or "local", logging_level="ERROR", **({} if address else here))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"--ray-address {address}: no Ray cluster answers: {error}") from None
    return ray


class RayExecutor:
    """An `Executor` on a cluster that `connect` has joined."""

    threads: int | None = None  # Ray tells processes how many, by the CPUs that they take
    note = ""

    def __init__(
        self, answer: str, device: str, *, alone: bool, workers: int | None, accelerator: str | None, ray: Any
    ) -> None:
        """
        Args:
            answer: `package.module:function`, which every machine can import.
            device: "auto", "cpu" or "cuda".
            alone: an order shares its machine with no other, unless `workers` says so.
            workers: orders a machine at a time, if not one a GPU, or one on a CPU.
            accelerator: Ray's name of the GPUs' kind, where the cluster has several.
            ray: the module.

        Raises:
            InputError: the cluster has no such machine, GPUs of several kinds, or no resource `timing`.
        """
        self._ray, self._answer, self._workers, self._alone = ray, answer, workers, alone
        self.device = "cuda" if device != "cpu" and any(_has(node, "GPU") for node in self._alive()) else "cpu"
        if device == "cuda" != self.device:
            raise InputError("device cuda was asked for, but no machine of the cluster has a GPU")
        self._kind = self._pinned(accelerator) if self.device == "cuda" else None
        self._avoided: set[str] = set()
        once = ray.remote(num_returns="streaming", max_retries=0, retry_exceptions=False)
        self._task: Any = once(_carry_out)
        self._running: dict[Any, int] = {}
        self._nodes: dict[int, str] = {}
        self._waiting_since: float | None = None
        if alone and not any(_has(node, TIMING) for node in self._places()):
            raise InputError(
                "timed requests need machines to themselves, and no machine of the cluster offers the resource "
                f"'{TIMING}': start Ray with --resources='{{\"{TIMING}\": 1}}', or measure no times with --no-timing"
            )

    def slots(self) -> int:
        """See `Executor`."""
        return sum(map(self._units, self._places()))

    def start(self, number: int, order: bytes) -> None:
        """See `Executor`."""
        self._nodes.pop(number, None)
        task = self._task.options(**self._needs())
        self._running[task.remote(self._answer, zlib.compress(order))] = number

    def next(self) -> Event:
        """See `Executor`."""
        while True:
            ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_POLL_S)
            if not ready:
                self._check_places()
            elif (event := self._read(ready[0])) is not None:
                self._waiting_since = None
                return event

    def avoid(self, number: int) -> None:
        """See `Executor`."""
        node = self._nodes.get(number)
        if node is not None and {place["NodeID"] for place in self._places()} - {node}:
            self._avoided.add(node)

    def close(self) -> None:
        """See `Executor`; the cluster stays for whoever comes next, and one that was started here ends with us."""
        for stream in self._running:
            self._ray.cancel(stream, force=True)

    def _read(self, stream: Any) -> Event | None:
        """The next event of a task; None for its first word, which says where it runs."""
        number = self._running.pop(stream)
        try:
            message = self._ray.get(next(stream))
        except StopIteration:
            return Event(number, None)
        except self._ray.exceptions.RayTaskError as error:
            return Event(number, None, str(error.cause))
        except self._ray.exceptions.RayError as error:
            return Event(number, None, type(error).__name__)
        self._running[stream] = number  # behind the others, so that no task is heard alone
        if number not in self._nodes:
            self._nodes[number] = message.decode()
            return None
        return Event(number, zlib.decompress(message))

    def _check_places(self) -> None:
        if self._places():
            self._waiting_since = None
            return
        self._waiting_since = self._waiting_since or time.monotonic()
        if time.monotonic() - self._waiting_since > PATIENCE_S:
            raise InputError(f"the cluster has had no machine for this run for {PATIENCE_S:.0f} s")

    def _alive(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"] and _has(node, "CPU")]

    def _places(self) -> list[dict[str, Any]]:
        """Machines that orders may go to."""
        kind = "CPU" if self._kind is None else f"{_KIND}{self._kind}"
        return [node for node in self._alive() if _has(node, kind) and node["NodeID"] not in self._avoided]

    def _units(self, node: Mapping[str, Any]) -> int:
        """Orders that the machine carries out at a time."""
        most = int(node["Resources"].get("GPU", 0)) if self.device == "cuda" else self._workers or 1
        return min(most, self._workers or (1 if self._alone else most))

    def _pinned(self, asked: str | None) -> str:
        names = {name for node in self._alive() for name in node["Resources"]}
        kinds = sorted(name.removeprefix(_KIND) for name in names if name.startswith(_KIND))
        chosen = [kind for kind in kinds if asked is None or asked == kind]
        if len(chosen) != 1:
            raise InputError(
                f"--accelerator {asked}: the cluster has {', '.join(kinds) or 'none that Ray knows by name'}"
                if asked
                else f"the cluster's GPUs are of {len(kinds)} kinds: {', '.join(kinds)}; choose one with --accelerator"
            )
        return str(chosen[0])

    def _needs(self) -> dict[str, Any]:
        """What a task takes of its machine."""
        places = self._places() or self._alive()
        share = 1 / max([self._units(node) for node in places] or [1])
        cpus = [node["Resources"]["CPU"] // max(1, self._units(node)) for node in places]
        needs: dict[str, Any] = {"num_cpus": max(1, int(min(cpus, default=1)))}
        if any(_has(node, TIMING) for node in places):
            needs["resources"] = {TIMING: int(share * 10_000) / 10_000}  # Ray counts in steps of that
        if self._kind is not None:
            needs |= {"num_gpus": 1, "accelerator_type": self._kind}
        if self._avoided:
            needs["label_selector"] = {_NODE_ID: f"!in({','.join(sorted(self._avoided))})"}
        return needs


def _has(node: Mapping[str, Any], resource: str) -> bool:
    return bool(node["Resources"].get(resource, 0) > 0)


def _carry_out(answer: str, order: bytes) -> Iterator[bytes]:
    """The task: says which machine it runs on, then what the order says."""
    yield ray_module().get_runtime_context().get_node_id().encode()
    place = _place(answer, *map(os.environ.get, _OF_THE_TASK))
    for message in place.carry_out(zlib.decompress(order)):
        yield zlib.compress(message)


@lru_cache(maxsize=1)
def _place(answer: str, *of_the_task: str | None) -> Place:
    """This worker's place, as long as Ray gives it tasks with the same variables: they hold when imports begin."""
    return Place(answer, {})
