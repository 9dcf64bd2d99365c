"""The state of the GPU beside each request: clocks, temperature, power, what slows it down, who else is on it.

A clock that fell, or another process's work, explains a slow request better than any method does. NVML answers in well
under a millisecond without touching the CUDA stream; sample between requests all the same, never inside a timed one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from harness.measuring.provenance import visible_handles

# Bits of NVML's clock event reasons (nvml.h). An idle clock (bit 0) is not throttled: there is nothing to do.
REASONS = {
    0x2: "application_clocks",
    0x4: "software_power_cap",
    0x8: "hardware_slowdown",
    0x10: "sync_boost",
    0x20: "software_thermal",
    0x40: "hardware_thermal",
    0x80: "hardware_power_brake",
    0x100: "display_clocks",
}


class GpuMonitor:
    """Asks NVML about one GPU. Nothing here ever raises: what cannot be found out is null."""

    def __init__(self, index: int = 0) -> None:
        """
        Args:
            index: CUDA's number of the device, as `torch.device("cuda", index)` counts.
        """
        self._nvml: Any = None
        self._handle: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handle = visible_handles(pynvml)[index]
        except Exception:
            # No package, no driver, no such device, or one that may not be asked.
            self.close()

    def sample(self) -> dict[str, Any] | None:
        """The GPU now, as JSON values; None without NVML.

        Returns:
            `sm_clock_mhz`, `memory_clock_mhz`, `temperature_c`, `power_w`, `throttle_reasons` (names from `REASONS`,
            empty where nothing slows the GPU down), `foreign_processes` (how many others compute on it); each null
            where the device does not tell.
        """
        nvml, handle = self._nvml, self._handle
        if nvml is None:
            return None
        return {
            "sm_clock_mhz": _ask(lambda: int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))),
            "memory_clock_mhz": _ask(lambda: int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM))),
            "temperature_c": _ask(lambda: int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
            "power_w": _ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            "throttle_reasons": _ask(lambda: _reasons(nvml, handle)),
            "foreign_processes": self._foreign(),
        }

    def energy_j(self) -> float | None:
        """Joules that the GPU used since its driver was loaded.

        None where it does not count (before Volta, and parts of a GPU), or others compute on it: theirs are in it too.
        """
        nvml, handle = self._nvml, self._handle
        if nvml is None or self._foreign():
            return None
        joules: float | None = _ask(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000)
        return joules

    def _foreign(self) -> int | None:
        nvml, handle = self._nvml, self._handle
        others: int | None = _ask(lambda: _foreign(nvml.nvmlDeviceGetComputeRunningProcesses(handle)))
        return others

    def close(self) -> None:
        """Lets go of NVML; may be called twice."""
        nvml, self._nvml = self._nvml, None
        if nvml is not None:
            _ask(nvml.nvmlShutdown)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def _ask(question: Callable[[], Any]) -> Any:
    try:
        return question()
    except Exception:
        return None


def _reasons(nvml: Any, handle: Any) -> list[str]:
    # Drivers from 535 on call it "event reasons"; the bits are the same.
    newer = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
    mask = int((newer or nvml.nvmlDeviceGetCurrentClocksThrottleReasons)(handle))
    return [name for bit, name in REASONS.items() if mask & bit]


def _foreign(processes: list[Any]) -> int:
    """How many of the processes are not this one.

    In a container NVML names processes by their numbers outside, among which this process cannot find its own; but
    with a CUDA context it is one of them.
    """
    others = [process for process in processes if process.pid != os.getpid()]
    hidden = len(others) == len(processes) > 0 and _has_context()
    return len(others) - hidden


def _has_context() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())
