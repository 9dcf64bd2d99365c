"""The word for each published claim, from readings of recorded runs.

A claim is judged where a run has its method, its measure, its tasks, its model's shape, its options, its batch and its
length; the device is another than the paper's almost always, and the word is about that device. What the source leaves
open any run may fill: of several readings that fit, those with an interval come first, of these the longest prompts, of
these the best, since papers show theirs. Where the source gives a maximum over settings that it does not list, an
interval that stays below leaves it undecided, since another setting may reach it. Where a figure hangs on settings that
are kept back (`not_here`) no reading decides. Else the claim is not applicable, and the nearest reading is shown beside
the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness.errors import InputError
from harness.grammar import parse_item
from harness.reproduce.claims import Judgement, Measured, at_least, not_applicable
from harness.reproduce.published.claims_file import SPEED, Published, published
from harness.reproduce.published.readings import Reading, readings
from harness.reproduce.sliminfer.records import read as read_slim
from harness.reproduce.sliminfer.verdict import judge as judge_slim

LENGTH_APART = 0.02
"""Prompts within this share of a length are of that length."""
COUNT_APART = 0.01
DEFAULT, ANY = "default", "any"
"""In the file of claims: an option that a run left at its default, and one that it named."""


@dataclass(frozen=True)
class Judged:
    """A claim and the word for it.

    Attributes:
        published: where it stands.
        judgement: the word, and why.
        reading: what was read; None where nothing was.
    """

    published: Published
    judgement: Judgement
    reading: Reading | None = None


def judge_all(runs: Sequence[Path]) -> list[Judged]:
    """Every published claim, SlimInfer's behind the others."""
    return [*(_judged(claim, runs) for claim in published()), *sliminfer(runs)]


def _judged(claim: Published, runs: Sequence[Path]) -> Judged:
    """Times on other tasks than the claim's are shown beside the reason, too."""
    found = readings(runs, claim)
    if found or claim.not_here or not _is_time(claim):
        return judge(claim, found)
    elsewhere = readings(runs, replace(claim, tasks=SPEED, window=None))
    reason = f"no run has {claim.method} on {', '.join(claim.tasks)}"
    reason += f", {claim.window:,} tokens at most" if claim.window else ""
    return _aside(claim, elsewhere, reason) if elsewhere else judge(claim, found)


def judge(claim: Published, found: Sequence[Reading]) -> Judged:
    """One claim, by every reading of its method and measure."""
    if not found:
        reason = claim.not_here or f"no run has {claim.method} and {claim.against} on its tasks"
        return Judged(claim, not_applicable(claim.claim, reason))
    there = list(found)
    for fits, reason in _demands(claim):
        fitting = [one for one in there if fits(one)]
        if not fitting:
            return _aside(claim, there, reason)
        there = fitting
    there = [one for one in there if one.gpu] or there
    sure = [one for one in there if not math.isnan(one.found.low)] or there
    longest = max(one.length for one in sure)
    return _word(claim, _best([one for one in sure if one.length == longest]))


def _demands(claim: Published) -> Iterator[tuple[Callable[[Reading], bool], str]]:
    """What a reading must be, and the reason why the claim does not apply where none is."""
    if claim.model:
        yield lambda one: claim.model in one.model.lower(), f"no run has the shape of {claim.model}"
    if _is_time(claim):
        yield lambda one: one.gpu, "the paper's times are those of a GPU"
    if claim.options:
        yield lambda one: _has_options(one.label, claim.options), f"no run has {' or '.join(claim.options)}"
    yield lambda one: one.batch == claim.batch, f"no run decodes {claim.batch} requests together"
    if (length := claim.length) is not None:
        yield lambda one: _near(one.length, length), f"no run has prompts of {length:,} tokens"
    if claim.not_here:
        yield lambda one: False, claim.not_here


def _word(claim: Published, reading: Reading) -> Judged:
    found = reading.found
    if claim.measure in ("kv", "peak"):
        found = replace(found, low=found.value * (1 + COUNT_APART), high=found.value * (1 + COUNT_APART))
    judged = at_least(claim.claim, found)
    if claim.upto and judged.word == "does not hold":
        reason = f"a maximum over settings that are not listed; the longest prompt here has {reading.length:,}"
        judged = Judgement(claim.claim, "undecided", found, reason)
    return Judged(claim, replace(judged, measured=reading.found), reading)


def _aside(claim: Published, found: Sequence[Reading], reason: str) -> Judged:
    """Not applicable, with the reading that is nearest in length."""
    wanted = claim.length or max(one.length for one in found)
    apart = min(abs(math.log(one.length / wanted)) for one in found)
    nearest = _best([one for one in found if abs(math.log(one.length / wanted)) <= apart + 1e-9])
    return Judged(claim, not_applicable(claim.claim, reason), nearest)


def _best(found: Sequence[Reading]) -> Reading:
    return max(found, key=lambda one: one.found.value)


def _has_options(label: str, wanted: Sequence[str]) -> bool:
    """Whether a label has any of these sets of options."""
    said = parse_item(label).options
    sets = [parse_item(f"{label.partition(':')[0]}:{one}").options for one in wanted]
    return any(all(_is_set(said.get(key), value) for key, value in one.items()) for one in sets)


def _is_set(said: str | None, wanted: str) -> bool:
    return said is not None if wanted == ANY else (said or DEFAULT) == wanted


def _near(length: int, wanted: int) -> bool:
    return abs(length / wanted - 1) <= LENGTH_APART


def _is_time(claim: Published) -> bool:
    return claim.measure in ("ttft", "tpot", "e2e")


def sliminfer(runs: Sequence[Path]) -> list[Judged]:
    """SlimInfer's claims by the run that speaks of most of them."""
    judged = [_slim(folder) for folder in runs]
    best = max(judged, key=lambda one: sum(each.word != "not applicable" for each in one), default=[])
    return [Judged(_slim_claim(one), one) for one in best]


def _slim(folder: Path) -> list[Judgement]:
    try:
        found = judge_slim(read_slim(folder))
    except InputError:
        return []
    return [replace(one, reason="; ".join(filter(None, [one.reason, folder.name]))) for one in found]


def _slim_claim(judged: Judgement) -> Published:
    measure = "none"
    return Published(
        judged.claim, "slim", "SlimInfer, Long et al.", "https://arxiv.org/abs/2508.06447", "abstract, memory table",
        "LLaMA-3.1-8B-Instruct, RTX 4090", judged.claim.name, measure,
    )  # fmt: skip


def words(found: Measured | None, unit: str) -> str:
    """A number with its interval and unit."""
    if found is None or math.isnan(found.value):
        return "-"
    sign = "+" if unit == "points" else ""
    ends = "" if math.isnan(found.low) else f" [{found.low:{sign}.2f}, {found.high:{sign}.2f}]"
    return f"{found.value:{sign}.2f} {unit}{ends}" if unit != "x" else f"{found.value:.2f}x{ends}"
