"""RULER's prediction files: one JSONL file a task, named after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from harness.errors import InputError
from tasks.common.means import found_means
from tasks.common.records import local_rows
from tasks.ruler.members import MEMBERS, find
from tasks.ruler.scores import score


def score_one(path: Path, name: str) -> dict[str, float]:
    """The task's score as RULER's script prints it: mean times 100, two decimals.

    Args:
        path: JSONL with the columns `pred` and `outputs`, or `output` where there is one reference; others may follow.
        name: of the task.

    Raises:
        InputError: there is no such task, the file or a line is unreadable, or a field is missing or of another type.
    """
    metric = find(name).metric
    scores = [score(metric, prediction, wanted) for prediction, wanted in _predictions(path)]
    return {name: round(100 * sum(scores) / len(scores), 2)}


def score_folder(folder: Path) -> dict[str, float]:
    """The scores of all files in a folder that are named after tasks, and RULER's mean, which says if it lacks some.

    Raises:
        InputError: there are none, or as `score_one`.
    """
    files = {name: path for name in MEMBERS if (path := folder / f"{name}.jsonl").is_file()}
    if not files:
        raise InputError(f"{folder} holds no prediction file of RULER's, such as vt.jsonl")
    scores = {name: value for name, path in files.items() for value in score_one(path, name).values()}
    means = {mean.name: mean.groups[0] for mean in found_means([f"ruler/{name}" for name in scores])}
    return scores | {mean: round(sum(scores.values()) / len(labels), 2) for mean, labels in means.items()}


def _predictions(path: Path) -> Iterator[tuple[str, list[str]]]:
    for place, row in local_rows(path):
        prediction, wanted = row.get("pred"), row.get("outputs", [row.get("output")])
        if not isinstance(prediction, str):
            raise InputError(f"{place}: field 'pred' must be a text")
        if not (isinstance(wanted, list) and wanted and all(isinstance(one, str) for one in wanted)):
            raise InputError(f"{place}: field 'outputs' must be a list of at least one text")
        yield prediction, wanted
