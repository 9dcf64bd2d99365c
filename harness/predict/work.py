"""What a run's requests did, and how long that took: medians of each method at each length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from harness.engine.shape import ModelShape
from harness.errors import InputError
from harness.models.load import describe
from harness.models.random import known_name
from harness.predict.device import BUS_SHARE, Device, Rates, reading, recognised
from harness.predict.products import Kernels
from harness.report import formats
from harness.report.recorded import Recorded, read
from harness.statistics.paired import REFERENCE
from harness.storage.store import Manifest

_FEW = 4
"""From so many decode steps on their median is a step's time; the first is longer, it makes what later ones reuse."""
_OWN_KERNELS = ("fused", "graphed")
_ELEMENTS = {"float32": 4}
_CPU = "cpu"


@dataclass(frozen=True)
class Cell:
    """One method at one length, medians over samples.

    Attributes:
        method, task: labels. length: prompt tokens.
        steps: decode steps behind the first token.
        layers: of the model. engine: what ran the steps, of how many requests, and whether they are
            seen as kernels or as bytes; cells that differ in it share no constants.
        kernels: the engine's own, where these ran the steps of one request of a model whose shape is known; else None.
        flops: of the prefill. read_bytes: of a decode step. kv_bytes: those of them that are not weights; all where the
            shape is not known. revived_flops: of prompt tokens that decode computed.
        beside_s: seconds of transfers beside a decode step; 0 where there are none.
        host_bytes: keys and values in host memory, where that is not the device's. peak_bytes: of device memory.
        ttft_s, tpot_s, decode_s: time to the first token, per token, and of all steps; the last two NaN without any,
            and the time per token below four.
        joules: of the request; NaN where none were counted.
    """

    method: str
    task: str
    length: int
    steps: float
    layers: int
    engine: str
    kernels: Kernels | None
    flops: float
    read_bytes: float
    kv_bytes: float
    revived_flops: float
    beside_s: float
    host_bytes: float
    peak_bytes: float
    ttft_s: float
    tpot_s: float
    decode_s: float
    joules: float

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
        host_apart: whether a host launches what a device does; a CPU does what it launches.
    """

    name: str
    model: str
    device: str
    gpu: Device | None
    rates: Rates
    cells: list[Cell]
    host_apart: bool = True

    def baseline(self, cell: Cell) -> Cell | None:
        """Full attention on the same task and length."""
        same = (one for one in self.cells if (one.task, one.length) == (cell.task, cell.length))
        return next((one for one in same if one.method == REFERENCE), None)


def read_run(folder: Path | str) -> Run:
    """Reads a run.

    Raises:
        InputError: not a run, one without timed records, or of a model that several devices share.
    """
    found = read(folder)
    records = found.contenders[found.contenders["ttft_s"].notna() & found.contenders["prefill_flops"].notna()]
    if records.empty:
        raise InputError(f"{folder}: no timed records, so there is no work to predict from")
    if (ranks := found.manifest.spec.get("tensor_parallel", 1)) > 1:
        raise InputError(f"{folder}: {ranks} devices share the model, and predictions are of one")
    device = formats.device(found.manifest)
    gpu = recognised(device)
    cells, host_apart = list(_cells(found, records)), found.manifest.device != _CPU
    return Run(found.name, found.manifest.model, device, gpu, _rates(records, gpu), cells, host_apart)


def known_shape(manifest: Manifest) -> ModelShape | None:
    """What the run recorded of its model's shape; of older runs that of a known model whose name is in the model's."""
    if "shape" in manifest.facts:
        return ModelShape(**manifest.facts["shape"])
    name = known_name(manifest.model)
    return describe(f"random:{name}") if name else None


def _rates(records: pd.DataFrame, gpu: Device | None) -> Rates:
    """The ceilings that the records' floors were worked out with."""
    lasting = records["prefill_lasting_floor_s"].fillna(records["prefill_floor_s"])
    # A prefill of few rows is bound by reading weights; of many, by products: those show the greatest rate.
    matrix = float((records["prefill_flops"] / lasting).max())
    copy = float((records["decode_read_bytes"] / records["decode_floor_s"]).median())
    bus, power = (gpu.bus_gb_per_s * 1e9 * BUS_SHARE, gpu.power_w) if gpu else (math.inf, math.nan)
    return Rates(matrix, copy, bus, reading(copy, gpu), power)


def _cells(run: Recorded, records: pd.DataFrame) -> Iterator[Cell]:
    places, shape = {method: place for place, method in enumerate(run.methods)}, known_shape(run.manifest)
    keys = [*zip(records["length"], records["task"], records["method"], strict=True)]
    for key in sorted(set(keys), key=lambda key: (*key[:2], places[key[2]])):
        yield _cell(run.manifest, shape, key, records[[other == key for other in keys]])


def _cell(manifest: Manifest, shape: ModelShape | None, key: tuple[int, str, str], group: pd.DataFrame) -> Cell:
    length, task, method = key
    steps, read_bytes = _median(group["new_tokens"]) - 1, _median(group["decode_read_bytes"])
    engine, batch = manifest.facts.get("engine", "stock"), int(pd.to_numeric(group["batch"]).fillna(1).median())
    kernels = Kernels(shape) if shape and engine in _OWN_KERNELS and batch == 1 else None
    return Cell(
        method=method,
        task=task,
        length=int(length),
        steps=steps,
        layers=len(group["tokens_kept"].iloc[0]),
        engine=f"{engine}, batch {batch}{'' if kernels else ', by bytes'}",
        kernels=kernels,
        flops=_median(group["prefill_flops"]),
        read_bytes=read_bytes,
        kv_bytes=max(0.0, read_bytes - (_weight_bytes(manifest, shape) if shape else 0)),
        revived_flops=_median(_revived_flops(group, shape)),
        beside_s=_median(pd.Series([_beside(extra) for extra in group["extra"]])),
        host_bytes=0.0 if manifest.device == _CPU else _median(group["kv_bytes_host"]),
        peak_bytes=_median(group["peak_memory_bytes"]),
        ttft_s=_median(group["ttft_s"]),
        tpot_s=_median(group["tpot_s"]) if steps >= _FEW else math.nan,
        decode_s=_median(group["e2e_s"] - group["ttft_s"]) if group["tpot_s"].notna().any() else math.nan,
        joules=_median(group["energy_j"]),
    )


def _weight_bytes(manifest: Manifest, shape: ModelShape) -> int:
    return (shape.layers * shape.linear_params + shape.head_params) * _ELEMENTS.get(manifest.facts.get("dtype", ""), 2)


def _revived_flops(group: pd.DataFrame, shape: ModelShape | None) -> pd.Series[Any]:
    """Of a prompt token in a layer: its products, and attention to the tokens that pruned layers keep.

    Where the shape is not known, what a token costs on average in a dense prefill, which is too much for a long one.
    """
    layers = group["tokens_kept"].map(len)
    if shape is None:
        return group["tokens_recomputed"] * group["dense_flops"] / (group["prompt_tokens"] * layers)
    attended = [
        _mean([kept for kept in layer if kept < tokens], tokens)
        for layer, tokens in zip(group["tokens_kept"], group["prompt_tokens"], strict=True)
    ]
    each = 2 * shape.linear_params + 4 * shape.heads * shape.head_dim * pd.Series(attended, index=group.index)
    return group["tokens_recomputed"] * each


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _beside(extra: dict[str, Any]) -> float:
    return float((extra.get("decode_overlap") or {}).get("beside_s", 0.0))


def _median(values: pd.Series[Any]) -> float:
    return float(pd.to_numeric(values, errors="coerce").median())
