"""What recorded runs measured of what claims are about: one reading a run, method, length and set of tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.report import formats
from harness.report.recorded import Recorded, read
from harness.reproduce.claims import Measured
from harness.reproduce.published.claims_file import SPEED, Published
from harness.statistics.paired import compare

_BYTES = {"kv": ["kv_bytes", "extra_bytes"], "peak": ["peak_memory_bytes"]}


@dataclass(frozen=True)
class Reading:
    """What a run says.

    Attributes:
        run: the run's name.
        label: the method with its options.
        model: as the run has it.
        device: the chip.
        gpu: whether it is one that CUDA drives.
        length: prompt tokens.
        samples: pairs.
        found: the number with its interval.
    """

    run: str
    label: str
    model: str
    device: str
    gpu: bool
    length: int
    samples: int
    found: Measured

    @property
    def words(self) -> str:
        """Where it was read: method, length, model, device and run."""
        return (
            f"`{self.label}` at {self.length:,} tokens, `{self.model}`, {self.device}, {self.samples} pairs, {self.run}"
        )


@lru_cache(maxsize=64)
def read_run(folder: Path) -> Recorded:
    """A run, read once."""
    return read(folder)


def readings(runs: Sequence[Path], claim: Published) -> list[Reading]:
    """Every reading of a claim's method, measure and tasks, whatever the model and the length."""
    if claim.measure == "none":
        return []
    return [one for folder in runs for one in _of_run(read_run(folder), claim)]


def _of_run(run: Recorded, claim: Published) -> Iterator[Reading]:
    records = run.records[run.records["task"].str.startswith(claim.tasks)]
    methods = {name: [label for label in run.methods if _is(label, name)] for name in (claim.method, claim.against)}
    for length, part in _by_length(records, claim):
        for label in methods[claim.method]:
            for other in methods[claim.against]:
                pair = part[part["method"].isin([label, other])]
                found, count = _measure(pair, label, other, claim.measure)
                if not math.isnan(found.value):
                    yield _reading(run, label, length, count, found)


def _by_length(records: pd.DataFrame, claim: Published) -> Iterator[tuple[int, pd.DataFrame]]:
    """Length by length; texts have lengths of their own, and a claim about tasks is about all of theirs."""
    if claim.tasks == SPEED:
        yield from ((int(str(length)), part) for length, part in records.groupby("length"))
    elif not records.empty:
        yield int(records["prompt_tokens"].median()), records


def _reading(run: Recorded, label: str, length: int, samples: int, found: Measured) -> Reading:
    manifest = run.manifest
    where = formats.device(manifest)
    return Reading(run.name, label, manifest.model, where, manifest.device == "cuda", length, samples, found)


def _is(label: str, name: str) -> bool:
    return label.partition(":")[0] == name and "+" not in label


def _measure(pair: pd.DataFrame, label: str, other: str, measure: str) -> tuple[Measured, int]:
    """Of two methods' records at one length: the effect over their tasks."""
    if pair["method"].nunique() < 2:
        return Measured(math.nan), 0
    if measure in _BYTES:
        return _bytes(pair, label, other, _BYTES[measure])
    rows = compare(pair.assign(all_tasks="all"), reference=other, by="all_tasks").to_dict("records")
    if not rows:
        return Measured(math.nan), 0
    row: dict[str, Any] = {str(key): value for key, value in rows[0].items()}
    estimate = "score_difference" if measure == "score" else f"{measure}_ratio"
    found = Measured(*(float(row[name]) for name in (estimate, f"{measure}_low", f"{measure}_high")))
    return found, int(row[f"{measure}_n"])


def _bytes(pair: pd.DataFrame, label: str, other: str, columns: list[str]) -> tuple[Measured, int]:
    """Bytes are counted, so their ratio has no interval: of medians."""
    total = pair[columns].astype(float).fillna(0.0).sum(axis=1)
    medians = total.groupby(pair["method"]).median()
    value = medians[other] / medians[label] if medians[label] > 0 else math.nan
    return Measured(float(value) if np.isfinite(value) else math.nan), int((pair["method"] == label).sum())
