"""What the numbers of a run do not show: requests without any, prompts that were cut, methods that keep too much, times
of different cards or, where a method was asked again, of different times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd

from harness.statistics.comparable import arrived
from harness.statistics.paired import REFERENCE, cards
from harness.statistics.together import batch_sizes
from harness.statistics.turns import later
from harness.storage.record import FAILED, NOT_SCORED, OUT_OF_MEMORY

WITHOUT = {
    OUT_OF_MEMORY: ("Out of memory", ", and so without numbers"),
    FAILED: ("Failed", f" (extra.{FAILED} of a record says where), and so without numbers"),
    NOT_SCORED: ("Not scored", f" (extra.{NOT_SCORED} of a record says why)"),
}
"""Facts of records that lack numbers, and how they are told."""


class Caveat(NamedTuple):
    """One of them.

    Attributes:
        title: its first words.
        text: the rest of the sentence.
    """

    title: str
    text: str

    def __str__(self) -> str:
        return self.title + self.text


def caveats(records: pd.DataFrame) -> Iterator[Caveat]:
    """All that `records` (`harness.storage.store.load`) give reason to."""
    if not len(records):
        return
    for fact, (title, words) in WITHOUT.items():
        found = records[[fact in extra for extra in records["extra"]]]
        yield from _told(title, words, _by_cell(found, records))
    # In a later turn that is also what decode has brought back.
    counts = zip(records["tokens_kept"], records["tokens_requested"], records["extra"], strict=True)
    over = records[[_over(kept, asked) and not later(extra) for kept, asked, extra in counts]]
    yield from _told("Kept more tokens than requested", "", _by_cell(over, records))
    behind = records[[later(extra) for extra in records["extra"]]]
    yield from _told(
        "Later turns", " prefill nothing, so they count in no TTFT, E2E or energy", _by_task(behind, records)
    )
    yield from _told(
        "Arrived at a rate",
        ", so TPOT and E2E are those of a load, in a table of their own, and compared with none",
        _by_task(records[arrived(records)], records),
    )
    batched = records[batch_sizes(records) > 1]
    yield from _told("Decoded together", ", so the times of a batch are one pair", _by_task(batched, records))
    yield from _told("Prompts cut in the middle", ", since they were too long", _cut(records))
    apart = records[_apart(records)]
    yield from _told(
        "Times not paired",
        f", on another card than `{REFERENCE}`, or at another time",
        _by_cell(apart, records),
    )
    yield from _told("Measured on different kinds of device", "", _kinds(records))


def _told(title: str, words: str, listed: list[str]) -> Iterator[Caveat]:
    if listed:
        yield Caveat(title, f"{words}: {'; '.join(listed)}.")


def _by_cell(found: pd.DataFrame, records: pd.DataFrame) -> list[str]:
    """By method and task, since a mean over the others is another one."""
    counts, whole = (Counter(zip(rows["method"], rows["task"], strict=True)) for rows in (found, records))
    return [
        f"{method} on {task}: {count} of {whole[method, task]} requests" for (method, task), count in counts.items()
    ]


def _by_task(found: pd.DataFrame, records: pd.DataFrame) -> list[str]:
    counts, whole = Counter(found["task"]), Counter(records["task"])
    return [f"{task}: {count} of {whole[task]} requests" for task, count in counts.items()]


def _over(kept: list[float], requested: list[int]) -> bool:
    return any(have > asked for have, asked in zip(kept, requested, strict=False))


def _apart(records: pd.DataFrame) -> list[bool]:
    """Whether a request was timed elsewhere, or at another time, than full attention's answer to the same sample."""
    found = list(zip(records["task"], records["sample"], records["method"], cards(records), strict=True))
    reference = {(task, sample): card for task, sample, method, card in found if method == REFERENCE}
    timed = records["ttft_s"].notna()
    apart = [reference.get((task, sample), card) != card for task, sample, _, card in found]
    return [bool(one and has) for one, has in zip(apart, timed, strict=True)]


def _kinds(records: pd.DataFrame) -> list[str]:
    """Chips by name, where they are not all the same."""
    workers = [one for one in records.get("worker", ()) if isinstance(one, dict)]
    counts = Counter(str(one.get("device")) for one in workers)
    return [f"{name}: {count} requests" for name, count in counts.items()] if len(counts) > 1 else []


def _cut(records: pd.DataFrame) -> list[str]:
    """By task; records of older runs do not tell."""
    if "prompt_tokens_cut" not in records:
        return []
    samples = records.drop_duplicates(["task", "sample"])
    cut = samples[samples["prompt_tokens_cut"].fillna(0).astype(float) > 0]
    counts, whole = Counter(cut["task"]), Counter(samples["task"])
    return [f"{task}: {count} of {whole[task]} samples" for task, count in counts.items()]
