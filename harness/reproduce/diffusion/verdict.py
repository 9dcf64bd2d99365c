"""What the diffusion probe found, in words that follow from intervals.

Everything is paired with full attention on the same prompt. For each arm and layer the effect is the trimmed mean of
the differences of log-probabilities with its 95 % interval (`harness.statistics.estimators.speed_effect`):

    keeps      the whole interval says that the answer keeps at least half its probability
    loses      the whole interval says that it loses more than half
    undecided  neither

It is judged twice. The answer's *first token* comes out of the prefill: what it needs must have reached the last row,
or rows that this row still sees, before the rows were dropped. The *whole* answer is also shaped by what its own tokens
see in decode, below that layer too.

An arm *keeps the answer from layer X on* where it does at X and at every deeper layer that was probed, found by going
up from the deepest and stopping at the first that does not; *loses it up to layer Y* likewise from the first layer. In
such a fixed order each step may be judged at full level without adjustment (Maurer, Hothorn & Lehmacher 1995); over
arms and lengths nothing is adjusted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import pandas as pd

from harness.errors import InputError
from harness.reproduce.diffusion.plan import ARMS, probe_spec
from harness.reproduce.diffusion.probe import Probe
from harness.statistics.estimators import Effect, pairs, score_effect, speed_effect
from harness.statistics.paired import REFERENCE
from harness.storage.store import Manifest, load, load_manifest

HALF = math.log(2)
LEAST_ACCURACY = 0.5
"""Below this share of right answers under full attention there is nothing to lose."""

Word = Literal["keeps", "loses", "undecided"]
Measure = Literal["first", "whole"]


@dataclass(frozen=True)
class Point:
    """One arm at one layer, beside full attention.

    Attributes:
        n: prompts.
        accuracy: share of prompts whose number greedy decoding writes. lost: its change.
        whole, first: change of the natural log-probability of the answer, and of its first token.
    """

    arm: str
    layer: int
    n: int
    accuracy: float
    lost: Effect
    whole: Effect
    first: Effect

    def effect(self, measure: Measure) -> Effect:
        """Of the whole answer or its first token."""
        return self.first if measure == "first" else self.whole

    def word(self, measure: Measure) -> Word:
        """See the module."""
        effect = self.effect(measure)
        if effect.low >= -HALF:
            return "keeps"
        return "loses" if effect.high < -HALF else "undecided"


@dataclass(frozen=True)
class Found:
    """All that was found at one prompt length.

    Attributes:
        length: prompt tokens.
        depth: layers of the model.
        frame: one row a record, with `arm` ("" for full attention), `layer`, `whole` and `first` (log-
            probabilities) and `where` (the needle's depth).
    """

    length: int
    depth: int
    frame: pd.DataFrame

    @property
    def full(self) -> pd.DataFrame:
        """Full attention's records, by sample."""
        return self.frame[self.frame["arm"] == ""].set_index("sample")

    @cached_property
    def layers(self) -> list[int]:
        """Probed layers, ascending."""
        return sorted({int(layer) for layer in self.frame["layer"]} - {0})

    @cached_property
    def arms(self) -> list[str]:
        """Probed arms, in the order of `ARMS`."""
        present = set(self.frame["arm"])
        return [arm for arm in ARMS if arm in present]

    @cached_property
    def points(self) -> dict[tuple[str, int], Point]:
        """(arm, layer) -> what was found there."""
        found = {(arm, layer): self._point(arm, layer) for arm in self.arms for layer in self.layers}
        return {key: point for key, point in found.items() if point.n}

    def cell(self, arm: str, layer: int) -> pd.DataFrame:
        """Records of an arm at a layer, by sample."""
        rows = self.frame[(self.frame["arm"] == arm) & (self.frame["layer"] == layer)]
        return rows.set_index("sample")

    def _point(self, arm: str, layer: int) -> Point:
        own = self.cell(arm, layer)
        other = self.full.reindex(own.index)
        label = f"{arm} {layer} {self.length}"
        return Point(
            arm,
            layer,
            len(own),
            float(own["score"].mean()),
            score_effect([pairs(own["score"] - other["score"], label=label)]),
            speed_effect([pairs(own["whole"] - other["whole"], label=label)]),
            speed_effect([pairs(own["first"] - other["first"], label=label)]),
        )

    def keeps_from(self, arm: str, measure: Measure) -> int | None:
        """First layer from which on the arm keeps the answer at every probed layer."""
        return _run(reversed(self._words(arm, measure)), "keeps")

    def loses_until(self, arm: str, measure: Measure) -> int | None:
        """Last layer up to which the arm loses the answer at every probed layer."""
        return _run(self._words(arm, measure), "loses")

    def _words(self, arm: str, measure: Measure) -> list[tuple[int, Word]]:
        present = [layer for layer in self.layers if (arm, layer) in self.points]
        return [(layer, self.points[arm, layer].word(measure)) for layer in present]

    @property
    def middle(self) -> int | None:
        """The first probed layer in the deeper half of the model."""
        return next((layer for layer in self.layers if 2 * layer >= self.depth), None)


def read(folder: Path | str) -> tuple[Manifest, list[Found]]:
    """Reads a probe's run: what was found at each length.

    Raises:
        InputError: not a run, or not one of the probe.
    """
    manifest, records = load_manifest(folder), load(folder)
    known = [label == REFERENCE or label.startswith("probe:") for label in records["method"]]
    if records.empty or not all(known) or REFERENCE not in set(records["method"]):
        raise InputError(f"{folder} is not a run of the diffusion probe")
    arms = {label: _arm(label) for label in records["method"].unique()}
    frame = records.assign(
        arm=[arms[label][0] for label in records["method"]],
        layer=[arms[label][1] for label in records["method"]],
        whole=[float(sum(extra["answer_logprobs"])) for extra in records["extra"]],
        first=[float(extra["answer_logprobs"][0]) for extra in records["extra"]],
        where=[float(extra["depth"]) for extra in records["extra"]],
        length=[int(extra["length"]) for extra in records["extra"]],
    )
    depth = len(records["tokens_kept"].iloc[0])
    return manifest, [Found(int(str(length)), depth, part) for length, part in frame.groupby("length", sort=True)]


def _arm(label: str) -> tuple[str, int]:
    if label == REFERENCE:
        return "", 0
    options = probe_spec(label).options
    assert isinstance(options, Probe.Options)
    return options.drop + (", hidden" if options.hide else ""), options.layer


def _run(words: Iterator[tuple[int, Word]] | Sequence[tuple[int, Word]], wanted: Word) -> int | None:
    last = None
    for layer, word in words:
        if word != wanted:
            break
        last = layer
    return last
