"""One line for what a command wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.report.written import wrote


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("out/board.html", "wrote out/board.html"),
        ("r/summary.csv r/table.md r/plot.png", "wrote 3 files in r; open r/table.md"),
        ("r/report/a.md r/report/index.html", "wrote 2 files in r/report; open r/report/index.html"),
        ("out/a/index.html out/a/a.md out/index.html", "wrote 3 files in out; open out/index.html"),
        ("a/report/index.html b/report/index.html", "open a/report/index.html, b/report/index.html"),
        ("table.md table.csv", "wrote 2 files in .; open table.md"),
        ("/r/table.md table.csv", "wrote 2 files in /; open /r/table.md"),
    ],
)
def test_it_says_how_much_where_and_what_to_open(names: str, said: str) -> None:
    assert said in wrote([Path(name) for name in names.split()])
