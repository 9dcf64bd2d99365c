"""A run on disk: what was asked, and every answer the moment it is there.

    results/<name>/manifest.json   what was asked, of what, where; and whether it is complete
    results/<name>/samples.jsonl   one record a line, only ever appended to, on the disk before the next sample starts

`kill -9` loses at most the sample in flight: the half-written line it leaves is dropped when the run is opened again.
Whoever reads a run that has ended is told where records are not those that it ended with.
Records of code that has changed since may be left aside (`RunStore.leave_aside`): they stay in the file, unread.
A run that is kept for later may be packed, `gzip samples.jsonl`: it is read as it is, and unpacked if it goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from harness.errors import InputError
from harness.storage.record import Record
from harness.storage.samples import PACKED, SAMPLES, Samples, Seal, first_line, unpacked

MANIFEST_VERSION = 1
MANIFEST, LOCK = "manifest.json", ".lock"

_FLOATS = ("score", "ttft_s", "tpot_s", "e2e_s", "energy_j", "batch_tokens_per_s")
_DERIVED = ("kept_fraction", "tpot_mean_s", "energy_per_token_j")
_INTS = ("peak_memory_bytes", "kv_bytes", "kv_bytes_host", "extra_bytes", "batch", "redo")


class Spent(BaseModel):
    """What a run has taken by the clock on the wall: loading, warming up and reading data included."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float = Field(default=0.0, ge=0, description="of the sessions that answered something and were not killed")
    requests: int = Field(default=0, ge=0, description="that were answered in them")


class Manifest(BaseModel):
    """What a run is. The caller fills in the upper half, the store keeps the lower half."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_hash: str = Field(description="content hash of everything that shapes the run's answers; equal hashes resume")
    model: str = Field(description="the model, as asked for")
    device: str = Field(description='where it runs: "cpu" or "cuda"')
    latency_only: bool = Field(default=False, description="random weights: answers mean nothing and are not scored")
    methods: list[str] = Field(description="labels in the order of the run")
    tasks: list[str] = Field(description="labels in the order of the run")
    spec: dict[str, Any] = Field(default_factory=dict, description="the whole specification, as JSON values")

    version: int = MANIFEST_VERSION
    status: Literal["running", "complete", "incomplete"] = "running"
    reasons: list[str] = Field(default_factory=list, description="why the run is incomplete")
    records: Seal | None = Field(default=None, description="of the records, once the run has ended; null in older runs")
    spent: Spent = Field(default_factory=Spent, description="time by the wall; none in older runs")
    started: str = Field(default="", description="UTC, ISO 8601, of the first session")
    updated: str = Field(default="", description="UTC, ISO 8601, of the last change to this file")
    environments: list[dict[str, Any]] = Field(
        default_factory=list,
        description="machine and software (harness.measuring.provenance), a new one each time it changed",
    )
    aside: dict[str, int] = Field(
        default_factory=dict,
        description="cell -> its records whose `redo` is smaller are not read: their code has changed since, and their "
        "requests are asked again",
    )
    facts: dict[str, Any] = Field(
        default_factory=dict, description="what is known only once things are loaded (weights hash); never changes"
    )


class RunStore:
    """The one writer of a results folder; a context manager, so that whatever happens the folder stays valid.

    Leaving the context without `finish` marks the run incomplete and says why. A run that is refused before it has a
    record leaves what was there before it.

    Attributes:
        folder: the run's folder.
        manifest: as it is on disk.
        done: (cell, sample) of every record on disk; of those that failed, or are left aside, not.
        cells: (method, task) -> cell of these records.
        repaired: bytes of a torn last line that were dropped on opening; 0 almost always.
    """

    def __init__(self, folder: Path | str, manifest: Manifest, environment: dict[str, Any] | None = None) -> None:
        """Starts the run `manifest`, or resumes it where the folder holds records of a run of the same hash.

        Args:
            folder: made if it does not exist.
            manifest: what the run is; the store adds what it keeps itself.
            environment: `harness.measuring.provenance.environment()`, if it is to be recorded.

        Raises:
            InputError: the folder holds another run or other files, is being written by another process, is corrupt,
                or cannot be written.
        """
        self.folder = Path(folder)
        self._new = not (self.folder / MANIFEST).exists()
        self._lock, self._finished = _lock(self.folder), False
        self._opened, self._appended = time.monotonic(), 0
        try:
            samples = Samples.read(self.folder)
            self.manifest = _resumed(self.folder, manifest, anew=not samples.whole)
            self._whole, self.repaired = len(samples.whole), len(samples.rest)
            self._index(samples)
            self._environments = _joined(self.manifest.environments, environment)
            if self.manifest.status == "running":
                self._begin()
        except BaseException:
            self.close()
            raise

    def append(self, record: Record) -> None:
        """Writes one record; it is on the disk when this returns, or not in the file at all.

        Raises:
            InputError: the disk is full or gone, or the run holds answers of this method and task from another cell:
                from other code, weights or package versions.
            ValueError: the sample was answered before.
        """
        key = (record.cell, record.sample)
        if not record.failed and self.cells.setdefault((record.method, record.task), record.cell) != record.cell:
            raise InputError(f"{self.folder}: code or versions changed since it was started; {_ANOTHER}")
        if key in self.done:
            raise ValueError(f"sample {record.sample!r} of {record.method} x {record.task} is recorded already")
        if self.manifest.status != "running":
            self._begin()
        try:
            numbered = record.model_copy(update={"redo": self.redo or None})
            self._write(numbered.model_dump_json().encode() + b"\n")
        except OSError as error:
            raise _cannot_write(self.folder, error) from None
        self._appended += 1
        if not record.failed:
            self.done.add(key)

    @property
    def redo(self) -> int:
        """How often records were left aside."""
        return max(self.manifest.aside.values(), default=0)

    def leave_aside(self, cells: Collection[str]) -> int:
        """From here on no record of these cells counts: their requests are asked again. All stay in the file.

        Returns:
            How many requests that are.

        Raises:
            InputError: the disk is full or gone.
        """
        before = len(self.done)
        if self.manifest.status != "running":
            self._begin()
        self._set(aside=self.manifest.aside | dict.fromkeys(sorted(cells), self.redo + 1))
        self._index(Samples.read(self.folder))
        return before - len(self.done)

    def describe(self, **facts: Any) -> None:
        """Adds facts to the manifest that are known only now: weights hash, data revision, method source hashes.

        Raises:
            InputError: a fact differs from what the run was started with.
        """
        known = self.manifest.facts
        fresh: dict[str, Any] = json.loads(json.dumps(facts))
        for name, value in fresh.items():
            if self._binding(known.get(name, value)) != self._binding(value):
                raise InputError(f"{self.folder}: {name} is not what this run was started with; {_ANOTHER}")
        if known | fresh != known:
            self._set(facts=known | fresh)

    def _binding(self, fact: Any) -> Any:
        """What must not change of a fact; one by method or task may until there is an answer to keep."""
        answered = {label for cell in self.cells for label in cell}
        return {label: fact[label] for label in fact if label in answered} if isinstance(fact, dict) else fact

    def made_in(self, environment: dict[str, Any]) -> None:
        """Adds a worker's machine and software to the manifest, with the next record, unless they are there."""
        if environment not in self._environments:
            self._environments = [*self._environments, environment]
            if self.manifest.status == "running":
                self._set(environments=self._environments)

    def arrange(self, keys: Sequence[tuple[str, str]]) -> None:
        """Puts the records on disk into the order of their (cell, sample), in one step; others stay behind them.

        Raises:
            InputError: the disk is full or gone.
        """
        if self.manifest.status != "running":
            return
        ranks = {key: rank for rank, key in enumerate(keys)}
        lines = Samples.read(self.folder).whole.splitlines(keepends=True)
        ranked = sorted(lines, key=lambda line: ranks.get(_key(line), len(ranks)))
        if ranked != lines:
            os.close(self._file)
            del self._file
            _replace(self.folder / SAMPLES, b"".join(ranked))
            self._open()

    def finish(self, reasons: Sequence[str] = ()) -> None:
        """Marks the run complete, or incomplete where there are reasons, and seals its records.

        Raises:
            InputError: the disk is full or gone.
        """
        status = "incomplete" if reasons else "complete"
        self._set(status=status, reasons=list(reasons), records=Samples.read(self.folder).seal, spent=self._spent())
        self._finished = True

    def _spent(self) -> Spent:
        """With what this session has taken; then the next one begins."""
        before, now = self.manifest.spent, time.monotonic()
        seconds, requests = (now - self._opened if self._appended else 0.0), self._appended
        self._opened, self._appended = now, 0
        return Spent(seconds=round(before.seconds + seconds, 1), requests=before.requests + requests)

    def close(self) -> None:
        """Lets other processes write the run; may be called twice."""
        for name in ("_file", "_lock"):
            descriptor = self.__dict__.pop(name, None)
            if descriptor is not None:
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        refused = kind is not None and issubclass(kind, InputError)
        try:
            if refused and self._new and not (self._appended or self._finished):
                self._withdraw()
            elif not (self._finished or (refused and self.manifest.status != "running")):
                # On a full disk this fails too; the status on disk stays "running", which is true enough.
                with suppress(InputError):
                    self.finish([_reason(kind)])
        finally:
            self.close()

    def _withdraw(self) -> None:
        """What is refused only once the model or the data is read leaves no run, and no folder unless it holds more."""
        with suppress(OSError):
            for name in (SAMPLES, MANIFEST, LOCK):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()

    def _index(self, samples: Samples) -> None:
        answered = [record for record in self._known(samples) if not record.failed]
        self.done = {(record.cell, record.sample) for record in answered}
        self.cells = {(record.method, record.task): record.cell for record in answered}

    def _known(self, samples: Samples) -> list[Record]:
        """The records on disk. Those that are missing will be asked again; changed or added ones are refused."""
        manifest, sealed = self.manifest, self.manifest.records
        records = samples.records(manifest.methods, manifest.tasks, manifest.aside)
        if sealed is not None and samples.seal.count >= sealed.count:
            samples.check(sealed)
        return records

    def _begin(self) -> None:
        """From here on the run changes. A torn last line goes first."""
        _unpack(self.folder)
        self._set(status="running", reasons=[], records=None, environments=self._environments)
        self._open()
        os.ftruncate(self._file, self._whole)

    def _open(self) -> None:
        self._file = os.open(self.folder / SAMPLES, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _write(self, line: bytes) -> None:
        """All of the line or nothing: a disk that fills up, and Ctrl-C, may leave a part of it."""
        end = os.fstat(self._file).st_size
        try:
            rest = line
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except BaseException:
            os.ftruncate(self._file, end)
            raise

    def _set(self, **changes: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        changes |= {"updated": now, "started": self.manifest.started or now}
        changed = self.manifest.model_copy(update=changes)
        _replace(self.folder / MANIFEST, (changed.model_dump_json(indent=2) + "\n").encode())
        self.manifest = changed


def load(run: Path | str) -> pd.DataFrame:
    """Reads the records of a run, of one that is still being written too.

    Returns:
        One row a record, in the order they were written: the fields of `harness.storage.record.Record` and its
        `kept_fraction`, `tpot_mean_s` and `energy_per_token_j`. What was not measured is NaN or NA.

    Raises:
        InputError: the folder is not a run, a line of it is corrupt, or records are not those that it ended with.
    """
    folder, manifest = Path(run), load_manifest(run)
    samples = Samples.read(folder)
    records = samples.records(manifest.methods, manifest.tasks, manifest.aside)
    samples.check(manifest.records)
    rows = [record.model_dump() | {name: getattr(record, name) for name in _DERIVED} for record in records]
    frame = pd.DataFrame(rows, columns=[*Record.model_fields, *_DERIVED])
    return frame.astype(dict.fromkeys((*_FLOATS, *_DERIVED), "float64") | dict.fromkeys(_INTS, "Int64"))


def answered(run: Path | str) -> list[Record]:
    """The records that count, of a run that is still being written too; those that failed do not.

    Raises:
        InputError: the folder is not a run, or a line of it is corrupt.
    """
    manifest = load_manifest(run)
    records = Samples.read(Path(run)).records(manifest.methods, manifest.tasks, manifest.aside)
    return [record for record in records if not record.failed]


def load_manifest(run: Path | str) -> Manifest:
    """Reads what a run is.

    Raises:
        InputError: the folder is not a run, or its manifest is corrupt or of another version.
    """
    path = Path(run) / MANIFEST
    if not path.is_file():
        raise InputError(f"{run} is not a run: it has no {MANIFEST}")
    try:
        values = json.loads(path.read_bytes())
        version = values.get("version") if isinstance(values, dict) else None
        if version != MANIFEST_VERSION:
            raise InputError(f"{path} has version {version}; this harness reads version {MANIFEST_VERSION}")
        return Manifest.model_validate(values)
    except ValueError as error:
        raise InputError(f"{path} is corrupt: {first_line(error)}") from None


def found_by(folder: Path, asked: Manifest) -> Manifest | None:
    """The run that `RunStore` would go on with, if there is one with records; nothing is written.

    Raises:
        InputError: the folder holds another run or other files, or is corrupt.
    """
    if not folder.is_dir():
        return None
    _check_ours(folder)
    if not (folder / MANIFEST).exists():
        return None
    found = _resumed(folder, asked, anew=not Samples.read(folder).whole)
    return None if found is asked else found


_ANOTHER = "choose another --output or delete the folder"


def _lock(folder: Path) -> int:
    """Makes the folder and takes its lock; the kernel lets go of it when the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_ours(folder)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _cannot_write(folder, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise InputError(f"{folder} is being written by another process; choose another --output or wait") from None
    return lock


def _check_ours(folder: Path) -> None:
    """Raises `InputError` where there is no run, but files that a start which was killed at once cannot have left."""
    if not (folder / MANIFEST).exists() and {path.name for path in folder.iterdir()} - {LOCK, MANIFEST + ".tmp"}:
        raise InputError(f"{folder} holds files but no run; choose another --output")


def _apart(found: Manifest, asked: Manifest) -> str:
    """Options that tell the run on disk from the one asked for: ` (seed: 0, not 1)`; "" where none is recorded."""
    there, here = found.spec, asked.spec
    names = sorted(name for name in there | here if name != "limit" and there.get(name) != here.get(name))
    told = (
        f"{name.replace('_', '-')}: {there.get(name, 'default')}, not {here.get(name, 'default')}" for name in names
    )
    return f" ({'; '.join(told)})" if names else ""


def _resumed(folder: Path, asked: Manifest, *, anew: bool) -> Manifest:
    """The manifest on disk if it is of the run that is asked for; the one asked for if there is none, or no record."""
    if not (folder / MANIFEST).exists():
        return asked
    found = load_manifest(folder)
    if anew and not (found.records and found.records.count):
        return asked
    if found.run_hash != asked.run_hash:
        raise InputError(f"{folder} holds a different run{_apart(found, asked)}; {_ANOTHER}")
    asked_fields = ("run_hash", "model", "device", "latency_only", "methods", "tasks", "spec")
    return found.model_copy(update={name: getattr(asked, name) for name in asked_fields})


def _key(line: bytes) -> tuple[str, str]:
    values = json.loads(line)
    return values["cell"], values["sample"]


def _joined(environments: list[dict[str, Any]], environment: dict[str, Any] | None) -> list[dict[str, Any]]:
    if environment is None or environments[-1:] == [environment]:
        return environments
    return [*environments, environment]


def _unpack(folder: Path) -> None:
    """Makes a packed run one that can be appended to; killed in between, it is still whole."""
    packed = folder / PACKED
    if packed.exists():
        if not (folder / SAMPLES).exists():
            _replace(folder / SAMPLES, unpacked(packed))
        packed.unlink()


def _replace(path: Path, content: bytes) -> None:
    """Replaces a file in one step: a reader sees the old one or the new one, never half of either."""
    scratch = path.with_name(path.name + ".tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise _cannot_write(path.parent, error) from None


def _cannot_write(folder: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {folder}: {error.strerror or error}; what was recorded before is intact")


def _reason(kind: type[BaseException] | None) -> str:
    # Only the name: the message may hold paths of this machine, and the terminal shows it anyway.
    if kind is None:
        return "stopped before the end"
    return "interrupted" if issubclass(kind, KeyboardInterrupt) else f"stopped by {kind.__name__}"
