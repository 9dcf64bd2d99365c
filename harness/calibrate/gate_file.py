"""The file of gates: the tab-separated rows that DuoAttention publishes, and ahead of them where they come from.

What is ahead stands behind `#`, which numpy and pandas pass over; so do the methods here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.calibrate.train import Losses
from harness.errors import InputError


def write_gates(path: Path, gates: Tensor, provenance: Mapping[str, Any]) -> None:
    """Writes gates [layers, kv_heads], a row a layer.

    Raises:
        InputError: the file cannot be written.
    """
    ahead = [f"# {key}: {value}" for key, value in provenance.items()]
    rows = ["\t".join(f"{gate:.4f}" for gate in row) for row in gates.tolist()]
    _write(path, [*ahead, *rows])


def write_losses(path: Path, losses: Sequence[Losses]) -> None:
    """Writes the report of a training, a row a step.

    Raises:
        InputError: the file cannot be written.
    """
    rows = [f"{step},{one.error:.6g},{one.penalty:.6g},{one.mean_gate:.6g}" for step, one in enumerate(losses, 1)]
    _write(path, ["step,error,penalty,mean_gate", *rows])


def _write(path: Path, lines: Sequence[str]) -> None:
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
