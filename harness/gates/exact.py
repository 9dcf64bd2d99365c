"""Exact gates: prompt, kept tokens, answers, scorer. One sample is enough, and they say *what* changed.

Numbers of tokens are compared always; which tokens they are, and answers, in float32 on the same kind of device alone.
On the same machine with the same torch a single one that changed is a regression. On another machine float32 rounds
elsewhere, which now and then tips a token or an answer that was nearly a tie; up to a quarter of the samples of a cell
is then undecided, and more is a regression: rounding does not do that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from harness.gates.baseline import Baseline, SampleDigest
from harness.gates.effects import Both
from harness.gates.result import GateResult, Outcome
from harness.storage.kept_digest import first_layer

ROUNDING = 0.25
"""Share of a cell's samples that may differ between two machines before it is called a regression."""

Pair = tuple[SampleDigest, SampleDigest]


def exact_results(base: Baseline, now: Baseline, cells: Sequence[Both]) -> Iterator[GateResult]:
    """What the exact gates find, gate by gate."""
    exact, tolerated = _comparable(base, now), 0.0 if _same_machine(base, now) else ROUNDING
    for both in cells:
        yield from _prompt(both)
    for both in cells:
        yield from _kept(both, exact, tolerated)
    for both in cells if exact else ():
        yield from _answers(both, tolerated)
    for both in cells:
        yield from _scorer(both)


def exactness_notes(base: Baseline, now: Baseline) -> Iterator[str]:
    """What is compared less strictly than it could be, and why."""
    if not _comparable(base, now):
        yield "answers and kept tokens are not compared exactly: not float32 on the same kind of device in both"
    elif not _same_machine(base, now):
        yield f"not the baseline's machine or torch: rounding may change up to {ROUNDING:.0%} of a cell's samples"
    if base.version < now.version:
        yield f"the baseline has version {base.version}: only the numbers of kept tokens are compared; record it again"


def _comparable(base: Baseline, now: Baseline) -> bool:
    same = all(base.provenance.get(name) == now.provenance.get(name) for name in ("dtype", "device"))
    return same and now.provenance.get("dtype") == "float32"


def _same_machine(base: Baseline, now: Baseline) -> bool:
    machines, versions = ([side.provenance.get(name) for side in (base, now)] for name in ("machines", "versions"))
    torch = [(found or {}).get("torch") for found in versions]
    return bool(machines[0]) and machines[0] == machines[1] and torch[0] == torch[1]


def _prompt(both: Both) -> Iterator[GateResult]:
    changed = [one for one in both.shared() if both.base.samples[one].prompt != both.now.samples[one].prompt]
    yield from _exact(both, "prompt", both.shared(), changed, "prompt changed")


def _kept(both: Both, exact: bool, tolerated: float) -> Iterator[GateResult]:
    """Another number of tokens in a layer, or, where that can be told, other tokens."""
    sides = _sides(both)
    other = [one for one, (old, new) in sides.items() if old.kept_hash != new.kept_hash]
    moved = [one for one, pair in sides.items() if one not in other and exact and _moved(pair)]
    changed = [one for one in sides if one in other or one in moved]
    old, new = (sum(side.samples[one].kept for one in changed) for side in (both.base, both.now))
    counts = f"{old} -> {new} tokens x layers in these{_layer(both)}" if other else "as many tokens, but other ones"
    for result in _exact(both, "kept set", list(sides), changed, "kept set changed", counts, _place(sides, changed)):
        outcome = result.outcome if other else _tolerant(len(changed), len(sides), tolerated)
        yield replace(result, baseline=old, now=new, outcome=outcome) if changed else result


def _moved(pair: Pair) -> bool:
    old, new = pair[0].tokens, pair[1].tokens
    return old is not None and new is not None and old != new


def _place(sides: dict[str, Pair], changed: Sequence[str]) -> str:
    """The layer in which the first of these samples differs first."""
    if not changed or not _moved(sides[changed[0]]):
        return ""
    old, new = sides[changed[0]]
    return f" at layer {first_layer(old.tokens or '', new.tokens or '')}"


def _layer(both: Both) -> str:
    """The first layer whose mean number changed; means of other samples would say nothing."""
    if both.base.samples.keys() != both.now.samples.keys():
        return ""
    layers = enumerate(zip(both.base.kept_per_layer, both.now.kept_per_layer, strict=False))
    first = next(((layer, old, new) for layer, (old, new) in layers if old != new), None)
    return f", layer {first[0]} {first[1]:g} -> {first[2]:g} on average" if first else ""


def _answers(both: Both, tolerated: float) -> Iterator[GateResult]:
    sides = {one: pair for one, pair in _sides(both).items() if pair[0].answer is not None}
    changed = [one for one, (old, new) in sides.items() if old.answer != new.answer]
    for result in _exact(both, "answers", list(sides), changed, "answers changed"):
        yield replace(result, outcome=_tolerant(len(changed), len(sides), tolerated))


def _scorer(both: Both) -> Iterator[GateResult]:
    """The same text for the same prompt got another score: the scorer, or the accepted answers, changed."""
    pairs = _sides(both).items()
    sides = {one: (old, new) for one, (old, new) in pairs if old.answer is not None and old.answer == new.answer}
    changed = [one for one, (old, new) in sides.items() if old.score != new.score]
    yield from _exact(both, "scorer", list(sides), changed, "scorer changed", "same answers, other scores")


def _sides(both: Both) -> dict[str, Pair]:
    """Both digests of the samples whose prompt is the same."""
    return {one: (both.base.samples[one], both.now.samples[one]) for one in both.same_prompt()}


def _tolerant(changed: int, samples: int, tolerated: float) -> Outcome:
    if not changed:
        return "passed"
    return "undecided" if changed <= tolerated * samples else "violated"


def _exact(
    both: Both, gate: str, ids: Sequence[str], changed: Sequence[str], text: str, more: str = "", place: str = ""
) -> Iterator[GateResult]:
    if not ids:
        return
    found = f"{text}: {len(changed)} of {len(ids)} samples" if changed else f"{gate} unchanged in {len(ids)} samples"
    if changed:
        found += f"{': ' + more if more else ''} (first: {changed[0]}{place})"
    yield GateResult(gate, both.method, both.task, "violated" if changed else "passed", found, n=len(ids), paired=True)
