"""Records of data files, checked while they are read: a message names file, place and field."""

from __future__ import annotations

import codecs
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from harness.errors import InputError, MissingPackage

_SURROGATE = re.compile("[\\ud800-\\udfff]")

M = TypeVar("M", bound=BaseModel)

Row = tuple[str, Mapping[str, Any]]
"""Where a record stands (file and line), and its fields."""


def rows(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file, line by line, or of one JSON list.

    Raises:
        InputError: the file cannot be read or is empty, or does not hold objects.
    """
    try:
        with path.open("rb") as file:
            is_list = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        return _listed(path) if is_list else local_rows(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def local_rows(path: Path) -> Iterator[Row]:
    """Rows of a JSONL file, one line at a time.

    Raises:
        InputError: the file cannot be read or is empty, or a line is not UTF-8 or not JSON.
    """
    empty = True
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    empty = False
                    yield f"{path}:{number}", read_object(line, f"{path}:{number}")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if empty:
        raise InputError(f"{path} holds no records")


def read_object(line: bytes, place: str) -> dict[str, Any]:
    """One line of JSONL.

    Args:
        line: raw bytes.
        place: file and line number, for the message.

    Raises:
        InputError: not UTF-8, not JSON (cut off, for instance), not an object, or with halves of surrogate pairs.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))  # files from Windows begin with a mark
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 (byte {error.start} of the line)") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not valid JSON, or cut off: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected a JSON object, found {type(row).__name__}")
    for key, value in row.items():
        if _SURROGATE.search(json.dumps([key, value], ensure_ascii=False)):
            raise InputError(f"{place}: field {key!a} holds half of a surrogate pair, which is no text")
    return row


def require_datasets() -> Any:
    """The module `datasets`.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise MissingPackage("source=hub needs the package datasets: pip install 'harness[longbench]'") from None


def checked(model: type[M], place: str, row: Mapping[str, Any]) -> M:
    """The row as a model.

    Args:
        model: its fields are the row's.
        place: file and line, for the message.
        row: as read.

    Raises:
        InputError: a field is missing or wrong; it is named.
    """
    try:
        return model.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{place}: field {str(first['loc'][0])!r}: {message}") from None


def _listed(path: Path) -> Iterator[Row]:
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON, or cut off: {error}") from None
    if not entries:
        raise InputError(f"{path} holds no records")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise InputError(f"{path} record {number}: expected a JSON object, found {type(entry).__name__}")
        yield f"{path} record {number}", entry
