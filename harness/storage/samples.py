"""The file of a run's records: read line by line, every line checked, and the whole against the seal of the manifest.

A seal says how many records there were when the run ended, and what they were. Runs of older versions have none.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.errors import InputError
from harness.storage.record import Record

SAMPLES, PACKED = "samples.jsonl", "samples.jsonl.gz"


class Seal(BaseModel):
    """What the records of a run were when it ended."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(ge=0, description="how many there were")
    sha256: str = Field(description="of samples.jsonl, unpacked")


@dataclass(frozen=True)
class Samples:
    """What the file of a run's records holds.

    Attributes:
        path: of the file.
        whole: all lines that end in a newline.
        rest: what follows them: a line that is still being written, or torn.
    """

    path: Path
    whole: bytes
    rest: bytes

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Of a run's folder, packed or not; nothing where there is no file.

        Raises:
            InputError: it cannot be unpacked.
        """
        path = folder / (SAMPLES if (folder / SAMPLES).exists() else PACKED)
        content = unpacked(path) if path.exists() else b""
        end = content.rfind(b"\n") + 1
        return cls(path, content[:end], content[end:])

    @property
    def seal(self) -> Seal:
        """Of the whole lines."""
        return Seal(count=self.whole.count(b"\n"), sha256=hashlib.sha256(self.whole).hexdigest())

    def records(
        self, methods: Sequence[str], tasks: Sequence[str], aside: Mapping[str, int] | None = None
    ) -> list[Record]:
        """The records of the whole lines; of a request that failed, the last try alone.

        Args:
            methods, tasks: labels that the run has.
            aside: cell -> what a record's `redo` has to be at least; those below are left out.

        Raises:
            InputError: a line that is no record, has what cannot be, is of another method or task, has another number
                of layers than the first, or repeats a sample.
        """
        records: dict[tuple[str, str, str], Record] = {}
        layers, aside = None, aside or {}
        for number, line in enumerate(self.whole.split(b"\n")[:-1], start=1):
            record = self._record(number, line)
            if (record.redo or 0) < aside.get(record.cell, 0):
                continue
            layers = layers or len(record.tokens_kept)
            for wrong in _strange(record, methods, tasks, layers):
                raise self._corrupt(number, wrong)
            tried = records.pop(key := (record.method, record.task, record.sample), None)
            if tried is not None and not tried.failed:
                raise InputError(f"{self.path} line {number} repeats a sample that an earlier line holds")
            records[key] = record
        return list(records.values())

    def check(self, sealed: Seal | None) -> None:
        """Are these the records that the run ended with?

        Raises:
            InputError: some are missing, torn, changed or new.
        """
        held = self.seal
        if sealed is None or held == sealed:
            return
        torn = " and a torn one" if self.rest else ""
        again = f"'harness resume {self.path.parent}' asks those that are missing again"
        raise InputError(
            f"{self.path} holds {held.count} whole records{torn}, and the run ended with {sealed.count}; "
            + (again if held.count < sealed.count else "records were changed or added since")
        )

    def _record(self, number: int, line: bytes) -> Record:
        try:
            return Record.model_validate_json(line)
        except ValidationError as error:
            raise self._corrupt(number, first_line(error)) from None

    def _corrupt(self, number: int, why: str) -> InputError:
        return InputError(f"{self.path} line {number} is corrupt: {why}")


def unpacked(path: Path) -> bytes:
    """What a file of records holds.

    Raises:
        InputError: it cannot be unpacked.
    """
    content = path.read_bytes()
    if path.name != PACKED:
        return content
    try:
        if not content:  # which would unpack to no record at all
            raise EOFError
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error):
        raise InputError(f"{path} is corrupt: it cannot be unpacked") from None


def first_line(error: ValueError) -> str:
    """What is wrong, and where, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return ": ".join([".".join(map(str, first["loc"])), first["msg"]]).removeprefix(": ")
    return str(error).partition("\n")[0]


def _strange(record: Record, methods: Sequence[str], tasks: Sequence[str], layers: int) -> Iterator[str]:
    """What is wrong with a record in the company it keeps."""
    if record.method not in methods:
        yield f"the run has no method {record.method!r}"
    if record.task not in tasks:
        yield f"the run has no task {record.task!r}"
    if len(record.tokens_kept) != layers:
        yield f"{len(record.tokens_kept)} layers where other lines have {layers}"
