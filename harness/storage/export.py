"""A run's records as one Parquet or CSV file, for tools that do not read JSON lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from harness.errors import InputError
from harness.storage.cells import harmless_frame
from harness.storage.store import load

STDOUT = Path("-")
"""Instead of a CSV file: standard output."""


def export(run: Path, *, parquet: Path | None = None, csv: Path | None = None) -> Path:
    """Writes all records of a run into one file.

    Columns are those of `harness.load`. Dictionaries become JSON text, since their keys differ from task to task; in
    CSV lists do too, and text that a spreadsheet would compute stands behind an apostrophe (`harness.storage.cells`).

    Args:
        run: the run's folder.
        parquet, csv: the file to write; exactly one of them. `STDOUT` as `csv` prints.

    Returns:
        The file written.

    Raises:
        InputError: the folder is no run, none or both files are asked for, pyarrow is missing, or the file cannot be
            written.
    """
    if (parquet is None) == (csv is None):
        raise InputError("export needs --parquet FILE or --csv FILE, one of them")
    frame = load(run)
    target = parquet or csv
    assert target is not None
    try:
        if parquet is not None:
            _as_text(frame, dict).to_parquet(parquet, index=False, engine="pyarrow")
        else:
            # Only what is in the terminator is quoted: without \r an answer could begin a line of its own.
            lines = sys.stdout if csv == STDOUT else target
            harmless_frame(_as_text(frame, dict, list)).to_csv(lines, index=False, lineterminator="\r\n")
    except ImportError:
        raise InputError("Parquet needs pyarrow: pip install pyarrow, or use --csv") from None
    except BrokenPipeError:  # who read it has enough
        raise
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from None
    return target


def _as_text(frame: pd.DataFrame, *kinds: type) -> pd.DataFrame:
    frame = frame.copy()
    for name in frame:
        if pd.api.types.is_object_dtype(frame[name]):
            frame[name] = frame[name].map(lambda value: _text(value, kinds))
    return frame


def _text(value: Any, kinds: tuple[type, ...]) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, kinds) else value
