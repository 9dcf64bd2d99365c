"""A baseline: what a run answered, kept and cost, in a file small enough to be reviewed line by line in a diff.

    harness baseline results/main --name cpu-smollm2     # writes results/baselines/cpu-smollm2.json
    harness check results/main --baseline results/baselines/cpu-smollm2.json

One line a sample: hashes of its prompt, its answer and the tokens that each layer kept, its score, and the time of
`full` over that of the method (of `full` itself: seconds). Answers and prompts themselves are not in it, nor is
anything that tells whose machine it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.errors import InputError
from harness.gates.costs import TAILS, costs_of
from harness.statistics.estimators import joined, pairs, speed_effect
from harness.statistics.noise import TWIN, noise_floor
from harness.statistics.paired import COSTS, MEASURES, REFERENCE, SPEEDS, cards
from harness.statistics.together import together
from harness.storage.kept_digest import kept_digest
from harness.storage.store import Manifest, load, load_manifest

BASELINE_VERSION = 2
"""1 had the number of tokens kept and not which; it is still read."""

FOLDER = Path("results/baselines")

_LINE = 240
_DIGITS = 5
Times = dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
Floors = dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
Row = dict[Hashable, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SampleDigest(_Strict):
    """One sample of one cell. Equal hashes mean equal content; what was not measured is absent."""

    prompt: str = Field(description="hash of the prompt's token ids")
    context: str | None = Field(default=None, description="hash of the context it shares with other samples")
    timed: int | None = Field(
        default=None, description="number of the batch or load that timed it, and full attention beside it, with others"
    )
    answer: str | None = Field(default=None, description="hash of the answer's text")
    score: float | None = None
    kept: int | float = Field(description="prompt tokens x layers whose keys and values were kept, mean over KV heads")
    kept_hash: str = Field(description="hash of the number kept in each layer")
    tokens: str | None = Field(default=None, description="which were kept, by layer (harness.storage.kept_digest)")
    ratio: Times = Field(
        default_factory=dict, description="cost of full over that of the method, by name (gates.costs)"
    )
    seconds: Times = Field(default_factory=dict, description="of full alone; a method's are these over its ratios")


class RatioSummary(_Strict):
    """Trimmed mean of the samples' ratios, with its 95 % interval where there is one; for readers, not for gates."""

    n: int
    ratio: float
    low: float | None = None
    high: float | None = None


class CellDigest(_Strict):
    """One method on one task."""

    n: int
    score: float | None = Field(default=None, description="mean, 0 to 1")
    kept_per_layer: list[float] = Field(description="mean over the samples")
    ratios: dict[str, RatioSummary] = Field(default_factory=dict)
    samples: dict[str, SampleDigest]


class Baseline(_Strict):
    """What `harness check` needs to know of a run.

    Attributes:
        provenance: of what and with what it was made (`measuring.provenance`), without paths and names of users.
        noise_floor: by task: how far full attention differed from itself, where that was measured.
        cells: by method and task.
    """

    version: int = BASELINE_VERSION
    name: str
    provenance: dict[str, Any]
    noise_floor: dict[str, Floors] = Field(default_factory=dict)
    cells: dict[str, dict[str, CellDigest]]


def write_baseline(run: Path, name: str, folder: Path = FOLDER) -> Path:
    """Writes `folder/name.json`, over an older one of that name: the diff shows what changed.

    Raises:
        InputError: the run is not complete, the name is not a plain file name, or the file cannot be written.
    """
    if not re.fullmatch(r"[\w][\w.-]*", name, re.ASCII):
        raise InputError(f"--name {name!r}: letters, digits, '.', '_' and '-' only")
    text = as_text(digest_run(run, name))
    path = folder / f"{name}.json"
    scratch = path.with_suffix(".json.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def read_baseline(path: Path) -> Baseline:
    """Reads what `write_baseline` wrote.

    Raises:
        InputError: the file is missing, corrupt or of another version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.get("version") if isinstance(values, dict) else None
        if version not in range(1, BASELINE_VERSION + 1):
            raise InputError(f"{path} has version {version}; this harness reads versions 1 to {BASELINE_VERSION}")
        return Baseline.model_validate(values)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{path} is no baseline: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError as error:
        raise InputError(f"{path} is no baseline: {error}") from None


def digest_run(run: Path, name: str = "") -> Baseline:
    """The digest of a run on disk.

    Raises:
        InputError: the folder is no run, or one that is not complete or has no records.
    """
    manifest = load_manifest(run)
    if manifest.status != "complete":
        why = f" ({', '.join(manifest.reasons)})" if manifest.reasons else ""
        raise InputError(f"{run} is {manifest.status}{why}; 'harness resume {run}' completes it")
    return digest(load(run), manifest, name)


def digest(records: pd.DataFrame, manifest: Manifest, name: str = "") -> Baseline:
    """The digest of records, their twin of full attention only as the noise floor.

    Args:
        records: one row a record (`harness.storage.store.load`).
        manifest: of their run.
        name: of the baseline.

    Raises:
        InputError: there are no records, or a method answered a sample twice.
    """
    if records.empty:
        raise InputError("the run has no records")
    if records.duplicated(["method", "task", "sample"]).any():
        raise InputError("a method has answered a sample of a task twice")
    named = records.assign(card=cards(records), timed=together(records)).to_dict("records")
    rows = [row for row in named if row["method"] != TWIN]
    full = {_beside(row): row for row in rows if row["method"] == REFERENCE}
    cells: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: (row["method"], row["task"], row["sample"])):
        cells.setdefault(row["method"], {}).setdefault(row["task"], []).append(row)
    return Baseline(
        name=name,
        provenance=_provenance(manifest),
        noise_floor=_floors(records),
        cells={method: {task: _cell(group, full) for task, group in of.items()} for method, of in cells.items()},
    )


def as_text(baseline: Baseline) -> str:
    """Sorted JSON, one line for each sample and each other small thing."""
    return _block(_pruned(baseline.model_dump(mode="json", exclude_none=True)), "") + "\n"


def units(samples: list[SampleDigest]) -> list[int]:
    """Cluster of each sample: its context where that is known, else itself."""
    codes: dict[str, int] = {}
    names = [sample.context or f"sample {index}" for index, sample in enumerate(samples)]
    return [codes.setdefault(name, len(codes)) for name in names]


def _beside(row: Row) -> tuple[str, str, str]:
    """What a request has in common with full attention's that its times are compared with."""
    return row["task"], row["sample"], row["card"]


def timings(samples: Iterable[SampleDigest]) -> list[int]:
    """Which samples were timed together: numbers from 0 on, below it those that were alone."""
    return [-1 - place if sample.timed is None else sample.timed for place, sample in enumerate(samples)]


def _cell(rows: list[Row], full: dict[tuple[str, str, str], Row]) -> CellDigest:
    beside = [full.get(_beside(row), {}) for row in rows]
    each = zip(rows, beside, _timed(rows, beside), strict=True)
    samples = {row["sample"]: _sample(row, costs_of(other), timed) for row, other, timed in each}
    scores = [sample.score for sample in samples.values() if sample.score is not None]
    return CellDigest(
        n=len(samples),
        score=round(float(np.mean(scores)), 6) if scores else None,
        kept_per_layer=_mean_kept([row["tokens_kept"] for row in rows]),
        ratios=_summaries(list(samples.values())),
        samples=samples,
    )


def _timed(rows: list[Row], beside: list[Row]) -> list[int | None]:
    """Number of the batches that a row and full attention beside it were of; None where both were alone."""
    groups = joined([row["timed"] for row in rows], [row.get("timed", -place) for place, row in enumerate(beside, 1)])
    _, which, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return [int(number) if counts[number] > 1 else None for number in which]


def _sample(row: Row, full: Times, timed: int | None) -> SampleDigest:
    own, is_reference = costs_of(row), row["method"] == REFERENCE
    ratio = {} if is_reference else {name: _short(full[name] / own[name]) for name in own if name in full}
    extra = row["extra"] if isinstance(row["extra"], dict) else {}
    context = extra.get("context_hash")
    return SampleDigest(
        prompt=str(row["prompt_hash"])[:16],
        context=None if context is None else str(context)[:16],
        timed=timed,
        answer=_hash(row["prediction"]) if isinstance(row["prediction"], str) else None,
        score=None if pd.isna(row["score"]) else round(float(row["score"]), 6),
        kept=round(sum(row["tokens_kept"]), 2),
        kept_hash=_hash(list(row["tokens_kept"])),
        tokens=kept_digest(extra),
        ratio=ratio,
        seconds={name: _short(own[name]) for name in SPEEDS if name in own} if is_reference else {},
    )


def _hash(value: str | list[float]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _mean_kept(kept: list[list[float]]) -> list[float]:
    """[layers] over samples; all have the same number of layers, as a run is of one model."""
    return [round(float(np.mean(layer)), 2) for layer in zip(*kept, strict=False)]


def _summaries(samples: list[SampleDigest]) -> dict[str, RatioSummary]:
    found = {}
    for name in (*COSTS, *TAILS):
        logs = [math.log(sample.ratio[name]) if name in sample.ratio else math.nan for sample in samples]
        effect = speed_effect([pairs(logs, units(samples), timed=[timings(samples)])])
        if effect.n:
            low, high = (None if math.isnan(end) else _short(math.exp(end)) for end in (effect.low, effect.high))
            found[name] = RatioSummary(n=effect.n, ratio=_short(math.exp(effect.estimate)), low=low, high=high)
    return found


def _floors(records: pd.DataFrame) -> dict[str, dict[str, float]]:
    rows = noise_floor(records).to_dict("records")
    named = {row["task"]: {name: float(row[f"{name}_floor"]) for name in MEASURES} for row in rows}
    return {task: {k: _short(v) for k, v in floors.items() if math.isfinite(v)} for task, floors in named.items()}


def _provenance(manifest: Manifest) -> dict[str, Any]:
    last = manifest.environments[-1] if manifest.environments else {}
    return {
        "run": manifest.run_hash,
        "recorded": manifest.updated[:10],
        "model": manifest.model,
        "asked": {name: manifest.spec.get(name) for name in ("max_length", "seed", "question")},
        "weights": manifest.facts.get("weights_hash"),
        "dtype": manifest.facts.get("dtype"),
        "attention": manifest.facts.get("attention"),
        "device": manifest.device,
        "machines": _machines(manifest),
        "git": last.get("git"),
        "versions": _versions(last),
    }


def _machines(manifest: Manifest) -> list[dict[str, Any]]:
    """Every machine that the run was on, once."""
    found: list[dict[str, Any]] = []
    for environment in manifest.environments:
        record: dict[str, Any] = dict(environment.get("cpu") or {})
        if manifest.device == "cuda":
            names = ("name", "driver", "memory_bytes", "power_limit_w")
            record["gpus"] = [{name: gpu.get(name) for name in names} for gpu in environment.get("cuda") or ()]
        found += [record] if record not in found else []
    return found


def _versions(environment: dict[str, Any]) -> dict[str, str]:
    packages = {name: version for name, version in (environment.get("packages") or {}).items() if version}
    return packages | ({"python": environment["python"]} if "python" in environment else {})


def _pruned(value: Any) -> Any:
    """Without empty dictionaries, at any depth."""
    if not isinstance(value, dict):
        return value
    return {name: kept for name, inner in value.items() if (kept := _pruned(inner)) != {}}


def _block(value: Any, indent: str) -> str:
    line = json.dumps(value, sort_keys=True, ensure_ascii=False)
    if not isinstance(value, dict) or (len(line) <= _LINE and _depth(value) <= 2):
        return line
    deeper = indent + " "
    entries = [f"{deeper}{json.dumps(key)}: {_block(value[key], deeper)}" for key in sorted(value)]
    return "{\n" + ",\n".join(entries) + f"\n{indent}}}"


def _depth(value: dict[str, Any]) -> int:
    return 1 + max((_depth(inner) for inner in value.values() if isinstance(inner, dict)), default=0)
