"""Which prompt tokens each layer kept, in a few characters: equal text means equal sets, and a change names its layer.

"0:5d0c31 10:e2b97a 20:90f1c8"     layers 0 to 9 kept one set of tokens, 10 to 19 another, 20 and above a third
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from harness.storage.spans import every_layer, layer_digest


def kept_digest(extra: Mapping[str, Any]) -> str | None:
    """Of a record's `extra["kept_spans"]`, or where there is none `extra["kept_digest"]`; None where neither is."""
    spans = extra.get("kept_spans")
    if not spans:
        return extra.get("kept_digest")
    return layer_digest([json.dumps(layer).encode() for layer in every_layer(spans)])


def first_layer(one: str, other: str) -> int | None:
    """The first layer that keeps other tokens; None where two digests are equal."""
    for pair in zip_longest(one.split(), other.split()):
        if pair[0] != pair[1]:
            return min(int(entry.partition(":")[0]) for entry in pair if entry is not None)
    return None
