"""What a task asks for, and at which length: ten tasks of looking up are one thing, not ten."""

from __future__ import annotations

from harness.grammar import parse_item
from tasks.longbench.prompts import MEMBERS, base_name

_KINDS = {
    "finding": ("needle", "retrieval/multikey", "retrieval/multivalue", "retrieval/multiquery", "ruler/niah_"),
    "tracking": ("retrieval/tracking", "ruler/vt", "graphwalks"),
    "counting words": ("retrieval/common-words", "retrieval/frequent-words", "ruler/cwe", "ruler/fwe"),
    "passages": ("retrieval/passage-",),
    "questions": ("ruler/qa_", "helmet/"),
    "code": ("retrieval/code-completion",),
}


def kind(task: str) -> str:
    """The kind of a task's label; of one that is not known, its name."""
    item = parse_item(task)
    name = f"{item.name}/{item.member}" if item.member else item.name
    if item.name.startswith("longbench") and item.member and base_name(item.member) in MEMBERS:
        return str(MEMBERS[base_name(item.member)].category)
    return next((found for found, begins in _KINDS.items() if name.startswith(begins)), name)


def suite(task: str) -> str:
    """The suite of a task's label, with its lengths where it has some."""
    item = parse_item(task)
    lengths = [
        f"{int(length):,}" if length.isdecimal() else length for length in item.options.get("lengths", "").split("/")
    ]
    return " ".join([item.name, "/".join(lengths)]).strip()
