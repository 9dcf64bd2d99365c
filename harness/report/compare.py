"""What changed between two recorded runs: circumstances, accuracy and speed paired by sample, single answers.

print(to_markdown(compare_runs("results/before", "results/after")))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from harness.report import formats
from harness.statistics.noise import TWIN
from harness.statistics.paired import ALL, COSTS, compare, costs, verdicts
from harness.storage.store import Manifest, load, load_manifest

_KEYS = ["method", "task", "sample"]
_BETWEEN = "\x1f"
_SAME = 1e-12
_OPTION = "option "
_SHOWN = 50


class Change(NamedTuple):
    """One circumstance that is not the same: its name and its value in each run, None where it is not recorded."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class RunComparison:
    """Run B against run A.

    Attributes:
        a, b: names of the folders.
        changes: model, device, options, code and versions that differ.
        effects: one row a method and task, `all` last: `method`, `task`, `lost` and `gained` answers, and the columns
            of `harness.statistics.paired.verdicts`; B minus A in points, time of A over B, so above 1 is better in B.
        flips: `method`, `task`, `sample`, scores `a` and `b` of each answer whose score changed, large losses first.
        notes: what could not be paired.
        refused: why speeds are not compared; None if they are.
    """

    a: str
    b: str
    changes: list[Change]
    effects: pd.DataFrame
    flips: pd.DataFrame
    notes: list[str]
    refused: str | None


def compare_runs(a: Path | str, b: Path | str, *, across_devices: bool = False) -> RunComparison:
    """Compares two runs on the samples whose method, task, id and prompt are the same.

    Speeds of different devices are not compared: they say more of the devices than of what was changed.

    Args:
        a: folder of the run to compare with.
        b: folder of the other run.
        across_devices: compare speeds all the same.

    Raises:
        InputError: a folder is not a run, or is corrupt.
    """
    names = _names(Path(a), Path(b))
    manifests = load_manifest(a), load_manifest(b)
    refused = None if across_devices else _refusal(*manifests)
    frames = _single(load(a)), _single(load(b))
    pairs, notes = _paired(*frames, names)
    return RunComparison(
        *names,
        changes=list(changes(*manifests)),
        effects=_effects(pairs, timed=refused is None),
        flips=_flips(pairs),
        notes=notes,
        refused=refused,
    )


def changes(a: Manifest, b: Manifest) -> Iterator[Change]:
    """Every recorded circumstance that differs; of the machine and its software, as they were last."""
    left, right = _circumstances(a), _circumstances(b)
    for name in dict.fromkeys([*left, *right]):
        if left.get(name) != right.get(name):
            yield Change(name, left.get(name), right.get(name))


def to_markdown(found: RunComparison) -> str:
    """The comparison as a page for people."""
    parts = [f"# {found.b} against {found.a}", "## What changed"]
    rows = [[f"`{_plain(one.name)}`", *_shown(one)] for one in found.changes]
    parts.append(_table(["", found.a, found.b], rows) if rows else "Nothing that is recorded.")
    parts += ["## Paired differences", *found.notes]
    parts += [f"**Speeds are not compared**: {found.refused}"] if found.refused else []
    parts.append(_effects_table(found) if len(found.effects) else "No sample is in both runs with the same prompt.")
    parts += ["## Answers whose score changed", _flips_table(found)]
    return "\n\n".join(parts) + "\n"


def _names(a: Path, b: Path) -> tuple[str, str]:
    one, other = a.resolve().name, b.resolve().name
    return (one, other) if one != other else (f"{one} (A)", f"{other} (B)")


def _refusal(a: Manifest, b: Manifest) -> str | None:
    one, other = _devices(a), _devices(b)
    if one == other and len(one) == 1:
        return None
    left, right = (", then ".join(names) for names in (one, other))
    return f"the first run was made on {left}, the second on {right}; --across-devices compares them all the same."


def _devices(manifest: Manifest) -> list[str]:
    """Every device the run was made on: more than one where it was resumed elsewhere."""
    alone = [manifest.model_copy(update={"environments": [one]}) for one in manifest.environments] or [manifest]
    return list(dict.fromkeys(formats.device(one) for one in alone))


def _circumstances(manifest: Manifest) -> dict[str, Any]:
    found: dict[str, Any] = {"model": manifest.model, "device": ", then ".join(_devices(manifest))}
    found |= _flat(manifest.spec, _OPTION)
    found |= _flat(manifest.facts, "")
    found |= _flat(manifest.environments[-1] if manifest.environments else {}, "")
    return found


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """`{"packages": {"torch": "2"}}` as `{"packages.torch": "2"}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = dict(enumerate(value)) if isinstance(value, list) and any(isinstance(v, dict) for v in value) else value
        if isinstance(inner, Mapping):
            flat |= _flat({str(key): one for key, one in inner.items()}, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _single(records: pd.DataFrame) -> pd.DataFrame:
    return records[records["method"] != TWIN]


def _paired(a: pd.DataFrame, b: pd.DataFrame, names: tuple[str, str]) -> tuple[pd.DataFrame, list[str]]:
    """Both records of each request in one row, `_a` and `_b`, and what is in one run only."""
    both = a.merge(b, on=_KEYS, suffixes=("_a", "_b"), validate="one_to_one") if len(a) and len(b) else None
    notes = [note for column in ("method", "task") for note in _only(a, b, column, names)]
    if both is None:
        return pd.DataFrame(columns=[*_KEYS, "score_a", "score_b"]), notes
    same = both["prompt_hash_a"] == both["prompt_hash_b"]
    if not same.all():
        notes.append(f"{int((~same).sum())} pairs are left out: their prompts differ.")
    alone = len(a) + len(b) - 2 * len(both)
    notes += [f"{alone} records are in one run only."] if alone else []
    return both[same], notes


def _only(a: pd.DataFrame, b: pd.DataFrame, column: str, names: tuple[str, str]) -> Iterator[str]:
    for one, other, name in ((a, b, names[0]), (b, a, names[1])):
        missing = [label for label in dict.fromkeys(one[column]) if label not in set(other[column])]
        if missing:
            yield f"Only in {name}: {', '.join(f'`{_plain(label)}`' for label in missing)}."


def _effects(pairs: pd.DataFrame, timed: bool) -> pd.DataFrame:
    """Every method x task is one `task` of the paired statistics, so that Holm's adjustment is over all of them."""
    sides = [_side(pairs, side, timed) for side in ("a", "b")]
    table = verdicts(compare(pd.concat(sides, ignore_index=True), "a"))
    labels = [str(task).partition(_BETWEEN) for task in table["task"]]
    change = (pairs["score_b"] - pairs["score_a"]).astype(float)
    cells = pairs["method"] + _BETWEEN + pairs["task"]
    counts = {"lost": change < -_SAME, "gained": change > _SAME}
    for name, which in counts.items():
        found = which.groupby(cells).sum()
        table[name] = [int(which.sum()) if task == ALL else int(found.get(task, 0)) for task in table["task"]]
    table["method"] = [method for method, _, _ in labels]
    table["task"] = [task or ALL for _, _, task in labels]
    return table


def _side(pairs: pd.DataFrame, side: str, timed: bool) -> pd.DataFrame:
    columns = ["score", *COSTS.values(), "extra", "batch", "batch_tokens_per_s", "arrival"]
    frame = pd.DataFrame({name: pairs.get(f"{name}_{side}") for name in columns}, index=pairs.index)
    frame["task"], frame["sample"] = pairs["method"] + _BETWEEN + pairs["task"], pairs["sample"]
    frame["method"] = side
    return frame if timed else frame.assign(**dict.fromkeys(COSTS.values(), float("nan")))


def _flips(pairs: pd.DataFrame) -> pd.DataFrame:
    change = (pairs["score_b"] - pairs["score_a"]).astype(float)
    order = change[change.abs() > _SAME].sort_values(kind="stable").index
    table = pairs.loc[order, [*_KEYS, "score_a", "score_b"]]
    return table.rename(columns={"score_a": "a", "score_b": "b"}).reset_index(drop=True)


def _effects_table(found: RunComparison) -> str:
    speeds = [] if found.refused else costs(found.effects)
    head = ["method", "task", "pairs", "lost", "gained", "score, points", "accuracy", *map(formats.cost, speeds)]
    rows = [_effect_row({str(key): row[key] for key in row}, speeds) for row in found.effects.to_dict("records")]
    note = "B minus A in points, time and joules of A over those of B (above 1x: B needs less), with 95 % intervals."
    return f"{note}\n\n{_table(head, rows)}"


def _effect_row(row: dict[str, Any], speeds: list[str]) -> list[str]:
    points = formats.points(row["score_difference"], row["score_low"], row["score_high"])
    cells = [f"`{_plain(row['method'])}`", f"`{_plain(row['task'])}`", *(str(row[name]) for name in _COUNTS), points]
    cells.append(formats.NOTHING if points == formats.NOTHING else _word(row, "score"))
    for name in speeds:
        ends = formats.interval(row[f"{name}_low"], row[f"{name}_high"])
        ratio = formats.times(row[f"{name}_ratio"])
        cells.append(ratio if ratio == formats.NOTHING else f"{ratio}{ends} {_word(row, name)}")
    return cells


_COUNTS = ("n", "lost", "gained")


def _word(row: dict[str, Any], measure: str) -> str:
    write = formats.score if measure == "score" else formats.excess
    return formats.called(row[f"{measure}_verdict"], row[f"{measure}_mde"], write)


def _flips_table(found: RunComparison) -> str:
    if found.flips.empty:
        return "None."
    rows = [[f"`{_plain(row[key])}`" for key in _KEYS] + [_score(row[side]) for side in ("a", "b")]
            for row in found.flips[:_SHOWN].to_dict("records")]  # fmt: skip
    table = _table([*_KEYS, found.a, found.b], rows)
    more = len(found.flips) - _SHOWN
    return table if more <= 0 else f"{table}\n\n{more} more."


def _score(value: float) -> str:
    return formats.score(value * 100)


def _shown(change: Change) -> list[str]:
    """Both values. An option that a run does not name was left at its default."""
    nothing = "default" if change.name.startswith(_OPTION) else formats.NOTHING
    return [nothing if value is None else f"`{_plain(value)}`" for value in (change.a, change.b)]


def _plain(value: Any) -> str:
    return str(value).replace("`", "'").replace("|", "\\|").replace("\n", " ")


def _table(head: list[str], rows: list[list[str]]) -> str:
    rule = [":---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))
