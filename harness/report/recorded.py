"""One recorded run, read once and summed up in the ways that tables, plots and the page need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.report.markdown import Comparison
from harness.report.means import MeanScores, mean_scores
from harness.report.render import compared
from harness.report.summary import overall, summarise
from harness.statistics.comparable import comparable
from harness.statistics.noise import TWIN
from harness.storage.store import Manifest, load, load_manifest

_NUMBERS = (
    "prefill_flops", "dense_flops", "decode_read_bytes", "prefill_floor_s", "prefill_lasting_floor_s", "decode_floor_s",
    "decode_bus_bytes", "decode_bus_floor_s",
)  # fmt: skip
_NOMINAL = 0.02
"""How far a prompt may be from the length that its task asked for; the tasks promise 1 %."""


@dataclass(frozen=True)
class Recorded:
    """A run's manifest and records; everything else is worked out of them when first asked for.

    Attributes:
        name: the folder's name.
        manifest: what the run is.
        records: `harness.storage.store.load` with a column `length` (`lengths`); times are those that compare
            (`comparable`), `own_ttft_s` and `own_energy_j` are what each record says.
    """

    name: str
    manifest: Manifest
    records: pd.DataFrame

    @cached_property
    def methods(self) -> list[str]:
        """Labels in the order of the run, without the twin of full attention."""
        found = dict.fromkeys([*self.manifest.methods, *self.records["method"]])
        present = set(self.records["method"])
        return [label for label in found if label in present and label != TWIN]

    @cached_property
    def tasks(self) -> list[str]:
        """Labels in the order of the run."""
        found = dict.fromkeys([*self.manifest.tasks, *self.records["task"]])
        present = set(self.records["task"])
        return [label for label in found if label in present]

    @cached_property
    def lengths(self) -> list[int]:
        """Prompt lengths, ascending."""
        return sorted({int(length) for length in self.records["length"]})

    @cached_property
    def contenders(self) -> pd.DataFrame:
        """The records without those of the twin of full attention."""
        return self.records[self.records["method"] != TWIN]

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row a method and task."""
        return summarise(self.records, self.manifest.methods, self.manifest.tasks)

    @cached_property
    def whole(self) -> pd.DataFrame:
        """One row a method, over the tasks that all methods have."""
        return overall(self.summary)

    @cached_property
    def means(self) -> list[MeanScores]:
        """Means that papers name, as far as the run has their tasks."""
        return mean_scores(self.summary[self.summary["method"].isin(self.methods)])

    @cached_property
    def comparison(self) -> Comparison:
        """Methods against full attention, task by task."""
        return compared(self.manifest, self.records)

    @cached_property
    def effects(self) -> dict[tuple[str, str], dict[str, Any]]:
        """(task, method) -> row of the comparison; task `all` too."""
        return self.comparison.effects

    @cached_property
    def comparison_by_length(self) -> Comparison:
        """The same, length by length: here a `task` is a length, and its tasks count the same, as they do in `all`."""
        tasks = [str(length) for length in self.lengths]
        frame = self.records.assign(score=math.nan)
        return compared(self.manifest.model_copy(update={"tasks": tasks}), frame, by="length")

    @cached_property
    def effects_by_length(self) -> dict[tuple[str, str], dict[str, Any]]:
        """(length as text, method) -> row of the comparison by length."""
        return self.comparison_by_length.effects

    @cached_property
    def by_length(self) -> pd.DataFrame:
        """Times, bytes and floors; index (length, method), column `n` for how many records.

        Medians of each task, and over the tasks that all methods have at a length what `overall` makes of them:
        geometric means, of bytes means, and the largest peak; tasks of one new token have no time a token.
        """
        groups = self.contenders.groupby(["length", "task", "method"], sort=True)
        medians = (
            groups[[*_RATES, *_BYTES]].median().astype(float).join(groups.size().rename("n")).reset_index("method")
        )
        methods = medians.groupby("length")["method"].transform("nunique")
        tasks = medians[medians.groupby(["length", "task"])["method"].transform("size") == methods]
        logs = tasks.copy()
        logs[_RATES] = np.log(tasks[_RATES])
        over = logs.groupby(["length", "method"])
        means = over[[*_RATES, *_BYTES]].mean()
        means[_RATES] = np.exp(means[_RATES])
        means[_BYTES[0]] = over[_BYTES[0]].max()
        return means.join(over["n"].sum())

    @property
    def scored(self) -> bool:
        """Whether answers mean something."""
        return not self.manifest.latency_only and bool(self.records["score"].notna().any())

    @property
    def counted(self) -> bool:
        """Whether a GPU counted joules."""
        return bool(self.records["energy_j"].notna().any())


_BYTES = ["peak_memory_bytes", "kv_bytes", "kv_bytes_host", "extra_bytes"]
_RATES = [
    *("ttft_s", "tpot_s", "e2e_s", "prefill_floor_s", "prefill_lasting_floor_s", "decode_floor_s"),
    *("prefill_roofline", "prefill_lasting", "decode_roofline"),
]


def read(folder: Path | str) -> Recorded:
    """Reads a run.

    Raises:
        InputError: the folder is not a run, or is corrupt.
    """
    return recorded(Path(folder).resolve().name, load_manifest(folder), load(folder))


def recorded(name: str, manifest: Manifest, loaded: pd.DataFrame) -> Recorded:
    """What was read already: a folder's name, its manifest and what `harness.storage.store.load` made of it."""
    numbers = {column: pd.to_numeric(loaded[column], errors="coerce").astype(float) for column in _NUMBERS}
    records = comparable(loaded).assign(**numbers, length=lengths(loaded))
    records[["own_ttft_s", "own_energy_j"]] = loaded[["ttft_s", "energy_j"]]
    records["prefill_roofline"] = records["prefill_floor_s"] / records["ttft_s"]
    records["prefill_lasting"] = records["prefill_lasting_floor_s"] / records["ttft_s"]
    records["decode_roofline"] = records["decode_floor_s"] / records["tpot_s"]
    return Recorded(name, manifest, records)


def lengths(records: pd.DataFrame) -> NDArray[np.int64]:
    """The length that each record is listed under, in tokens.

    What its task asked for where all prompts of the task are that long within 2 % (LongBench's `length` counts words,
    so it is not taken), else the nearest power of two.
    """
    asked = [extra.get("length") for extra in records["extra"]]
    nominal = pd.to_numeric(pd.Series(asked, index=records.index, dtype=object), errors="coerce").astype(float)
    tokens = records["prompt_tokens"].astype(float)
    kept = ((nominal - tokens).abs() <= _NOMINAL * tokens).groupby(records["task"]).transform("all")
    rounded = 2.0 ** np.log2(tokens.clip(lower=1).to_numpy()).round()
    return np.where(kept.to_numpy(dtype=bool), nominal, rounded).astype(np.int64)


def family(task: str) -> str:
    """A task's label up to its member or options."""
    return task.partition("/")[0].partition(":")[0]
