from __future__ import annotations

import time
import types
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.api import run
from harness.measuring import energy
from harness.measuring.energy import STEPS, EnergyMeter, Rest, watch_rest
from harness.measuring.gpu import GpuMonitor
from harness.report.arrivals import arrivals
from harness.report.recorded import read
from harness.report.throughput import throughput
from harness.runner import worker
from harness.statistics.paired import compare
from tests.test_cli import random_model

STEP, IDLE, BUSY = 0.05, 100.0, 700.0


class Device:
    """A GPU and its clock: a counter that moves every `STEP` seconds, at rest until it is told to work."""

    def __init__(self, idle: float = IDLE, start: float = 0.0) -> None:
        self.now, self.used, self.shown, self.idle = start, 0.0, 0.0, idle

    def pass_(self, seconds: float, watts: float) -> None:
        """Time goes by, in small pieces, at this power."""
        pieces = max(1, round(seconds / 0.0005))
        for _ in range(pieces):
            before = self.now // STEP
            self.now += seconds / pieces
            self.used += watts * seconds / pieces
            self.shown = self.used if self.now // STEP > before else self.shown

    def sleep(self, seconds: float) -> None:
        self.pass_(seconds, self.idle)

    def counter(self) -> float | None:
        return self.shown


def on(device: Device, monkeypatch: pytest.MonkeyPatch) -> EnergyMeter:
    """A meter whose clock is the device's."""
    clock = types.SimpleNamespace(perf_counter=lambda: device.now, sleep=device.sleep)
    monkeypatch.setattr(energy, "time", clock)
    return EnergyMeter(device.counter)


def test_power_at_rest_and_the_counters_step_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    meter = on(device, monkeypatch)
    assert device.now == pytest.approx(1.0, abs=0.01)
    assert meter.rest is not None and meter.rest.power_w == pytest.approx(IDLE, rel=0.05)
    assert meter.rest.step_s == pytest.approx(STEP, rel=0.05)
    assert meter.facts() == {"idle_power_w": meter.rest.power_w, "energy_step_s": meter.rest.step_s}


@settings(deadline=None, max_examples=20)
@given(phase=st.floats(0, STEP), pause=st.floats(0, 2), seconds=st.floats(STEPS * STEP * 1.1, 4))
def test_a_request_is_off_by_a_step_at_most(phase: float, pause: float, seconds: float) -> None:
    """Whatever the moment in a step, and however long the harness looks at things in between."""
    with pytest.MonkeyPatch.context() as patch:
        device = Device()
        meter = on(device, patch)
        device.pass_(phase, IDLE)
        start = meter.read()
        device.pass_(seconds / 2, BUSY)
        device.pass_(pause, IDLE)
        device.pass_(seconds / 2, BUSY)
        joules = meter.spent(start, seconds)
    assert joules is not None and abs(joules - BUSY * seconds) <= BUSY * STEP * 1.1


def test_what_is_too_short_for_the_counter_has_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    meter = on(device, monkeypatch)
    start = meter.read()
    device.pass_(STEPS * STEP * 0.9, BUSY)
    assert meter.spent(start, STEPS * STEP * 0.9) is None
    device.pass_(STEPS * STEP * 0.3, BUSY)
    assert meter.spent(start, STEPS * STEP * 1.2) is not None


def test_a_counter_that_stands_still_or_went_back_is_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    meter = on(device, monkeypatch)
    start = meter.read()
    device.now += 2.0
    assert meter.spent(start, 2.0) is None
    device.shown = 0.0
    assert meter.spent(start, 2.0) is None


def test_a_device_that_does_not_count_is_not_waited_for() -> None:
    meter = EnergyMeter(lambda: None)
    assert meter.rest is None and meter.spent(meter.read(), 60.0) is None
    assert meter.facts() == {"idle_power_w": None, "energy_step_s": None}


def test_a_counter_that_never_moves_has_no_rest() -> None:
    assert watch_rest(lambda: 5.0, 0.01) is None


class Counted(GpuMonitor):
    """NVML beside a run on the CPU: 300 W, whatever the clock says."""

    def sample(self) -> dict[str, object]:
        return {"power_w": 300.0}

    def energy_j(self) -> float:
        return time.perf_counter() * 300.0


def test_a_run_records_joules_beside_its_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "gpu_monitor", lambda device: Counted())
    monkeypatch.setattr(energy, "watch_rest", lambda counter: Rest(50.0, 1e-6))
    tasks = "speed:lengths=64:new_tokens=3:repeats=2"
    records = run("full,recent", tasks, random_model(tmp_path), output=tmp_path / "run", device="cpu", progress=False)
    # What passed beside the request was 300 W, of which 50 W were taken for rest: a little above 300 W of the request.
    assert (records["energy_j"] >= 300 * records["e2e_s"]).all()
    assert (records["energy_per_token_j"] == records["energy_j"] / 3).all()
    assert {state["idle_power_w"] for state in records["device_state"]} == {50.0}


@pytest.mark.slow
def test_requests_together_share_the_joules_of_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "gpu_monitor", lambda device: Counted())
    monkeypatch.setattr(energy, "watch_rest", lambda counter: Rest(50.0, 1e-6))
    speed, model = "speed:lengths=64:new_tokens=3:repeats=4", random_model(tmp_path)
    ask = partial(run, "full,recent", model=model, device="cpu", progress=False)
    batch = ask(speed, output=tmp_path / "batch", batch=2)
    arriving = ask(f"{speed}:rate=inf:most=2", output=tmp_path / "load")
    for records, each in ((batch, 2), (arriving, 4)):
        shares = records["energy_j"].to_numpy().reshape(-1, each)
        assert (shares == shares[:, :1]).all() and (records["energy_per_token_j"] == records["energy_j"] / 3).all()
    for _, group in arriving.groupby("method"):
        seconds = max(arrival["last_token_s"] for arrival in group["arrival"])
        # The load took 300 W for so long, and what it stood still for took 250 W more than rest.
        assert group["energy_j"].sum() >= 299 * seconds
    # A batch is one pair; of a load none is made, yet the tables of what is together have it.
    assert (compare(batch)["energy_n"] == 2).all() and not compare(arriving)["energy_n"].any()
    whole, queue = read(tmp_path / "batch"), read(tmp_path / "load")
    for table in (throughput([whole]), arrivals(queue.records)):
        cells = [row[table.head.index("energy/token")].value for row in table.rows]
        assert len(cells) == 2 and all(isinstance(value, float) and value > 0 for value in cells)
    assert whole.counted and not queue.counted
