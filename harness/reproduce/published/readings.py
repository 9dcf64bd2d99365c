"""What recorded runs measured of what claims are about: one reading a run, method, batch, length and set of tasks."""

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
from harness.statistics.comparable import arrived
from harness.statistics.paired import compare
from harness.statistics.together import together

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
        batch: requests decoded together.
        samples: pairs.
        found: the number with its interval.
    """

    run: str
    label: str
    model: str
    device: str
    gpu: bool
    length: int
    batch: int
    samples: int
    found: Measured

    @property
    def words(self) -> str:
        """Where it was read: method, length, batch, model, device and run."""
        together = f" x {self.batch}" if self.batch > 1 else ""
        where = f"at {self.length:,} tokens{together}, `{self.model}`, {self.device}"
        return f"`{self.label}` {where}, {self.samples} pairs, {self.run}"


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
    methods = {name: [label for label in run.methods if _is(label, name)] for name in (claim.method, claim.against)}
    if not all(methods.values()):
        return
    for length, batch, part in _alike(_asked(run.records, claim), claim):
        for label in methods[claim.method]:
            for other in methods[claim.against]:
                pair = part[part["method"].isin([label, other])]
                found, count = _measure(pair, label, other, claim.measure)
                if not math.isnan(found.value):
                    yield _reading(run, label, length, batch, count, found)


def _asked(records: pd.DataFrame, claim: Published) -> pd.DataFrame:
    """Records of the claim's tasks, and `batch` in all; none that came at a rate, or is too long for the model."""
    there = records["task"].str.startswith(claim.tasks) & ~arrived(records)
    if claim.window is not None:
        there &= records["prompt_tokens"] <= claim.window
    asked = records[there]
    return asked.assign(batch=asked["batch"].fillna(1).astype(int))


def _alike(records: pd.DataFrame, claim: Published) -> Iterator[tuple[int, int, pd.DataFrame]]:
    """Length, batch and records: a task at a length alone; of texts all together, for their lengths are their own."""
    keys, tokens = (["task", "length", "batch"], "length") if claim.tasks == SPEED else (["batch"], "prompt_tokens")
    for _, part in records.groupby(keys):
        yield int(part[tokens].median()), int(part["batch"].iloc[0]), part


def _reading(run: Recorded, label: str, length: int, batch: int, samples: int, found: Measured) -> Reading:
    manifest = run.manifest
    where, gpu = formats.device(manifest), manifest.device == "cuda"
    return Reading(run.name, label, manifest.model, where, gpu, length, batch, samples, found)


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
    own = pair[pair["method"] == label]
    return Measured(float(value) if np.isfinite(value) else math.nan), len(np.unique(together(own)))
