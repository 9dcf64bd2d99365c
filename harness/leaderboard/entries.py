"""Runs as they stand on a board, and which of them may be put side by side.

Scores go together where model, weights, numbers and protocol are the same; times where the device, how many of them
share the model, the kernels and the batch are too. A task whose code, or whose cut of long prompts, differs is another
task. What differs is said, and never mixed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from harness.errors import InputError
from harness.report import formats
from harness.report.recorded import Recorded, read
from harness.runner.catalog import METHODS
from harness.statistics.paired import REFERENCE


@dataclass(frozen=True)
class Entry:
    """One run.

    Attributes:
        name: unique on the board; also the folder of its page.
        folder: of its records.
        run: its records.
        budget: share that its methods were matched to; NaN where nobody did.
        names: method label -> what it is called on the board; labels that are not here are themselves.
        unmatched: labels that meet no budget whatever the run's is: they keep everything, and read it.
    """

    name: str
    folder: Path
    run: Recorded
    budget: float = math.nan
    names: Mapping[str, str] = field(default_factory=dict)
    unmatched: Collection[str] = ()


class Conditions(NamedTuple):
    """What must be equal; the names of the fields are said where they differ."""

    model: str
    weights: str
    numbers: str
    protocol: str
    device: str = ""
    kernels: str = ""
    ranks: int = 1
    batch: int = 1

    @property
    def place(self) -> str:
        """The device, or how many of it."""
        return f"{self.ranks} x {self.device}" if self.ranks > 1 else self.device


@dataclass(frozen=True)
class Group:
    """Runs that go together.

    Attributes:
        conditions: that they share.
        entries: the runs.
    """

    conditions: Conditions
    entries: list[Entry]

    @property
    def title(self) -> str:
        """In words: model, protocol, and device where it counts."""
        said = self.conditions
        batch = f"batch {said.batch}" if said.batch > 1 else ""
        return ", ".join(filter(None, [said.model, said.numbers, asked(said.protocol), said.place, batch]))


def asked(protocol: str) -> str:
    """When the question was asked, in words."""
    return "question after the context" if protocol == "after" else "question in the prompt"


def read_entries(folders: Sequence[Path]) -> tuple[list[Entry], list[str]]:
    """Runs under the shortest names that tell them apart, and a line for each that compares with nothing.

    Raises:
        InputError: a folder is no run or corrupt; no run has full attention.
    """
    found = [read_entry(name, folder) for name, folder in zip(_names(folders), folders, strict=True)]
    good = [entry for entry in found if REFERENCE in entry.run.methods]
    if not good:
        raise InputError(f"no run has records of {REFERENCE!r}, which everything is compared with")
    bare = [entry.name for entry in found if entry not in good]
    return good, [f"{name} is left out: it has no records of {REFERENCE!r}." for name in bare]


def read_entry(name: str, folder: Path) -> Entry:
    """One run; of a study's, whose folder is named for the budget, methods go by their names alone.

    The options that meet one budget differ from length to length and from model to model.

    Raises:
        InputError: the folder is no run, or corrupt.
    """
    run, budget = read(folder), _BUDGET.match(folder.name)
    if budget is None:
        return Entry(name, folder, run)
    methods = {label: label.partition(":")[0] for label in run.methods}
    counts = Counter(methods.values())
    names = {label: method for label, method in methods.items() if counts[method] == 1}
    return Entry(name, folder, run, float(budget[1]), names, list(_unmatched(run)))


def _unmatched(run: Recorded) -> Iterator[str]:
    """Sparse prefills, say; of methods that keep all and attend to a share the share is what was matched."""
    for label, kept in run.contenders.groupby("method", sort=False)["kept_fraction"].mean().items():
        name = str(label).partition(":")[0]
        attends = name in METHODS.names() and METHODS.get(name).counted == "attended"
        if kept == 1 and not attends:
            yield str(label)


_BUDGET = re.compile(r"kept=([0-9.]+)-")


def scored(entry: Entry) -> Conditions:
    """What scores depend on."""
    manifest, facts = entry.run.manifest, entry.run.manifest.facts
    return Conditions(
        manifest.model,
        str(facts.get("weights_hash", ""))[:12],
        str(facts.get("dtype", "")),
        str(manifest.spec.get("question", "prompt")),
    )


def timed(entry: Entry) -> Conditions:
    """What times depend on."""
    manifest = entry.run.manifest
    kernels = " ".join(str(manifest.facts.get(key, "")) for key in ("attention", "engine"))
    return scored(entry)._replace(
        weights="",  # they do not change times, and a random model's are made anew by every version
        device=formats.device(manifest),
        kernels=kernels.strip(),
        ranks=int(manifest.spec.get("tensor_parallel", 1)),
        batch=int(manifest.spec.get("batch", 1)),
    )


def grouped(entries: Sequence[Entry], conditions: Callable[[Entry], Conditions]) -> list[Group]:
    """Runs that go together, the largest group first."""
    found: dict[Conditions, list[Entry]] = {}
    for entry in entries:
        found.setdefault(conditions(entry), []).append(entry)
    size = {key: sum(len(entry.run.contenders) for entry in members) for key, members in found.items()}
    return [Group(key, found[key]) for key in sorted(found, key=lambda key: -size[key])]


def apart(groups: Sequence[Group], what: str) -> Iterator[str]:
    """Why groups are not one, a line each: what differs from the first."""
    for group in groups[1:]:
        first = groups[0].conditions
        differs = [
            f"{name} ({_said(mine)} beside {_said(theirs)})"
            for name, mine, theirs in zip(Conditions._fields, group.conditions, first, strict=True)
            if mine != theirs
        ]
        yield f"{what} of {', '.join(entry.name for entry in group.entries)} stand apart: other {', '.join(differs)}."


def versions(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """Task label -> digests of its code among runs, where there are several."""
    found: dict[str, dict[str, None]] = {}
    for entry in entries:
        for task in entry.run.tasks:
            found.setdefault(task, {})[version(entry, task)] = None
    return {task: list(digests) for task, digests in found.items() if len(digests) > 1}


def edited(entries: Sequence[Entry]) -> list[str]:
    """Names of methods whose code differs among runs; older runs do not say."""
    found: dict[str, set[str]] = {}
    for entry in entries:
        for label, source in (entry.run.manifest.facts.get("method_sources") or {}).items():
            name = "+".join(item.partition(":")[0] for item in label.split("+"))
            found.setdefault(name, set()).add(source)
    return [name for name, sources in found.items() if len(sources) > 1]


def version(entry: Entry, task: str) -> str:
    """Digest of a task's code in a run, empty in runs that do not say, and how long prompts might be."""
    manifest = entry.run.manifest
    sources, longest = manifest.facts.get("task_sources") or {}, manifest.spec.get("max_length")
    return str(sources.get(task, ""))[:8] + (f" to {longest}" if longest else "")


def _said(value: object) -> str:
    return str(value) or "none said"


def _names(folders: Sequence[Path]) -> list[str]:
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({one[-depth:] for one in parts}) < len(parts):
        depth += 1
    return ["/".join(one[-depth:]) for one in parts]
