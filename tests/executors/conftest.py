"""Workers that are ready at once."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from tests.process import Forked


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of this machine have imported everything ahead; fresh ones are those of `test_local`, and of Ray."""
    monkeypatch.setattr("harness.executors.place.subprocess", SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE))
