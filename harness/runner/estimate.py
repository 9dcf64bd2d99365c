"""How long a run will take, before it starts: from recorded requests like its own, else from what it has to compute.

A cell is estimated from records of the same method name on the same model, the same kind of device and prompts of the
same length within an eighth: median of TTFT and, for each token more, TPOT. Where nothing like it is recorded, from
full attention's FLOPs over the device's measured matrix-product rate plus one read of the weights over the copy rate
for each new token. That is a floor: real requests take longer, small models on a CPU two to four times as long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

from harness.engine.shape import ModelShape
from harness.errors import InputError
from harness.measuring.roofline import Ceilings, ceilings, dense_prefill_flops
from harness.models.load import resolve_dtype
from harness.models.random import ByteTokenizer
from harness.runner.plan import Plan, plan
from harness.runner.spec import RunSpec, public_name
from harness.storage.store import MANIFEST, Spent, load, load_manifest
from tasks.base import Task, TaskContext

Source = Literal["recorded", "floor", "unknown"]
_NEAR = 1 / 8
_NEW_TOKENS = 16
"""Assumed where a task's options do not say."""


class Asked(NamedTuple):
    """What a task asks of each method.

    Attributes:
        samples: how many requests; None where only the data can tell.
        tokens: of a prompt; None likewise.
    """

    samples: int | None
    tokens: int | None


@dataclass(frozen=True)
class CellEstimate:
    """What a cell will ask, and how long that takes.

    Attributes:
        method, task: labels.
        samples: how many requests; None where only the data can tell.
        seconds: of all of them; None where nothing is known.
        source: where the seconds are from.
    """

    method: str
    task: str
    samples: int | None
    seconds: float | None
    source: Source


@dataclass(frozen=True)
class Seen:
    """A recorded request; `token_s` is what each new token after the first took."""

    model: str
    device: str
    method: str
    tokens: int
    ttft_s: float
    token_s: float


@dataclass(frozen=True)
class Ahead:
    """What is ahead of a run.

    Attributes:
        cells: what it asks, and how long that takes by requests like its own.
        there: (method, task) -> how many of these it has.
        rate: what such requests have taken by the clock on the wall; none if none were recorded.
    """

    cells: Sequence[CellEstimate]
    there: Mapping[tuple[str, str], int]
    rate: Spent

    @property
    def requests(self) -> int:
        """That it asks, those that only the data can tell left out."""
        return sum(cell.samples or 0 for cell in self.cells)

    @property
    def left(self) -> int:
        """Of these without a record."""
        return sum(self._left(cell) for cell in self.cells)

    @property
    def seconds(self) -> float | None:
        """That what is left takes; None where nothing says."""
        if self.rate.requests:
            return self.left * self.rate.seconds / self.rate.requests
        known = [self._seconds(cell) for cell in self.cells if cell.seconds is not None]
        return sum(known) if len(known) == len(self.cells) else None

    @property
    def source(self) -> str:
        """Where the seconds are from, in words."""
        if self.rate.requests:
            return "recorded rate"
        sources = {cell.source for cell in self.cells}
        return "unknown" if "unknown" in sources else "floor" if "floor" in sources else "like requests"

    def _left(self, cell: CellEstimate) -> int:
        return max(0, (cell.samples or 0) - self.there.get((cell.method, cell.task), 0))

    def _seconds(self, cell: CellEstimate) -> float:
        return (cell.seconds or 0.0) * self._left(cell) / cell.samples if cell.samples else 0.0


TAKES = {
    "recorded rate": "about {} at the recorded rate",
    "like requests": "about {} going by requests like these",
    "floor": "{} at least, going by FLOPs",
}
"""How long what is ahead takes, by where that is from."""


Counts = dict[tuple[str, TaskContext], int | None]
"""Samples of tasks that were counted, so that runs of the same tasks count them once."""


def estimate(spec: RunSpec, seen: Sequence[Seen], counts: Counts | None = None) -> list[CellEstimate]:
    """One estimate a cell, tasks first, as they will be run; by what tasks say of themselves.

    Args:
        spec: of the run.
        seen: requests among which similar ones are looked for.
        counts: is filled, and read.
    """
    counts = {} if counts is None else counts
    planned = plan(spec)
    for task in planned.tasks:
        if (task.label, task.context) not in counts:
            counts[task.label, task.context] = _samples(task)
    asked = {
        task.label: Asked(counts[task.label, task.context], spec.max_length or task.longest_prompt())
        for task in planned.tasks
    }
    return estimate_cells(planned, asked, seen)


def estimate_cells(planned: Plan, asked: Mapping[str, Asked], seen: Sequence[Seen]) -> list[CellEstimate]:
    """The same where it is known what each task asks.

    Args:
        planned: the run.
        asked: task -> what it asks.
        seen: requests among which similar ones are looked for.
    """
    rates = ceilings(planned.device, resolve_dtype(planned.spec.dtype, planned.device))
    here = [one for one in seen if (one.model, one.device) == (public_name(planned.spec.model), planned.device.type)]
    return [
        _cell(planned, method.label, task, asked[task.label], here, rates)
        for task in planned.tasks
        for method in planned.methods
    ]


def _cell(plan: Plan, method: str, task: Task, asked: Asked, seen: Sequence[Seen], rates: Ceilings) -> CellEstimate:
    samples, tokens = asked
    if samples is None or tokens is None:
        return CellEstimate(method, task.label, samples, None, "unknown")
    new = getattr(task.options, "new_tokens", None) or _NEW_TOKENS
    like = [one for one in seen if one.method == _name(method) and abs(one.tokens - tokens) <= tokens * _NEAR]
    if like:
        each = median(one.ttft_s + (new - 1) * one.token_s for one in like)
        return CellEstimate(method, task.label, samples, samples * each, "recorded")
    seconds = _floor(plan.shape, tokens, new, rates)
    return CellEstimate(method, task.label, samples, samples * seconds, "floor")


def _floor(shape: ModelShape, tokens: int, new_tokens: int, rates: Ceilings) -> float:
    element = 4 if rates.dtype == "float32" else 2
    weights = element * (shape.layers * shape.linear_params + shape.head_params)
    prefill = dense_prefill_flops(shape, tokens) / rates.gemm_flops
    return prefill + new_tokens * weights / rates.copy_bytes_per_s


def _samples(task: Task) -> int | None:
    """How many samples a task has: what it says itself, else what it yields to the simplest tokenizer."""
    total, limit = task.count(), task.context.limit
    if total is None:
        return _yielded(task)
    return min(total, limit) if limit else total


def _yielded(task: Task) -> int | None:
    try:
        return sum(1 for _ in task.samples(ByteTokenizer()))
    except (InputError, AttributeError, TypeError):
        return task.context.limit


def seen_near(folder: Path) -> list[Seen]:
    """Requests recorded in runs below a folder, to the depth of a study's; runs that cannot be read say nothing."""
    found: list[Seen] = []
    for path in sorted(path for depth in ("*", "*/*", "*/*/*") for path in folder.glob(f"{depth}/{MANIFEST}")):
        try:
            manifest, records = load_manifest(path.parent), load(path.parent)
        except InputError:
            continue
        timed = records[records["tpot_s"].notna()]
        for method, tokens, *seconds in timed[["method", "prompt_tokens", "ttft_s", "tpot_s"]].itertuples(index=False):
            found.append(Seen(manifest.model, manifest.device, _name(method), int(tokens), *map(float, seconds)))
    return found


def _name(label: str) -> str:
    return label.partition(":")[0]
