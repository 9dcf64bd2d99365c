"""Fixtures that several tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collectstart() -> None:
    """Where tests are collected, that is not in the process that hands them out: its workers wait for its imports."""
    import torch

    if not torch.cuda.is_available():
        # Triton asks when it decorates a kernel, so this must be said before anything imports one.
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """What was imported stays: whoever collects garbage need not look through it, nor look every moment."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_sessionfinish() -> None:
    """Nor need whoever ends look through what tests left behind."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def embedded_model_once() -> Iterator[None]:
    """The embedded model is read once a process and cache folder, its tokenizer too: no test changes either."""
    from harness.engine.parallel import ALONE, Ranks
    from harness.models import smollm2
    from harness.models.smollm2 import SmolLM2
    from harness.storage.user_cache import cache_dir

    load, tokenizer = SmolLM2.load, SmolLM2.tokenizer

    @cache
    def loaded(cache_folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
        model = SmolLM2()
        return load(model, model.config(), device, dtype)

    @cache
    def read(cache_folder: Path) -> Any:
        model = SmolLM2()
        return tokenizer(model, model.config())

    def once(model: SmolLM2, config: Any, device: torch.device, dtype: torch.dtype, ranks: Ranks = ALONE) -> Any:
        # On a GPU an engine joins weights in place.
        if device.type == "cpu" and ranks is ALONE:
            return loaded(cache_dir(), device, dtype)
        return load(model, config, device, dtype, ranks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SmolLM2, "load", once)
        patch.setattr(SmolLM2, "tokenizer", lambda model, config: read(cache_dir()))
        patch.setattr(smollm2, "tokenizer", cache(smollm2.tokenizer))
        yield


@pytest.fixture(scope="session", autouse=True)
def what_does_not_change_once() -> Iterator[None]:
    """The command line is built, and the environment's packages are looked up, once a process."""
    import typer.main

    from harness.measuring import provenance

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((typer.main, "get_command"), (provenance, "_version")):
            patch.setattr(module, name, cache(getattr(module, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def rows_are_stored_many_at_a_time() -> Iterator[None]:
    """Interpreted, a program takes about as long for 64 rows as for the 8 that it stores on a GPU."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available() and find_spec("triton") is not None:
            patch.setattr("harness.engine.kernels.store_rows._ROWS", 64)
        yield


@pytest.fixture(scope="session")
def tokenizer(embedded_model_once: None) -> Any:
    """The embedded model's, without its weights."""
    from harness.models import smollm2

    path = smollm2.find()
    assert path is not None
    return smollm2.tokenizer(path)


@pytest.fixture
def forget_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that a test loads from files are gone behind it."""
    from harness.runner.catalog import METHODS

    METHODS.names()
    monkeypatch.setattr(METHODS, "_classes", METHODS._classes.copy())


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports of runs draw nothing, which would take most of the time."""
    monkeypatch.setattr("harness.report.build.figures", lambda *_: [])


@pytest.fixture(scope="session")
def longbench_dir() -> Path:
    """A folder of LongBench records; tests that need one are skipped where there is none."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "longbench"
    folder = Path(os.environ.get("LONGBENCH_DIR", beside))
    if not folder.is_dir():
        pytest.skip("no LongBench folder: set LONGBENCH_DIR")
    return folder
