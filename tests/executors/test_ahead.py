"""Samples are made once for all orders of a run, and the answers are those of orders that make them anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.runner.ahead import Answering
from harness.runner.catalog import TASKS
from harness.runner.orders import Answered, Listing, Order, answer, read_message
from harness.runner.spec import RunSpec
from harness.runner.worker import MethodWorker
from harness.storage.record import Record
from tasks.base import Sample, Tokenizer
from tasks.speed import Speed
from tests.test_cli import random_model

TASK = "speed:lengths=64:repeats=3:new_tokens=2"
OWN = """
from pathlib import Path
from tasks.speed import Speed
with Path(__file__).with_name("imports").open("a") as log: log.write("x")
class Own(Speed):
    name = "made_ahead"
"""


def line(folder: Path, task: str = TASK, samples: list[str] | None = None, files: tuple[Path, ...] = ()) -> bytes:
    """An order of a run of a tiny model."""
    model = random_model(folder)
    spec = RunSpec(model=model, methods="full,recent", tasks=task, device="cpu", timing=False)
    asked = None if samples is None else {task: samples}
    order = Order(worker=MethodWorker, spec=spec, folder=folder, samples=asked, task_files=list(files))
    return order.model_dump_json().encode()


def answers(messages: Iterator[bytes]) -> list[Record]:
    found = [said.record for said in map(read_message, messages) if isinstance(said, Answered)]
    return [record.model_copy(update={"worker": {}, "e2e_s": None, "peak_memory_bytes": None}) for record in found]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line each time when samples are made; folder and tasks are afterwards as they were."""
    TASKS.names()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TASKS, "_classes", TASKS._classes.copy())
    calls, real = list[str](), Speed.samples

    def samples(task: Speed, tokenizer: Tokenizer) -> Iterator[Sample]:
        calls.append(task.label)
        return real(task, tokenizer)

    monkeypatch.setattr(Speed, "samples", samples)
    return calls


def test_orders_find_the_samples_that_were_made_ahead(tmp_path: Path, made: list[str]) -> None:
    answering, unit = Answering(), line(tmp_path, samples=["64-1"])
    assert answering.ahead(line(tmp_path)) and made == [TASK]
    assert not answering.ahead(unit)
    (listing,) = [each for each in map(read_message, answering(line(tmp_path))) if isinstance(each, Listing)]
    assert [sample for _, sample in listing.tasks[0][1]][::2] == ["64-0", "64-1", "64-2"]
    found = answers(answering(unit))
    assert made == [TASK] and len(found) == 2
    assert found == answers(answer(unit, {})) and made == [TASK, TASK]


def test_another_run_has_other_samples(tmp_path: Path, made: list[str]) -> None:
    answering, longer = Answering(), TASK.replace("64", "80")
    assert answering.ahead(line(tmp_path)) and answering.ahead(line(tmp_path, longer))
    (first, _) = answers(answering(line(tmp_path, longer, ["80-0"])))
    assert made == [TASK, longer] and first.prompt_tokens == 80
    assert len(answers(answering(line(tmp_path, samples=["64-0"])))) == 2 and made[2:] == [TASK]


def test_a_file_of_tasks_is_loaded_once(tmp_path: Path, made: list[str]) -> None:
    file, task = tmp_path / "own.py", TASK.replace("speed", "made_ahead")
    file.write_text(OWN)
    answering, unit = Answering(), line(tmp_path, task, ["64-0"], (file,))
    assert answering.ahead(unit)
    assert len(answers(answering(unit))) == 2
    assert made == [task] and (tmp_path / "imports").read_text() == "x"
