"""What `harness check` is asked to hold, and how the command line writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from harness.errors import InputError

Undecided = Literal["fail", "pass"]


@dataclass(frozen=True)
class Tolerance:
    """How much worse is still well.

    Attributes:
        over: "mean": the mean score of every cell; "median": for each method the median over its tasks of the change of
            the mean score, so that one task may fall far. With one task they are the same.
        points: by which a score may fall, of 100.
        percent: by which a method's time may grow beside that of full attention.
        energy, tail: the same of its joules, and of the slow gaps between its tokens; None where these are no gates.
        same_device: also compare seconds of full attention; the machines have to be the same.
    """

    over: Literal["mean", "median"] = "mean"
    points: float = 2.0
    percent: float = 5.0
    same_device: bool = False
    energy: float | None = None
    tail: float | None = None


def parse_tolerance(
    accuracy: str = "mean:2pt",
    speed: str = "ratio:5%",
    same_device: bool = False,
    energy: str | None = None,
    tail: str | None = None,
) -> Tolerance:
    """The tolerance as the command line writes it.

    Args:
        accuracy: `mean:2pt` or `median:2pt`, in points of 100; see `Tolerance.over`.
        speed: `ratio:5%`.
        same_device: see `Tolerance`.
        energy, tail: `ratio:10%`, or None.

    Raises:
        InputError: anything else.
    """
    score = re.fullmatch(r"(mean|median):(\d+(?:\.\d+)?)pt", accuracy)
    if not score or not 0 < float(score[2]) <= 100:
        raise InputError(f"--accuracy {accuracy!r}: expected mean:2pt or median:2pt, above 0 and up to 100 points")
    over: Literal["mean", "median"] = "median" if score[1] == "median" else "mean"
    more = [None if text is None else _ratio(name, text) for name, text in (("energy", energy), ("tail", tail))]
    return Tolerance(over, float(score[2]), _ratio("speed", speed), same_device, *more)


def _ratio(option: str, text: str) -> float:
    ratio = re.fullmatch(r"ratio:(\d+(?:\.\d+)?)%", text)
    if not ratio or not 0 < float(ratio[1]) <= 1000:
        raise InputError(f"--{option} {text!r}: expected ratio:5%, above 0 % and up to 1000 %")
    return float(ratio[1])


def parse_undecided(choice: str) -> Undecided:
    """`fail` or `pass`.

    Raises:
        InputError: anything else.
    """
    if choice not in ("fail", "pass"):
        raise InputError(f"--undecided {choice!r}: expected fail or pass")
    return "fail" if choice == "fail" else "pass"
