"""RULER's thirteen tasks by name, in its order (NVIDIA/RULER, `synthetic.yaml`)."""

from __future__ import annotations

from harness.errors import unknown
from tasks.ruler.corpora import HotpotQA, Squad
from tasks.ruler.draft import Maker
from tasks.ruler.needles import Needles
from tasks.ruler.questions import Questions
from tasks.ruler.tracking import Tracking
from tasks.ruler.words import CommonWords, FrequentWords

MEMBERS: dict[str, Maker] = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essays"),
    "niah_single_3": Needles("essays", value="uuids"),
    "niah_multikey_1": Needles("essays", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key="uuids", value="uuids"),
    "niah_multivalue": Needles("essays", values=4),
    "niah_multiquery": Needles("essays", keys=4, asked=4),
    "vt": Tracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
    "qa_1": Questions(Squad),
    "qa_2": Questions(HotpotQA),
}


def find(name: str) -> Maker:
    """The task of that name.

    Raises:
        InputError: there is none.
    """
    if name not in MEMBERS:
        raise unknown("member of ruler", name, MEMBERS)
    return MEMBERS[name]
