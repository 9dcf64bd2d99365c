from __future__ import annotations

import json
import os
import sys
import types
from typing import Any

import pytest
import torch

from harness.measuring.gpu import GpuMonitor


class FakeNvml(types.ModuleType):
    """One GPU, power capped and warm, with this process and another on it."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, pids: tuple[int, ...] = (), broken: tuple[str, ...] = ()) -> None:
        super().__init__("pynvml")
        self.pids, self.broken, self.shutdowns = pids, broken, 0
        for name in broken:
            setattr(self, name, self.fail)

    def fail(self, *_: Any) -> Any:
        raise self.NVMLError

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None:
        self.shutdowns += 1

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetClockInfo(self, handle: int, which: int) -> int:
        return 1000 * which + handle

    def nvmlDeviceGetTemperature(self, handle: int, which: int) -> int:
        return 71

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 698_500

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return 1_234_567

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return 0x1 | 0x4 | 0x40 | 0x4000

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        return [types.SimpleNamespace(pid=pid) for pid in self.pids]


def use(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def sampled(index: int = 0) -> dict[str, Any]:
    with GpuMonitor(index) as monitor:
        found = monitor.sample()
    assert found is not None and json.loads(json.dumps(found)) == found
    return found


def test_a_sample_tells_clocks_heat_power_and_what_slows_the_gpu_down(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeNvml((os.getpid(), 7)))
    assert sampled() == {
        "sm_clock_mhz": 1000,
        "memory_clock_mhz": 2000,
        "temperature_c": 71,
        "power_w": 698.5,
        "throttle_reasons": ["software_power_cap", "hardware_thermal"],
        "foreign_processes": 1,
    }


def test_newer_drivers_are_asked_for_event_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    setattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", lambda handle: 0x1)  # noqa: B010
    use(monkeypatch, nvml)
    assert sampled()["throttle_reasons"] == []


@pytest.mark.parametrize(
    ("pids", "context", "foreign"),
    [
        ((), True, 0),
        ((7,), False, 1),
        ((7,), True, 0),  # a container: the one process NVML names is this one under another number
        ((7, 8), True, 1),
        ((os.getpid(), 7, 8), True, 2),
    ],
)
def test_foreign_processes(monkeypatch: pytest.MonkeyPatch, pids: tuple[int, ...], context: bool, foreign: int) -> None:
    use(monkeypatch, FakeNvml(pids))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: context)
    assert sampled()["foreign_processes"] == foreign


def test_the_device_is_the_one_that_cuda_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeNvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5,1")
    assert sampled(0)["sm_clock_mhz"] == 1005 and sampled(1)["sm_clock_mhz"] == 1001


def test_what_the_gpu_does_not_tell_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeNvml(broken=("nvmlDeviceGetPowerUsage", "nvmlDeviceGetComputeRunningProcesses")))
    found = sampled()
    assert found["power_w"] is None and found["foreign_processes"] is None and found["temperature_c"] == 71


def test_the_counter_of_energy_is_in_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeNvml())
    with GpuMonitor() as monitor:
        assert monitor.energy_j() == 1234.567
    use(monkeypatch, FakeNvml(broken=("nvmlDeviceGetTotalEnergyConsumption",)))
    with GpuMonitor() as monitor:
        assert monitor.energy_j() is None
    use(monkeypatch, FakeNvml((os.getpid(), 7)))
    with GpuMonitor() as monitor:
        assert monitor.energy_j() is None, "another process's joules are in the counter too"


@pytest.mark.parametrize("nvml", [None, FakeNvml(broken=("nvmlInit",)), FakeNvml(broken=("nvmlDeviceGetCount",))])
def test_without_nvml_there_is_no_sample(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None) -> None:
    use(monkeypatch, nvml)
    with GpuMonitor() as monitor:
        assert monitor.sample() is None and monitor.energy_j() is None


def test_no_such_device_is_no_sample_and_closing_twice_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    use(monkeypatch, nvml)
    monitor = GpuMonitor(9)
    assert monitor.sample() is None
    monitor.close()
    monitor.close()
    assert nvml.shutdowns == 1
