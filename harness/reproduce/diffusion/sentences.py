"""The verdict on information diffusion in sentences, each of which follows from intervals."""

from __future__ import annotations

from collections.abc import Iterator

from harness.reproduce.diffusion.verdict import LEAST_ACCURACY, Found, Measure
from harness.statistics.estimators import pairs, speed_effect

_NAMES: dict[Measure, str] = {"first": "First token", "whole": "Whole answer"}

_WHAT = {
    "needle": "the number's rows",
    "needle, hidden": "the number's rows, and hiding their keys and values below from decode,",
    "sentence": "the rows of the whole sentence",
    "sentence, hidden": "the rows of the whole sentence, and hiding their keys and values below from decode,",
    "context": "every row but sink and question",
    "context, hidden": "every row but sink and question, and hiding their keys and values below from decode,",
    "random": "as many random rows",
    "question": "the question's rows but the last",
}


def verdict(found: Found) -> list[str]:
    """The sentences: the task, the claim, each arm, and what decode reads below."""
    accuracy, n = float(found.full["score"].mean()), len(found.full)
    said = [f"Full attention writes the number in {accuracy * 100:.0f} % of {n} prompts of {found.length} tokens."]
    if accuracy < LEAST_ACCURACY:
        return [*said, "That is too seldom to lose anything: this model and length say nothing about diffusion."]
    prefill = [_arm(found, arm, "first") for arm in found.arms if "hidden" not in arm]
    whole = [_arm(found, arm, "whole") for arm in found.arms]
    claims = [_claim(found, "needle", "first"), _claim(found, "needle, hidden", "whole")]
    return [*said, *claims, *prefill, *whole, *_below(found)]


def _claim(found: Found, arm: str, measure: Measure) -> str:
    """Is the claim confirmed, refuted or open at the middle of the model?"""
    point, control = found.points.get((arm, found.middle or 0)), found.points.get(("random", found.middle or 0))
    name = _NAMES[measure]
    if point is None:
        return f"{name}: the claim is not judged; it needs the needle's arm at a layer of the deeper half."
    where = f"layer {point.layer} of {found.depth}"
    if control is not None and control.word(measure) != "keeps":
        return f"{name}: **open at {where}**; dropping as many random rows is not shown to be harmless either."
    without = "without the number's rows" + (", there and for decode below," if measure == "whole" else "")
    ends = {
        "keeps": f"**confirmed at {where}**; {without} it keeps at least half its probability: what they said is "
        "elsewhere by then.",
        "loses": f"**refuted at {where}**; {without} it loses more than half its probability: too little of what they "
        "said is elsewhere by then.",
        "undecided": f"**open at {where}**; the interval allows both, more samples are needed.",
    }
    return f"{name}: {ends[point.word(measure)]}"


def _arm(found: Found, arm: str, measure: Measure) -> str:
    probed = f"probed: {_layers(found.layers)} of {found.depth}"
    return f"{_NAMES[measure]}, dropping {_WHAT[arm].rstrip(',')}: {_where(found, arm, measure)} ({probed})."


def _where(found: Found, arm: str, measure: Measure) -> str:
    first, last = found.keeps_from(arm, measure), found.loses_until(arm, measure)
    if first == found.layers[0]:
        return "kept wherever they are dropped"
    if last == found.layers[-1]:
        return "lost wherever they are dropped"
    kept = f"kept from layer {first} on" if first is not None else "not shown to be kept at the deepest layer"
    lost = f"lost up to layer {last}" if last is not None else "not shown to be lost at the first"
    return f"{kept}, {lost}"


def _below(found: Found) -> Iterator[str]:
    """Where hiding the keys and values below matters: new tokens read the dropped tokens there."""
    for role in ("needle", "sentence", "context"):
        if {role, f"{role}, hidden"} <= set(found.arms):
            layers = [layer for layer in found.layers if _reads_below(found, role, layer)]
            where = f"shown for layers {_layers(layers)}" if layers else "not shown for any layer"
            what = f"the {role}'s keys and values below the layer where its rows were dropped"
            yield f"That decode reads {what} is {where}."


def _reads_below(found: Found, role: str, layer: int) -> bool:
    """Whether the answer is less likely with them hidden, by the paired interval."""
    seen, hidden = found.cell(role, layer), found.cell(f"{role}, hidden", layer)
    effect = speed_effect([pairs(hidden["whole"] - seen["whole"].reindex(hidden.index))])
    return effect.high < 0


def _layers(layers: list[int]) -> str:
    return ", ".join(map(str, layers))
