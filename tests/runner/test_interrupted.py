"""Ctrl-C, the same for every command that records: what is there is drawn and printed, the same command goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.storage.record import Record
from harness.storage.samples import SAMPLES
from harness.storage.store import RunStore, load_manifest
from tests.command import run
from tests.test_cli import random_model

pytestmark = pytest.mark.slow

GRID = "model: {model}\nmethods: [full, slim]\ntasks: speed:repeats=2:new_tokens=2\nlengths: 256\n"
SPEED = ["--methods", "full,slim", "--tasks", "speed:lengths=256:new_tokens=2:repeats=2"]
SLIMINFER = ["--lengths", "256", "--new-tokens", "1,2", "--repeats", "1", "--undecided", "pass"]
DIFFUSION = ["--lengths", "400", "--depths", "0.5", "--repeats", "2", "--layers", "2", "--arms", "needle"]


def command(name: str, folder: Path, model: str) -> list[object]:
    """A command that has at least three answers to record in `folder`."""
    place: list[object] = ["--model", model, "--device", "cpu", "--output", folder]
    if name == "resume":
        assert run("run", *SPEED, "--limit", "1", *place) == 0
        return ["resume", folder, "--samples", "2", "--model", model]
    if name == "sweep":
        grid = folder.parent.with_suffix(".yaml")
        grid.write_text(GRID.format(model=model))
        return ["sweep", grid, "--output", folder.parent]
    return {
        "run": ["run", *SPEED, *place],
        "sliminfer": ["reproduce", "sliminfer", *SLIMINFER, *place],
        "diffusion": ["reproduce", "diffusion", *DIFFUSION, *place],
    }[name]


def interrupt_at(number: int, patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the `number`-th record is being written."""
    append = RunStore.append

    def interrupted(store: RunStore, record: Record) -> None:
        if len(store.done) + 1 == number:
            raise KeyboardInterrupt
        append(store, record)

    patch.setattr(RunStore, "append", interrupted)


@pytest.mark.parametrize(
    ("name", "page"),
    [(name, "table.md") for name in ("run", "resume", "sweep", "sliminfer")] + [("diffusion", "diffusion.md")],
)
def test_what_is_recorded_is_drawn_and_the_same_command_goes_on(
    name: str, page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out/config.json"
    arguments = command(name, folder, random_model(tmp_path))
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(3, patch)
        assert run(*arguments) == 130
    printed, said = capsys.readouterr()
    assert load_manifest(folder).status == "incomplete"
    assert "incomplete" in (drawn := (folder / page).read_text()) and drawn in printed
    assert said.splitlines()[-1].startswith(f"harness: interrupted; {folder} is marked incomplete; to go on: the same")
    recorded = (folder / SAMPLES).read_text()
    assert recorded.count("\n") == 2
    assert run(*arguments) == 0
    assert load_manifest(folder).status == "complete" and (folder / SAMPLES).read_text().startswith(recorded)


def test_with_nothing_recorded_it_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out/config.json"
    for name in ("run", "diffusion"):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(1, patch)
            assert run(*command(name, folder / name, random_model(tmp_path))) == 130
        assert "to go on: the same command" in capsys.readouterr().err.splitlines()[-1]
        assert load_manifest(folder / name).status == "incomplete"
