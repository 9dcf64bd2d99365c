"""Cells of CSV files that a spreadsheet takes for text: what it would compute is written behind an apostrophe.

A cell that begins with =, +, -, @ or a control character is a formula to a spreadsheet, and formulas can run programs
and send cells away (CWE-1236). Answers of models, names of samples and labels may begin with anything.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def harmless(value: Any) -> Any:
    """The value as it is, or as text that is no formula; numbers stay numbers, written as text too."""
    if not isinstance(value, str) or not value.startswith(_FORMULA) or _is_number(value):
        return value
    return "'" + value


def harmless_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """All cells and headings of a table."""
    return frame.map(harmless).rename(columns=harmless)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isprintable()
