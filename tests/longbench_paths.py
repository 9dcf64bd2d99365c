"""Where the tests find LongBench's records and the golden predictions, neither of which the project contains."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

ROOT = Path(os.environ.get("LONGBENCH_DIR") or _SHARED / "longbench")
DATA = ROOT / "data" if (ROOT / "data").is_dir() else ROOT
PROMPTS = ROOT / "config" / "dataset2prompt.json"
LENGTHS = ROOT / "config" / "dataset2maxlen.json"
GOLDEN = Path(os.environ.get("LONGBENCH_GOLDEN") or _SHARED / "golden") / "llama3-8b-instruct"

NO_DATA = f"no LongBench data in {ROOT}; set LONGBENCH_DIR"
NO_GOLDEN = f"no golden predictions in {GOLDEN}; set LONGBENCH_GOLDEN"


@cache
def official(path: Path) -> dict[str, Any]:
    """One of the official configuration files or a result file."""
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def record(name: str = "trec", number: int = 1, **changes: Any) -> dict[str, Any]:
    """A made-up record of a task; a change to None removes nothing, see `without`."""
    row = {"_id": f"id{number}", "input": "What?", "context": f"one two {number}", "answers": ["Yes"], "length": 5}
    classes = ["Yes", "No"] if name.startswith(("trec", "lsht")) else None
    return {**row, "all_classes": classes, "dataset": name, "language": "en", **changes}


def write(folder: Path, name: str, *rows: dict[str, Any]) -> Path:
    """Writes records as `name.jsonl`."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
