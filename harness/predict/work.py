"""What a run's requests did, and how long that took: medians of each method at each length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from harness.errors import InputError
from harness.predict.device import Device, Rates, recognised
from harness.report import formats
from harness.report.recorded import Recorded, read
from harness.statistics.paired import REFERENCE

BUS_SHARE = 0.85
"""Of a host link's data sheet rate that large copies reach (PCIe's packet headers take the rest)."""


@dataclass(frozen=True)
class Cell:
    """One method at one length, medians over samples.

    Attributes:
        method, task: labels. length: prompt tokens.
        steps: decode steps behind the first token.
        flops: of the prefill. read_bytes: of a decode step. revived_flops: of prompt tokens that decode computed.
        beside_s: seconds of transfers beside a decode step; 0 where there are none.
        host_bytes: keys and values in host memory. peak_bytes: of device memory.
        ttft_s, tpot_s, decode_s: time to the first token, per token, and of all steps; the last two NaN without any.
        watts: right behind the request; NaN where not recorded.
    """

    method: str
    task: str
    length: int
    steps: float
    flops: float
    read_bytes: float
    revived_flops: float
    beside_s: float
    host_bytes: float
    peak_bytes: float
    ttft_s: float
    tpot_s: float
    decode_s: float
    watts: float

    @property
    def e2e_s(self) -> float:
        """The time to the last token."""
        return self.ttft_s + self.decode_s if self.steps else self.ttft_s

    @property
    def fetches_in_the_open(self) -> bool:
        """Whether decode steps wait for what they fetch from host memory."""
        return self.host_bytes > 0 and not self.beside_s and self.steps > 0


@dataclass(frozen=True)
class Run:
    """A recorded run as work.

    Attributes:
        name: folder. model: label. device: for people. gpu: what is known of it; None for a CPU or an unknown card.
        rates: that its requests met, measured when it was recorded.
        cells: in the order of lengths and methods.
    """

    name: str
    model: str
    device: str
    gpu: Device | None
    rates: Rates
    cells: list[Cell]

    def baseline(self, cell: Cell) -> Cell | None:
        """Full attention on the same task and length."""
        same = (one for one in self.cells if (one.task, one.length) == (cell.task, cell.length))
        return next((one for one in same if one.method == REFERENCE), None)


def read_run(folder: Path | str) -> Run:
    """Reads a run.

    Raises:
        InputError: not a run, or one without timed records.
    """
    found = read(folder)
    records = found.contenders[found.contenders["ttft_s"].notna() & found.contenders["prefill_flops"].notna()]
    if records.empty:
        raise InputError(f"{folder}: no timed records, so there is no work to predict from")
    device = formats.device(found.manifest)
    gpu = recognised(device)
    bus = gpu.bus_gb_per_s * 1e9 * BUS_SHARE if gpu else math.inf
    return Run(found.name, found.manifest.model, device, gpu, _rates(records, bus), list(_cells(found, records)))


def _rates(records: pd.DataFrame, bus: float) -> Rates:
    """The ceilings that the records' floors were worked out with."""
    lasting = records["prefill_lasting_floor_s"].fillna(records["prefill_floor_s"])
    # A prefill of few rows is bound by reading weights; of many, by products: those show the greatest rate.
    matrix = (records["prefill_flops"] / lasting).max()
    return Rates(float(matrix), float((records["decode_read_bytes"] / records["decode_floor_s"]).median()), bus)


def _cells(run: Recorded, records: pd.DataFrame) -> Iterator[Cell]:
    places = {method: place for place, method in enumerate(run.methods)}
    keys = [*zip(records["length"], records["task"], records["method"], strict=True)]
    for key in sorted(set(keys), key=lambda key: (*key[:2], places[key[2]])):
        group = records[[other == key for other in keys]]
        length, task, method = key
        yield Cell(
            method=method,
            task=task,
            length=int(length),
            steps=_median(group["new_tokens"]) - 1,
            flops=_median(group["prefill_flops"]),
            read_bytes=_median(group["decode_read_bytes"]),
            revived_flops=_median(_revived_flops(group)),
            beside_s=_median(pd.Series([_beside(extra) for extra in group["extra"]])),
            host_bytes=_median(group["kv_bytes_host"]),
            peak_bytes=_median(group["peak_memory_bytes"]),
            ttft_s=_median(group["ttft_s"]),
            tpot_s=_median(group["tpot_s"]),
            decode_s=_median(group["e2e_s"] - group["ttft_s"]) if group["tpot_s"].notna().any() else math.nan,
            watts=_median(pd.Series([(state or {}).get("power_w") for state in group["device_state"]])),
        )


def _revived_flops(group: pd.DataFrame) -> pd.Series[Any]:
    """A prompt token in a layer costs what it costs on average in a dense prefill."""
    layers = group["tokens_kept"].map(len)
    return group["tokens_recomputed"] * group["dense_flops"] / (group["prompt_tokens"] * layers)


def _beside(extra: dict[str, Any]) -> float:
    return float((extra.get("decode_overlap") or {}).get("beside_s", 0.0))


def _median(values: pd.Series[Any]) -> float:
    return float(pd.to_numeric(values, errors="coerce").median())
