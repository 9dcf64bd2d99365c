"""Records of a study that other code made: told before anything is asked, and asked again where `--redo` says so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from harness.errors import InputError
from harness.runner.changes import Changes, changes, refusal
from harness.runner.plan import chosen, plan
from harness.runner.spec import RunSpec, WrongOption
from harness.storage.store import MANIFEST, answered, load_manifest
from harness.study.runs import StudyRun


def with_redo(runs: Sequence[StudyRun], redo: str) -> list[StudyRun]:
    """The runs, each with those of the patterns that fit one of its methods.

    Raises:
        WrongOption: one fits no method of any run.
    """
    patterns = [one.strip() for one in redo.split(",") if one.strip()]
    fitting = [[one for one in patterns if _fits(one, run)] for run in runs]
    for one in patterns:
        if not any(one in own for own in fitting):
            raise WrongOption("redo", f"{one!r} fits no method of these runs")
    specs = [run.spec.model_copy(update={"redo": ",".join(own)}) for run, own in zip(runs, fitting, strict=True)]
    return [replace(run, run=replace(run.run, spec=spec)) for run, spec in zip(runs, specs, strict=True)]


def _fits(pattern: str, run: StudyRun) -> bool:
    return any(chosen(pattern, one.label) for one in run.methods if one.label is not None)


def changed(spec: RunSpec, folder: Path) -> Changes:
    """How the code that is here differs from that of a run's records; not at all where there are none of this run."""
    if not (folder / MANIFEST).is_file() or (manifest := load_manifest(folder)).run_hash != spec.run_hash():
        return Changes({}, [], [])
    cells = {(record.method, record.task): record.cell for record in answered(folder)}
    return changes(plan(spec), manifest, cells)


def check_code(runs: Sequence[StudyRun], folder: Path, samples: int | None = None) -> list[str]:
    """What has records of other code that nobody wants to ask again.

    Args:
        runs: of the study.
        folder: of the study.
        samples: of each task at most, if fewer than the study's own.

    Returns:
        A line if runs that are whole have some: they stay as they are.

    Raises:
        InputError: runs that are to go on have some; all of them in one line.
    """
    found = {run.folder: changed(run.spec, folder / run.folder) for run in runs}
    stale = [run for run in runs if found[run.folder].besides(run.spec.redo)]
    whole = [run.folder for run in stale if _whole(run, folder, samples)]
    if begun := [run.folder for run in stale if run.folder not in whole]:
        raise InputError(_told(folder, begun, found))
    return [f"not asked again, since nothing is missing: {_told(folder, whole, found)}"] if whole else []


def _whole(run: StudyRun, folder: Path, samples: int | None) -> bool:
    manifest = load_manifest(folder / run.folder)
    wanted = min(run.spec.limit or math.inf, samples or math.inf)
    return manifest.status == "complete" and (manifest.spec.get("limit") or math.inf) >= wanted


def _told(folder: Path, names: Sequence[str], found: Mapping[str, Changes]) -> str:
    """Of several runs what one says of itself."""
    methods = dict.fromkeys(one for name in names for one in found[name].methods)
    others = dict.fromkeys(one for name in names for one in found[name].others)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    every = all(found[name].every for name in names)
    return refusal(Changes({}, [*methods], [*others], every), f"{folder / names[0]}{more}")
