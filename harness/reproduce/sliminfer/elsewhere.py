"""The paper's own devices: what a recorded run's work would take there, beside what the paper reports.

The speed-ups that are published for a 32K prompt follow from the work, or they do not: a figure inside the predicted
interval follows. How many tokens the paper generates is not known, so its end-to-end figure is turned around: how many
would give it? At that many, what would `slim` be without hiding its transfers?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from harness.errors import InputError
from harness.predict.checks import check
from harness.predict.device import BUS_SHARE, Device, find_device
from harness.predict.model import fit
from harness.predict.page import write
from harness.predict.prediction import Guess, Prediction, predict_run
from harness.predict.work import Run, read_run
from harness.report import formats
from harness.reproduce.sliminfer.paper import LONGEST
from harness.statistics.paired import REFERENCE


@dataclass(frozen=True)
class Published:
    """Speed-ups of slim over full at 32K on one device; `waiting` is E2E without the asynchronous cache."""

    ttft: float
    e2e: float
    waiting: float | None = None


PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {"rtx-4090": Published(2.53, 1.88, 1.60), "orin": Published(1.94, 1.69)}
)
"""Device -> the paper's figures, abstract and ablation."""


def predict_elsewhere(folder: Path, name: str) -> tuple[str, list[Path]]:
    """Predicts a recorded run for a device and judges the paper's figures for it, if it has any.

    Returns:
        The page and the files, which lie in a folder of the run's.

    Raises:
        InputError: no such device, or a run without full attention and slim at 32K.
    """
    device, run = find_device(name), read_run(folder)
    errors = check([run])
    found = predict_run(run, fit(run), run.gpu, device, errors)
    text, paths = write(run, device, found, errors, folder / f"predicted-{Path(name).stem}")
    if name not in PUBLISHED:
        return text, paths
    text += "\n## The paper's figures for this device\n\n" + "\n".join(
        f"- {line}" for line in verdicts(run, device, found, PUBLISHED[name])
    )
    paths[0].write_text(text + "\n", encoding="utf-8")
    return text, paths


def verdicts(run: Run, device: Device, found: Sequence[Prediction], paper: Published) -> list[str]:
    """One line a figure."""
    full, slim = (_longest(found, kind) for kind in (REFERENCE, "slim"))
    ttft = slim.guesses["sooner"]
    lines = [f"TTFT {paper.ttft:.2f}x: {_word(ttft, paper.ttft)}, predicted {_text(ttft)}."]
    tokens = tokens_for(full, slim, paper.e2e)
    if tokens is None:
        lines.append(f"End to end {paper.e2e:.2f}x: no number of new tokens gives it; {_text(slim.guesses['faster'])}.")
    else:
        lines.append(f"End to end {paper.e2e:.2f}x is what {tokens:.0f} new tokens would give.")
    if paper.waiting is not None and tokens is not None:
        moved = slim.cell.beside_s * run.rates.bus / (device.bus_gb_per_s * 1e9 * BUS_SHARE)
        waiting = _time(full, tokens) / (_time(slim, tokens) + tokens * moved)
        lines.append(
            f"Without hiding transfers {paper.waiting:.2f}x: predicted {waiting:.2f}x for as many tokens, with "
            f"{formats.seconds(moved)} a token on the host link."
        )
    memory = ", ".join(
        f"`{each.cell.method.partition(':')[0]}` {'fits' if each.fits else 'does not fit'}" for each in (full, slim)
    )
    return [*lines, f"Memory of {device.memory_gib:.0f} GiB: {memory}."]


def tokens_for(full: Prediction, slim: Prediction, ratio: float) -> float | None:
    """How many new tokens make full's end-to-end time over slim's this ratio; None where none do."""
    excess = full.guesses["ttft"].value - ratio * slim.guesses["ttft"].value
    slope = ratio * slim.guesses["tpot"].value - full.guesses["tpot"].value
    return excess / slope if excess * slope > 0 else None


def _time(found: Prediction, tokens: float) -> float:
    return found.guesses["ttft"].value + tokens * found.guesses["tpot"].value


def _word(found: Guess, figure: float) -> str:
    if found.low <= figure <= found.high:
        return "follows from the work"
    return "less than the work would give" if figure < found.low else "more than the work explains"


def _text(found: Guess) -> str:
    return formats.times(found.value) + formats.interval(found.low, found.high)


def _longest(found: Sequence[Prediction], kind: str) -> Prediction:
    chosen = [each for each in found if each.cell.length == LONGEST and each.cell.steps > 0]
    match = [each for each in chosen if each.cell.method.partition(":")[0] == kind]
    if not match:
        raise InputError(f"--predict needs records of {kind!r} with {LONGEST} prompt tokens and more than one new one")
    return match[0]
