"""What the records of a run say about the paper's table, length by length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from harness.errors import InputError
from harness.measuring.roofline import dense_prefill_flops
from harness.reproduce.claims import Measured
from harness.reproduce.sliminfer.paper import SETTINGS, Setting
from harness.runner.catalog import MethodSpec, parse_methods
from harness.statistics.noise import TWIN
from harness.statistics.paired import REFERENCE, compare
from harness.storage.store import Manifest, load, load_manifest

GIB = 2.0**30
_FLOPS_APART = 1e-3


@dataclass(frozen=True)
class Line:
    """One method at one length; NaN where nothing was measured.

    Attributes:
        length: prompt tokens.
        method: its label.
        samples: of TTFT.
        ttft_s, e2e_s, tpot_s: median seconds; the last two with the most new tokens.
        ttft, e2e: time of full attention over the method's, paired by sample.
        ideal: FLOPs of full attention's prefill over the method's: the speed-up if FLOPs were all.
        kv_bytes: of the prompt's keys and values on the device, with the fewest new tokens.
    """

    length: int
    method: str
    samples: int
    ttft_s: float
    tpot_s: float
    e2e_s: float
    ttft: Measured
    e2e: Measured
    ideal: float
    kv_bytes: float

    @property
    def reached(self) -> float:
        """Share of the ideal TTFT speed-up that was measured."""
        return self.ttft.value / self.ideal

    @property
    def kv_gib(self) -> float:
        """GiB of the prompt's keys and values."""
        return self.kv_bytes / GIB


@dataclass(frozen=True)
class Readings:
    """A run's records of the task `speed`.

    Attributes:
        manifest: what the run is.
        records: one row a record, with columns `length` and `cell_name` (length and new tokens).
    """

    manifest: Manifest
    records: pd.DataFrame

    @cached_property
    def lengths(self) -> list[int]:
        """Prompt lengths, ascending."""
        return sorted({int(length) for length in self.records["length"]})

    @cached_property
    def new_tokens(self) -> list[int]:
        """Numbers of new tokens, ascending."""
        return sorted({int(count) for count in self.records["new_tokens"]})

    @cached_property
    def methods(self) -> dict[str, MethodSpec]:
        """Label -> the method, in the order of the run."""
        present = set(self.records["method"])
        labels = [label for label in self.manifest.methods if label in present and label != TWIN]
        return {label: parse_methods(label)[0] for label in labels}

    @cached_property
    def slim(self) -> MethodSpec:
        """The first slim of the run."""
        return next(method for method in self.methods.values() if method.kind.name == "slim")

    @cached_property
    def setting(self) -> Setting | None:
        """The paper's setting whose shape the model has, by what full attention's prefill costs; None if it has none.

        The records do not name the shape, but FLOPs over several lengths fit one alone.
        """
        full = self.records[self.records["method"] == REFERENCE]
        costs = full.drop_duplicates("length")[["prompt_tokens", "dense_flops", "tokens_kept"]]
        return next((setting for setting in SETTINGS if _fits(setting, costs)), None)

    @cached_property
    def lines(self) -> list[Line]:
        """Every length and method, in that order."""
        return [self._line(length, label) for length in self.lengths for label in self.methods]

    def line(self, length: int, label: str) -> Line | None:
        """One of them."""
        return next((line for line in self.lines if (line.length, line.method) == (length, label)), None)

    def _line(self, length: int, label: str) -> Line:
        first, last = (self._cell(length, label, count) for count in (self.new_tokens[0], self.new_tokens[-1]))
        full = self._cell(length, REFERENCE, self.new_tokens[0])
        return Line(
            length,
            label,
            len(first),
            _median(first, "ttft_s"),
            _median(last, "tpot_s"),
            _median(last, "e2e_s"),
            self._ratio(length, label, self.new_tokens[0], "ttft"),
            self._ratio(length, label, self.new_tokens[-1], "e2e"),
            _median(full, "prefill_flops") / _median(first, "prefill_flops"),
            _prompt_kv(first, full),
        )

    def _cell(self, length: int, label: str, new_tokens: int) -> pd.DataFrame:
        records = self.records
        return records[(records["cell_name"] == cell_name(length, new_tokens)) & (records["method"] == label)]

    def _ratio(self, length: int, label: str, new_tokens: int, measure: str) -> Measured:
        if label == REFERENCE:
            return Measured(1.0)
        row: Mapping[str, Any] = self._compared.get((label, cell_name(length, new_tokens)), {})
        return Measured(*(float(row.get(f"{measure}_{name}", math.nan)) for name in ("ratio", "low", "high")))

    @cached_property
    def _compared(self) -> dict[tuple[str, str], dict[str, Any]]:
        rows = compare(self.records.assign(task=self.records["cell_name"])).to_dict("records")
        return {(str(row["method"]), str(row["task"])): {str(key): row[key] for key in row} for row in rows}


def cell_name(length: int, new_tokens: int) -> str:
    """How a length and a number of new tokens are called together."""
    return f"{length}+{new_tokens}"


def read(folder: Path | str) -> Readings:
    """Reads a run.

    Raises:
        InputError: not a run, or one without records of `speed` under full attention and slim.
    """
    manifest, records = load_manifest(folder), load(folder)
    records = records[records["task"].str.partition(":")[0] == "speed"]
    present = {label.partition(":")[0] for label in records["method"]}
    if missing := {REFERENCE, "slim"} - present:
        lacks = " and ".join(f"{name!r}" for name in sorted(missing))
        raise InputError(f"{folder}: no records of the task 'speed' under {lacks}, so there is nothing to compare")
    lengths = [int(extra["length"]) for extra in records["extra"]]
    names = [cell_name(*pair) for pair in zip(lengths, records["new_tokens"], strict=True)]
    return Readings(manifest, records.assign(length=lengths, cell_name=names))


def _fits(setting: Setting, costs: pd.DataFrame) -> bool:
    for tokens, flops, kept in costs.itertuples(index=False):
        ideal = dense_prefill_flops(setting.shape, int(tokens))
        if pd.isna(flops) or len(kept) != setting.shape.layers or abs(float(flops) / ideal - 1) > _FLOPS_APART:
            return False
    return True


def _median(records: pd.DataFrame, column: str) -> float:
    values = pd.to_numeric(records[column], errors="coerce").dropna()
    return float(values.median()) if len(values) else math.nan


def _prompt_kv(records: pd.DataFrame, full: pd.DataFrame) -> float:
    """Allocated bytes less the room that every layer reserves for the new tokens.

    What a token takes in a layer is what full attention's bytes say: they hold the whole prompt and the same room.
    """
    if records.empty or full.empty:
        return math.nan
    kept: list[int] = full["tokens_kept"].iloc[0]
    room = int(full["new_tokens"].iloc[0]) * len(kept)
    token_bytes = _median(full, "kv_bytes") / (sum(kept) + room)
    return _median(records, "kv_bytes") - room * token_bytes
