"""Pages of runs without their pictures, which take most of the time."""

from __future__ import annotations

import pytest


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports of runs draw nothing."""
    monkeypatch.setattr("harness.report.build.figures", lambda *_: [])
