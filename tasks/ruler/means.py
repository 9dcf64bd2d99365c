"""RULER's average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from tasks.common.means import NamedMean, Suite
from tasks.ruler.members import MEMBERS


class RulerMean(Suite):
    """The flat mean of the 13 tasks at one length, as RULER's table has it.

    Its weighted averages over lengths are not computed.
    """

    name: ClassVar[str] = "ruler"

    @classmethod
    def means(cls, members: Sequence[str]) -> list[NamedMean]:
        """The one mean."""
        return [NamedMean("RULER mean", (tuple(MEMBERS),))]
