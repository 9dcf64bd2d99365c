"""What a run would ask, how long that may take and whether it fits, before any weights are loaded.

Prompts are read and the results folder is looked at as for the run itself, so what would refuse that is refused here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import torch

from harness.engine.parallel import Ranks
from harness.errors import InputError
from harness.models.load import Outline, outline, resolve_dtype
from harness.models.memory import check_memory, free_bytes, weight_bytes
from harness.option_help import written
from harness.report import formats
from harness.report.table import Cell, Table, label, number, to_markdown
from harness.runner.catalog import MethodSpec
from harness.runner.changes import changes, refusal
from harness.runner.estimate import TAKES, Ahead, Asked, CellEstimate, estimate_cells, seen_near
from harness.runner.exclusions import check_turns
from harness.runner.plan import Plan, plan
from harness.runner.samples import Prompt, read_prompts
from harness.runner.spec import RunSpec, public_name
from harness.storage.record import Record
from harness.storage.store import Spent, answered, found_by
from tasks.common.load import load_of

Prompts = Mapping[str, Sequence[Prompt]]
"""Of each task."""

_METHODS_NOTE = "With every option as it will be, defaults included."
_CELLS_NOTE = (
    "Time: of all requests, from recorded ones like these (recorded), or at least what FLOPs and weights take on this "
    "device (floor). Longest: tokens of the longest prompt."
)


def outlook(spec: RunSpec, folder: Path) -> str:
    """Methods, requests, time and memory of a run as Markdown; nothing is written.

    Args:
        spec: what the user asks for.
        folder: of its records; similar runs are looked for beside it.

    Raises:
        InputError: what would refuse the run.
    """
    planned, model, ranks = plan(spec), outline(spec.model), _ranks(spec.tensor_parallel)
    check_memory(spec.model, model.shape, model.tied, planned.device, _dtype(planned), ranks)
    there, prompts = _recorded(planned, folder), _prompts(planned, model)
    cells = estimate_cells(planned, {task: _asked(each) for task, each in prompts.items()}, seen_near(folder.parent))
    ahead = Ahead(cells, Counter((record.method, record.task) for record in there), Spent())
    kind = str(_dtype(planned)).removeprefix("torch.")
    return "\n".join(
        [
            f"{public_name(spec.model)} as {kind} on {planned.device.type}; {folder}: {len(there) or 'no'} records\n",
            to_markdown(Table("methods", "Methods", _METHODS_NOTE, ["method", "options"], _methods(planned), labels=2)),
            to_markdown(Table("cells", "Requests", _CELLS_NOTE, _HEAD, [_row(cell, prompts) for cell in cells], 2)),
            _time(ahead),
            _memory(planned, model, prompts, ranks),
        ]
    )


def _dtype(planned: Plan) -> torch.dtype:
    return resolve_dtype(planned.spec.dtype, planned.device)


def _prompts(planned: Plan, model: Outline) -> Prompts:
    found = {task.label: read_prompts(task, planned, model) for task in planned.tasks}
    for task, prompts in found.items():
        check_turns(planned.spec.batch, task, turns=any(prompt.later for prompt in prompts))
    return found


def _recorded(planned: Plan, folder: Path) -> list[Record]:
    """Answers that the run would go on from.

    Raises:
        InputError: the folder holds something else, or answers of other code that nobody wants to ask again.
    """
    manifest = found_by(folder, planned.manifest())
    if manifest is None:
        return []
    records = answered(folder)
    found = changes(planned, manifest, {(record.method, record.task): record.cell for record in records})
    if found.besides(planned.spec.redo):
        raise InputError(refusal(found, str(folder)))
    stale = set(found.cells.values())
    return [record for record in records if record.cell not in stale]


def _asked(prompts: Sequence[Prompt]) -> Asked:
    lengths = [len(prompt.request.prompt) for prompt in prompts]
    return Asked(sum(1 + len(prompt.later) for prompt in prompts), round(mean(lengths)))


def _methods(planned: Plan) -> list[list[Cell]]:
    return [[label(method.label), label(_options(method) or "none")] for method in planned.methods]


def _options(method: MethodSpec) -> str:
    """`budget=0.5:window=16`, those left out that have no value; behind a plus those of the sparse prefill."""
    values = ((name, getattr(method.options, name)) for name in type(method.options).model_fields)
    own = ":".join(f"{name}={written(value)}" for name, value in values if value is not None)
    return own if method.sparse is None else f"{own}+{_options(method.sparse)}"


_HEAD = ["task", "method", "requests", "longest", "time", "from"]


def _row(cell: CellEstimate, prompts: Prompts) -> list[Cell]:
    longest = max(len(prompt.request.prompt) for prompt in prompts[cell.task])
    return [
        label(cell.task),
        label(cell.method),
        number(cell.samples, str(cell.samples)),
        number(longest, str(longest)),
        number(cell.seconds, "?" if cell.seconds is None else formats.duration(cell.seconds)),
        Cell(cell.source),
    ]


def _time(ahead: Ahead) -> str:
    said = f"{ahead.requests} requests, {ahead.left} left"
    if not ahead.left or ahead.seconds is None:
        return f"{said}: nothing to ask." if not ahead.left else f"{said}."
    return f"{said}: {TAKES[ahead.source].format(formats.duration(ahead.seconds))}; loading comes on top."


def _memory(planned: Plan, model: Outline, prompts: Prompts, ranks: Ranks) -> str:
    """Weights, and what full attention keeps of the longest requests that are there at once."""
    spec, device, dtype, shape = planned.spec, planned.device, _dtype(planned), ranks.part(model.shape)
    weights = weight_bytes(model.shape, model.tied, dtype, ranks)
    together = {task.label: load.most if (load := load_of(task)) else spec.batch for task in planned.tasks}
    tokens = max(min(together[task], len(each)) * _most_tokens(each) for task, each in prompts.items())
    kept = tokens * shape.layers * shape.kv_bytes_per_token(dtype.itemsize)
    free = free_bytes(device) if spec.memory_limit is None else min(free_bytes(device), spec.memory_limit * 2**30)
    verdict = "fits" if weights + kept <= free else "WILL NOT FIT"
    return (
        f"Memory: {formats.size(weights)} of weights and {formats.size(kept)} of keys and values (full attention, "
        f"{tokens} tokens): {verdict}, {formats.size(free)} are free. What a prefill works with comes on top."
    )


def _most_tokens(prompts: Sequence[Prompt]) -> int:
    return max(len(prompt.request.prompt) + prompt.request.to_come for prompt in prompts)


def _ranks(size: int) -> Ranks:
    """One of so many; it has nobody to talk to."""
    ranks = Ranks()
    ranks.size = size
    return ranks
