"""What of the code has changed since a run's records were made, and `--redo`: whose requests are asked again for that.

A cell's hash holds the sources of engine, method and task, and versions of packages. Made once more with those that the
manifest names, it says which of them it was. Records of changed cells stay in the file, and are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from harness.errors import InputError
from harness.runner.plan import Plan, Sources, chosen, names
from harness.runner.progress import Progress
from harness.runner.spec import cell_hash
from harness.statistics.paired import REFERENCE
from harness.storage.store import Manifest, RunStore

Cells = Mapping[tuple[str, str], str]
"""Labels of method and task -> hash of their cell."""


_SAYS = {"weights_hash", "dtype", "attention", "engine", "method_sources", "task_sources"}
"""Facts of a run whose cells are hashes by `cell_hash`, which other workers' need not be."""


@dataclass(frozen=True)
class Changes:
    """How the code differs from that of a run's records.

    Attributes:
        cells: those that have records of other code.
        methods: names of methods whose code changed.
        others: what else did, in words.
        every: whether no method is as it was.
    """

    cells: Cells
    methods: list[str]
    others: list[str]
    every: bool = False

    def __str__(self) -> str:
        several = "methods" if len(self.methods) > 1 else "method"
        named = ["all methods"] if self.every else [f"{several} {', '.join(self.methods)}"] if self.methods else []
        return ", ".join([*self.others, *named])

    def besides(self, redo: str) -> list[str]:
        """Labels of methods with records of other code that the patterns of `redo` do not choose."""
        return list(dict.fromkeys(method for method, _ in self.cells if not chosen(redo, method)))


def check_code(
    plan: Plan, store: RunStore, progress: Progress, packages: Mapping[str, str | None] | None = None
) -> None:
    """Leaves records of other code aside where `plan.spec.redo` says so.

    Args:
        plan: of the run.
        store: of the run.
        progress: is told what is asked again.
        packages: their versions where requests are answered, if that is not here.

    Raises:
        InputError: the run has records of other code that are not to be asked again.
    """
    found = changes(plan, store.manifest, store.cells, packages)
    if found.besides(plan.spec.redo):
        raise InputError(refusal(found, str(store.folder)))
    if found.cells:
        progress.say(_again(plan, store, found))


def refusal(found: Changes, where: str) -> str:
    """What changed, and how to go on, in one line."""
    who = "'*'" if found.others or found.every else ",".join(found.methods)
    return (
        f"{where}: code changed since it was started: {found}; --redo {who} asks again what was answered by that, and "
        "all other records stay; another --output begins anew"
    )


def _again(plan: Plan, store: RunStore, found: Changes) -> str:
    """Leaves them aside, and says so."""
    # Runs of random weights are for times alone, which are worth something side by side.
    alone = store.manifest.latency_only
    cells = store.cells if alone else found.cells
    count, methods = store.leave_aside(set(cells.values())), len({method for method, _ in cells})
    said = (
        f"{store.folder}: changed: {found}; {count} requests of {methods} methods are asked again, and their earlier "
        "records stay, unread"
    )
    if alone:
        return f"{said}; all methods' are, for times are of methods side by side"
    apart = plan.spec.timing and all(method != REFERENCE for method, _ in cells)
    return said + (f"; their times stand without a pair, for those of {REFERENCE} are of another time" if apart else "")


def changes(plan: Plan, manifest: Manifest, cells: Cells, packages: Mapping[str, str | None] | None = None) -> Changes:
    """Compares the code that is here with that of records; where a manifest does not say enough, nothing changed.

    Args:
        plan: of the run.
        manifest: of its records.
        cells: that have records.
        packages: see `check_code`.
    """
    if not (cells and manifest.facts.keys() >= _SAYS):
        return Changes({}, [], [])
    now = plan.sources(packages)
    made = _hashes(plan, manifest, cells, now)
    changed = {name: cell for name, cell in cells.items() if made[name] != cell}
    before = _recorded(now, manifest)
    again = _hashes(plan, manifest, changed, before)
    strange = {task for (method, task), cell in changed.items() if again[method, task] != cell}
    labels, tasks = (dict.fromkeys(name[place] for name in changed) for place in (0, 1))
    methods = (_edited(label, before.methods[label], now.methods[label]) for label in labels)
    others = [
        *(f"{name} {before.versions[name]} (now {here})" for name, here in _newer(before, now)),
        *(["the engine"] if strange == {task for _, task in cells} else [f"the data of {task}" for task in strange]),
        *(f"task {task}" for task in tasks if before.tasks[task] != now.tasks[task]),
    ]
    edited = list(dict.fromkeys(chain(*methods)))
    every = {name for method in plan.methods for name in names(method.label)} == {*edited}
    return Changes(changed, edited, others if changed else [], every)


def _newer(before: Sources, now: Sources) -> Iterator[tuple[str, str]]:
    """Packages whose versions are others, and those that are here."""
    return ((name, here) for name, here in now.versions.items() if before.versions[name] != here)


def _hashes(plan: Plan, manifest: Manifest, names: Cells, sources: Sources) -> dict[tuple[str, str], str]:
    """Of cells with these sources, on the weights and kernels that the run has."""
    facts, tasks = manifest.facts, {task.label: task for task in plan.tasks}
    methods = {method.label: method for method in plan.methods}
    on = (facts["weights_hash"], f"torch.{facts['dtype']}", f"{facts['attention']}, {facts['engine']}")
    return {
        (method, task): cell_hash(plan.spec, methods[method], tasks[task], *on, sources.of(method, task))
        for method, task in names
    }


def _recorded(now: Sources, manifest: Manifest) -> Sources:
    """As the manifest has them."""
    methods, tasks = (manifest.facts[name] for name in ("method_sources", "task_sources"))
    packages = next(iter(manifest.environments), {}).get("packages", {})
    return Sources(
        now.engine,
        {label: methods.get(label, source) for label, source in now.methods.items()},
        {label: tasks.get(label, source) for label, source in now.tasks.items()},
        {name: packages.get(name) or version for name, version in now.versions.items()},
    )


def _edited(label: str, before: str, now: str) -> Iterator[str]:
    """Names in a label whose sources differ (`method_source`)."""
    parts = zip(names(label), before.split("+"), now.split("+"), strict=True)
    return (name for name, was, is_now in parts if was != is_now)
