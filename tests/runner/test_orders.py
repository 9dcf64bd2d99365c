"""Orders and messages: what a worker in another process is told, and what it says."""

from __future__ import annotations

import errno
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import pytest

from harness.errors import InputError
from harness.runner.execute import Job, Key
from harness.runner.orders import Answered, Fault, Hello, Listing, Message, Order, Others, Terms, answer, read_message
from harness.runner.plan import CellSpec, Plan
from harness.runner.prompts import encode_with_question
from harness.runner.spec import RunSpec
from harness.runner.worker import MethodWorker
from tasks.base import Sample
from tests.test_cli import random_model

TASKS = "needle:lengths=192:depths=0.5:repeats=3:new_tokens=2,speed:lengths=256:new_tokens=1:repeats=2"
FULL = OSError(errno.ENOSPC, "No space left on device", "/home/someone/cache")


def order(folder: Path, worker: Any = MethodWorker, tasks: str = TASKS, **more: Any) -> Order:
    spec = RunSpec(model=random_model(folder), methods="full,recent", tasks=tasks, device="cpu", timing=False)
    return Order(worker=worker, spec=spec, folder=folder, **more)


def said(asked: Order) -> list[Message]:
    return [read_message(line) for line in answer(asked.model_dump_json().encode(), {})]


def surveyed(asked: Order) -> tuple[Hello, Listing]:
    hello, listing = said(asked)
    assert isinstance(hello, Hello) and isinstance(listing, Listing)
    return hello, listing


def test_a_survey_lists_every_request_in_its_order_and_an_order_answers_its_own(tmp_path: Path) -> None:
    hello, listing = surveyed(order(tmp_path))
    assert [len(keys) for _, keys in listing.tasks] == [6, 4]
    keys = listing.tasks[0][1]
    task, ids = listing.tasks[0][0], list(dict.fromkeys(sample for _, sample in keys))
    some = {task: ids[1:]}
    greeting, *messages = said(order(tmp_path, samples=some, done=keys[2:3], terms=hello.terms))
    assert isinstance(greeting, Hello) and greeting.terms == hello.terms
    records = [message.record for message in messages if isinstance(message, Answered)]
    assert len(records) == len(messages) == 3
    assert [(record.cell, record.sample) for record in records] == keys[3:]
    # The third sample begins with the other method, as in the whole run.
    assert [record.method for record in records] == ["full", "recent", "full"]
    assert all(record.worker == greeting.worker for record in records)


def test_an_order_tokenises_its_own_samples_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []

    def noted(sample: Sample, *others: Any) -> Any:
        encoded.append(sample.id)
        return encode_with_question(sample, *others)

    monkeypatch.setattr("harness.runner.samples.encode_with_question", noted)
    hello, listing = surveyed(order(tmp_path))
    assert len(set(encoded)) == 5, "the survey checks them all"
    first, keys = listing.tasks[0]
    encoded.clear()
    said(order(tmp_path, samples={first: [keys[-1][1]]}, done=keys, terms=hello.terms))
    assert set(encoded) == {keys[-1][1]}


def test_a_worker_that_is_not_like_the_first_is_refused_before_it_loads(tmp_path: Path) -> None:
    terms = surveyed(order(tmp_path))[0].terms
    older = Terms(software=terms.software | {"transformers": "1.0"}, facts=terms.facts)
    (fault,) = said(order(tmp_path, Unloadable, samples={}, terms=older))
    assert isinstance(fault, Fault) and fault.whose == "machine"
    assert "is refused: transformers is" in fault.text and "and 1.0 where the run began" in fault.text
    other = Terms(software=terms.software, facts=terms.facts | {"weights_hash": "other"})
    (fault,) = said(order(tmp_path, samples={}, terms=other))
    assert isinstance(fault, Fault) and "is refused: weights_hash is" in fault.text


class Unloadable:
    """A worker that cannot be made; `raised` says why."""

    raised: Exception = ValueError("my own bug")

    def __init__(self, plan: Plan) -> None:
        raise self.raised

    @staticmethod
    def plan(spec: RunSpec) -> Plan:
        return MethodWorker.plan(spec)

    def facts(self) -> dict[str, Any]:
        return {}

    def jobs(self, cells: Sequence[CellSpec], done: Set[Key]) -> list[Job]:
        return []


@pytest.mark.parametrize(
    ("error", "whose", "text"),
    [
        (FULL, "machine", "No space left on device"),
        (InputError("the model is bad"), "input", "the model is bad"),
        (ValueError("my own bug"), "code", "ValueError: my own bug"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/home/someone/x"), "code", "No such file"),
    ],
)
def test_what_ends_a_worker_is_told_in_a_line_without_paths(
    error: Exception, whose: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Unloadable, "raised", error)
    (fault,) = said(order(tmp_path, Unloadable))
    assert isinstance(fault, Fault) and (fault.whose, text in fault.text) == (whose, True)
    assert "\n" not in fault.text and "/home" not in fault.text


def test_an_order_leaves_all_others_alone() -> None:
    others = Others(["a"], [("cell", "a")])
    assert ("other cell", "a") not in others
    assert ("cell", "a") in others and ("other cell", "b") in others and len(others) == 1
