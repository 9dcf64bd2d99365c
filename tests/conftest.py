"""Fixtures that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    # Triton asks when it decorates a kernel, so this must be said before anything imports one.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def longbench_dir() -> Path:
    """A folder of LongBench records; tests that need one are skipped where there is none."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "longbench"
    folder = Path(os.environ.get("LONGBENCH_DIR", beside))
    if not folder.is_dir():
        pytest.skip("no LongBench folder: set LONGBENCH_DIR")
    return folder
