"""RULER's scores: which share of the wanted texts stands in a prediction, or whether one of them does.

They are those of NVIDIA/RULER's `eval/evaluate.py` and `eval/synthetic/constants.py`: case is folded, control
characters become line breaks, and a text counts wherever it stands, in another word too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def score(metric: str, prediction: str, wanted: Sequence[str]) -> float:
    """Score of one answer, 0 to 1.

    Args:
        metric: "string_match_all" for the share of the wanted texts, "string_match_part" for one of them.
        prediction: generated text.
        wanted: at least one.
    """
    text = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    found = [one.lower() in text for one in wanted]
    return float(any(found)) if metric == "string_match_part" else sum(found) / len(found)
