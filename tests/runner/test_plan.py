"""A cell is values alone: whoever is sent them makes the same cell, and gets the same answers from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.errors import InputError, MissingPackage
from harness.runner.loaded import load_run
from harness.runner.plan import CellSpec, plan
from harness.runner.spec import RunSpec, WrongOption
from harness.runner.worker import MethodWorker
from harness.storage.record import Record
from tasks.ruler.corpora import essay_words
from tests.test_cli import tiny


def spec(folder: Path) -> RunSpec:
    """Two tasks, one of them at a path, under three methods, one of them full attention again."""
    line = {"prompt": "one two three", "answers": ["four"], "metric": "exact_match"}
    (folder / "own.jsonl").write_text(json.dumps(line) + "\n")
    tasks = f"speed:lengths=64:new_tokens=2:repeats=2,jsonl:file={folder / 'own.jsonl'}:new_tokens=2"
    return RunSpec(model=tiny(folder), methods="full,slim", tasks=tasks, noise_floor=True, device="cpu")


def sent(cell: CellSpec) -> CellSpec:
    """What arrives where it is sent as text."""
    return CellSpec.model_validate_json(cell.model_dump_json())


def answered(worker: MethodWorker, cells: list[CellSpec]) -> list[tuple[str, str, list[float]]]:
    records: list[Record] = [job() for job in worker.jobs(cells, frozenset())]
    return [(record.cell, record.sample, list(record.tokens_kept)) for record in records]


def test_a_cell_that_was_sent_as_text_is_the_same_cell(tmp_path: Path) -> None:
    here = plan(spec(tmp_path))
    cells = [cell for group in here.cells() for cell in group]
    assert len(cells) == 2 * 3
    loaded = load_run(here)
    for cell in cells:
        there = load_run(plan(sent(cell).run))
        assert there.bind(sent(cell)).hash == loaded.bind(cell).hash


def test_a_worker_made_of_what_was_sent_gives_the_same_answers(tmp_path: Path) -> None:
    here = plan(spec(tmp_path))
    for cells in here.cells():
        arrived = [sent(cell) for cell in cells]
        elsewhere = MethodWorker(plan(arrived[0].run))
        assert answered(elsewhere, arrived) == answered(MethodWorker(here), cells)


def test_what_is_recorded_is_not_asked_again(tmp_path: Path) -> None:
    here = plan(spec(tmp_path))
    worker, cells = MethodWorker(here), here.cells()[0]
    first = worker.jobs(cells, frozenset())[0]()
    assert len(worker.jobs(cells, {(first.cell, first.sample)})) == len(cells) * 2 - 1


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"limit": 0}, "limit"),
        ({"max_length": 1}, "max_length"),
        ({"sed": 1}, "sed"),
        ({"methods": ""}, "methods"),
        ({"methods": "full,"}, "methods"),
        ({"tasks": " "}, "tasks"),
        ({"model": ""}, "model"),
    ],  # fmt: skip
)
def test_a_value_that_does_not_fit_is_named_as_an_option(given: dict[str, object], option: str) -> None:
    with pytest.raises(WrongOption, match="--" + option.replace("_", "-")) as caught:
        RunSpec.read(given)
    assert caught.value.option == option and isinstance(caught.value, InputError)


def test_packages_that_are_missing_are_told_together(monkeypatch: pytest.MonkeyPatch) -> None:
    essay_words.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("methods.common.key_index.find_spec", lambda name: None)
    asked = RunSpec(
        model="random:llama-3.1-8b", methods="full,retrieval:index=flat", tasks="ruler/vt,ruler/niah_single_2"
    )
    with pytest.raises(MissingPackage, match=r"needlehaystack and wonderwords.*harness\[ruler\].*; .*install faiss"):
        plan(asked)
