"""The diffusion probe's page: verdict, a compact table, every number, and a plot for each length."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from harness.report import formats
from harness.report.figures import canvas, colour_of, legend, marker_of, save, tidy
from harness.report.table import Cell, Table, label, number, to_csv, to_markdown
from harness.reproduce.diffusion.sentences import verdict
from harness.reproduce.diffusion.verdict import Found, Measure, Point, read
from harness.statistics.estimators import Effect
from harness.storage.store import Manifest

NAME = "diffusion"

_COMPACT = (
    "Change of the log-probability against full attention (natural logarithm, trimmed mean, paired by prompt) with its "
    "95 % interval; *keeps*: the interval lies above -0.69, so at least half the probability is kept; *loses*: it lies "
    "below."
)
_TITLES: dict[Measure, str] = {"first": "First token of the answer", "whole": "Whole answer"}
_LEFT = {"first": _COMPACT, "whole": f"In front: share of prompts whose number greedy decoding writes. {_COMPACT}"}
_DEPTHS = "Share of prompts whose number greedy decoding writes, and mean change of its log-probability, by depth."


def write(folder: Path) -> tuple[str, list[Path]]:
    """Reads a probe's run and writes page, table, plots and JSON into its folder.

    Returns:
        The page and the files.

    Raises:
        InputError: the folder is not such a run.
    """
    manifest, found = read(folder)
    plots = [path for one in found for path in save(_figure(one, manifest), folder, f"{NAME}-{one.length}")]
    text = markdown(manifest, found)
    page, table, data = (folder / f"{NAME}.{kind}" for kind in ("md", "csv", "json"))
    page.write_text(text, encoding="utf-8")
    table.write_text(to_csv(_numbers(found)), encoding="utf-8")
    data.write_text(json.dumps(as_json(manifest, found), indent=2) + "\n", encoding="utf-8")
    return text, [page, table, data, *plots]


def markdown(manifest: Manifest, found: list[Found]) -> str:
    """The page."""
    parts = [f"# Information diffusion: `{manifest.model}`", *_circumstances(manifest)]
    for one in found:
        parts += [f"## {one.length} tokens", "\n".join(f"- {line}" for line in verdict(one))]
        parts += [f"![answer against layer]({NAME}-{one.length}.png)"]
        parts += [to_markdown(table).replace("## ", "### ", 1).rstrip() for table in _tables(one)]
    return "\n\n".join(parts) + "\n"


def as_json(manifest: Manifest, found: list[Found]) -> dict[str, Any]:
    """Verdict and numbers for machines."""
    lengths = [
        {
            "length": one.length,
            "verdict": verdict(one),
            "full_accuracy": float(one.full["score"].mean()),
            "points": [_flat(point) for point in one.points.values()],
        }
        for one in found
    ]
    return {"version": 1, "run_hash": manifest.run_hash, "model": manifest.model, "lengths": lengths}


def _circumstances(manifest: Manifest) -> list[str]:
    lines = [f"On {formats.device(manifest)}, {manifest.facts.get('dtype', 'dtype not recorded')}."]
    lines += ["**Random weights**: the answers mean nothing, and so does the verdict."] if manifest.latency_only else []
    status = formats.status(manifest)
    return [*lines, *([f"> **{status}**"] if status else [])]


def _flat(point: Point) -> dict[str, Any]:
    values = {"accuracy_change": point.lost, "first_token_change": point.first, "answer_change": point.whole}
    intervals = {
        name: [None if math.isnan(value) else value for value in (effect.estimate, effect.low, effect.high)]
        for name, effect in values.items()
    }
    head = {"arm": point.arm, "layer": point.layer, "n": point.n, "accuracy": point.accuracy}
    return head | intervals | {"first_token": point.word("first"), "answer": point.word("whole")}


def _tables(found: Found) -> list[Table]:
    return [_compact(found, "first"), _compact(found, "whole"), _by_depth(found)]


def _compact(found: Found, measure: Measure) -> Table:
    rows = [
        [label(arm), *(_summary(found.points.get((arm, layer)), measure) for layer in found.layers)]
        for arm in found.arms
        if measure == "whole" or "hidden" not in arm  # what decode sees cannot change the first token
    ]
    head = ["dropped", *(f"from layer {layer}" for layer in found.layers)]
    return Table(measure, _TITLES[measure], _LEFT[measure], head, rows)


def _summary(point: Point | None, measure: Measure) -> Cell:
    if point is None:
        return label(formats.NOTHING)
    effect = point.effect(measure)
    share = f"{point.accuracy * 100:.0f} %, " if measure == "whole" else ""
    text = f"{share}{effect.estimate:+.2f} [{effect.low:.2f}, {effect.high:.2f}] {point.word(measure)}"
    return number(effect.estimate, text, effect.low, effect.high)


def _by_depth(found: Found) -> Table:
    depths = sorted(set(found.frame["where"]))
    rows = [
        [label(arm), label(f"{depth:g}"), *(_at_depth(found, arm, layer, depth) for layer in found.layers)]
        for arm in found.arms
        for depth in depths
    ]
    head = ["dropped", "depth", *(f"from layer {layer}" for layer in found.layers)]
    return Table("depths", "By depth", _DEPTHS, head, rows, labels=2)


def _at_depth(found: Found, arm: str, layer: int, depth: float) -> Cell:
    own = found.cell(arm, layer)
    own = own[own["where"] == depth]
    if own.empty:
        return label(formats.NOTHING)
    change = float((own["whole"] - found.full["whole"].reindex(own.index)).mean())
    return number(change, f"{own['score'].mean() * 100:.0f} %, {change:+.2f}")


def _numbers(found: list[Found]) -> Table:
    head = ["length", "dropped", "layer", "n", "accuracy", "accuracy change"]
    head += ["first token change", "first token", "answer change", "answer"]
    rows = [
        [
            label(one.length),
            label(point.arm),
            label(point.layer),
            number(point.n, str(point.n)),
            number(point.accuracy, ""),
            number(point.lost.estimate, "", point.lost.low, point.lost.high),
            *(
                cell
                for effect, word in ((point.first, point.word("first")), (point.whole, point.word("whole")))
                for cell in (number(effect.estimate, "", effect.low, effect.high), label(word))
            ),
        ]
        for one in found
        for point in one.points.values()
    ]
    return Table(NAME, "Numbers", "", head, rows, labels=3)


@dataclass(frozen=True)
class _Look:
    """How an arm is drawn: a colour and marker a role, dashed and hollow where its keys and values are hidden."""

    name: str
    shift: float
    role: int
    hidden: bool

    @property
    def colour(self) -> str:
        return colour_of(self.role)

    @property
    def marker(self) -> str:
        return marker_of(self.role)

    @property
    def fill(self) -> str:
        return "white" if self.hidden else self.colour


def _looks(found: Found) -> list[_Look]:
    roles = list(dict.fromkeys(arm.partition(",")[0] for arm in found.arms))
    gap = min((b - a for a, b in pairwise(found.layers)), default=1)
    shifts = [0.7 * gap * ((index + 0.5) / len(found.arms) - 0.5) for index in range(len(found.arms))]
    return [
        _Look(arm, shift, roles.index(arm.partition(",")[0]), "hidden" in arm)
        for arm, shift in zip(found.arms, shifts, strict=True)
    ]


def _figure(found: Found, manifest: Manifest) -> Any:
    """Accuracy, and the change of both log-probabilities, against the layer from which rows are missing."""
    figure = canvas(14, 4.8)
    panels = figure.subplots(1, 3)
    full = float(found.full["score"].mean()) * 100
    panels[0].axhline(full, color="#999999", linestyle="--", linewidth=1, label="full attention")
    for look in _looks(found):
        points = [found.points[look.name, layer] for layer in found.layers if (look.name, layer) in found.points]
        _line(panels[0], look, [(p.layer, *_accuracy(p, full)) for p in points])
        _line(panels[1], look, [] if look.hidden else [(p.layer, *_ends(p.first)) for p in points])
        _line(panels[2], look, [(p.layer, *_ends(p.whole)) for p in points])
    _frame(panels[0], found, "the number is written, % of prompts")
    _frame(panels[1], found, "change of its first token's log-probability")
    _frame(panels[2], found, "change of the whole number's log-probability")
    panels[0].set_ylim(-3, 103)
    for axes in panels[1:]:
        axes.axhline(0, color="#999999", linestyle="--", linewidth=1)
        axes.axhline(-math.log(2), color="#999999", linestyle=":", linewidth=1)
        axes.set_yscale("symlog", linthresh=1)
    legend(figure, columns=5)
    title = f"{manifest.model}, {found.length} tokens: dropping rows from a layer on (dotted: half the probability)"
    figure.suptitle(title, fontsize=11)
    return figure


def _frame(axes: Axes, found: Found, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(f"first layer without the rows, of {found.depth}")
    axes.set_xticks(found.layers)
    tidy(axes)


def _accuracy(point: Point, full: float) -> tuple[float, float, float]:
    """Percent, with the interval of its change moved to it."""
    value = point.accuracy * 100
    return value, full + point.lost.low * 100, full + point.lost.high * 100


def _ends(effect: Effect) -> tuple[float, float, float]:
    return effect.estimate, effect.low, effect.high


def _line(axes: Axes, look: _Look, values: list[tuple[float, float, float, float]]) -> None:
    xs = [x + look.shift for x, *_ in values]
    style: dict[str, Any] = {"color": look.colour, "linewidth": 1.2, "linestyle": "--" if look.hidden else "-"}
    points: dict[str, Any] = {"marker": look.marker, "markersize": 5, "markerfacecolor": look.fill}
    axes.plot(xs, [y for _, y, *_ in values], label=look.name, **style, **points)
    for x, (_, _, low, high) in zip(xs, values, strict=True):
        if math.isfinite(low) and math.isfinite(high):
            axes.plot((x, x), (low, high), color=look.colour, linewidth=0.9)
