"""What a command has written, in one line that says where to look first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

INDEX = "index.html"


def wrote(paths: Sequence[Path]) -> str:
    """`wrote 28 files in DIR; open DIR/report/index.html`; of one file its name.

    Args:
        paths: of the files, one at least.
    """
    if len(paths) == 1:
        return f"wrote {paths[0]}"
    return f"wrote {len(paths)} files in {_around(paths)}; open {', '.join(map(str, _first(paths)))}"


def _around(paths: Sequence[Path]) -> str:
    """The folder that holds all, as the user named it where all are named alike."""
    alike = len({path.is_absolute() for path in paths}) == 1
    return os.path.commonpath([path.parent if alike else path.parent.resolve() for path in paths]) or "."


def _first(paths: Sequence[Path]) -> list[Path]:
    """The page over all, or of each run where there is none; else the first page, table or file."""
    pages = [path for path in paths if path.name == INDEX]
    if pages:
        depth = min(len(path.parts) for path in pages)
        return [path for path in pages if len(path.parts) == depth]
    return [min(paths, key=lambda path: {".html": 0, ".md": 1}.get(path.suffix, 2))]
