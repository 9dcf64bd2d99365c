"""The user's cache folder: content hashes of large files, and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from harness.errors import InputError


def cache_dir() -> Path:
    """`harness/` under XDG_CACHE_HOME, or under ~/.cache; not created."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification has relative paths ignored.
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "harness"


def file_digest(path: Path) -> str:
    """Sha256 (hex) of a file's content, read again only when its path, size or time of modification changed.

    A file of the Hugging Face cache is already named by its sha256, so it is not read at all.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and len(real.name) == 64:
        return real.name
    facts = real.stat()
    key = hashlib.sha256(f"{real}|{facts.st_size}|{facts.st_mtime_ns}".encode()).hexdigest()
    return _remembered(cache_dir() / "digests" / key, lambda: _sha256(real))


def files_digest(paths: Iterable[Path]) -> str:
    """Sha256 (hex) over the names and digests of several files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(f"{path.name} {file_digest(path)}\n".encode())
    return digest.hexdigest()


def folder_once(name: str, fill: Callable[[Path], None]) -> Path:
    """The cached folder `name`, made by `fill` if it is not there yet.

    `fill` writes into a temporary folder beside it, which is then renamed: no process ever sees a folder half written,
    and of two that make it at once the slower one throws its copy away.

    Raises:
        InputError: the cache cannot be written.
    """
    target = cache_dir() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fill_and_rename(target, fill)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write the model cache {target}: {reason}; XDG_CACHE_HOME moves it") from None
    return target


def write_note(note: Path, value: str) -> None:
    """Writes a small file whole; one that cannot be written is not there the next time, and nothing else happens."""
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=note.parent)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(value)
        os.replace(scratch, note)
    except OSError:
        # A note only saves time.
        return


def _fill_and_rename(target: Path, fill: Callable[[Path], None]) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fill(scratch)
        scratch.rename(target)
    except OSError:
        # Renaming onto a folder with files fails: another process was faster, and its copy is as good as ours.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remembered(note: Path, compute: Callable[[], str]) -> str:
    try:
        text = note.read_text()
    except OSError:
        text = ""
    if len(text) == 64:
        return text
    value = compute()
    write_note(note, value)
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
