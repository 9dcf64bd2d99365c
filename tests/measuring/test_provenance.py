from __future__ import annotations

import getpass
import json
import socket
import subprocess
import types
from pathlib import Path
from typing import Any

import pytest

from harness.measuring import provenance


def test_environment_is_json_and_complete() -> None:
    found = provenance.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"] and found["packages"]["transformers"]
    assert found["cpu"]["usable"] >= 1 and found["memory_bytes"] > 0
    assert set(found) == {"host", "python", "platform", "cpu", "memory_bytes", "packages", "cuda", "git"}


def test_environment_tells_nothing_of_whose_machine_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "s3cret-value")
    text = json.dumps(provenance.environment())
    assert "s3cret-value" not in text
    assert str(Path.home()) not in text and str(Path(__file__).parent) not in text
    for name in (socket.gethostname(), getpass.getuser()):
        assert f'"{name}"' not in text


def test_an_unknown_package_has_no_version() -> None:
    assert provenance._version("no-such-package-here") is None


def commit(folder: Path) -> None:
    (folder / "a").touch()
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    for arguments in (["init", "-q"], ["add", "a"], [*identity, "commit", "-q", "-m", "m"]):
        subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True)


def test_git_says_commit_and_whether_it_is_clean(tmp_path: Path) -> None:
    assert provenance._git(tmp_path) is None
    commit(tmp_path)
    clean = provenance._git(tmp_path)
    assert clean is not None and len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "b").touch()
    assert provenance._git(tmp_path) == clean | {"dirty": True}


def test_someone_elses_repository_is_not_ours(tmp_path: Path) -> None:
    commit(tmp_path)
    inner = tmp_path / "site-packages"
    inner.mkdir()
    assert provenance._git(inner) is None


def test_no_git_program_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert provenance._git(tmp_path) is None


class FakeNvml(types.ModuleType):
    """Two GPUs that do not know their power limit."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, working: bool = True) -> None:
        super().__init__("pynvml")
        self.working = working

    def nvmlInit(self) -> None:
        if not self.working:
            raise self.NVMLError

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"gpu{index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetName(self, handle: str) -> bytes:
        return handle.encode()

    def nvmlSystemGetDriverVersion(self) -> str:
        return "600.1"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return types.SimpleNamespace(total=1 << 30)

    def nvmlDeviceGetMaxClockInfo(self, handle: str, which: int) -> int:
        return 1000 * which

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return f"uuid of {handle}"

    def nvmlDeviceGetPowerManagementLimit(self, handle: str) -> int:
        raise self.NVMLError


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, ["gpu0", "gpu1"]), ("1", ["gpu1"]), ("GPU-ab,0", ["GPU-ab", "gpu0"]), ("", []), ("-1", [])],
)
def test_cuda_lists_the_visible_devices(monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices = provenance.gpus()
    assert devices is not None and [device["name"] for device in devices] == names
    for device in devices:
        assert device["sm_clock_max_mhz"] == 1000 and device["power_limit_w"] is None


def test_no_driver_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNvml(working=False))
    assert provenance.gpus() is None
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert provenance.gpus() is None
