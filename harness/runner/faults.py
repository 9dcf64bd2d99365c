"""Whose fault an exception is: the hook, the layer and the line of a method, or of a task, in one line.

Both may come from a user's file. What such a file raises is read off the traceback, so that nothing is wrapped around
its functions while they are timed.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, FunctionType

import torch

from harness.engine.method import Method
from harness.engine.promises import BrokenPromise
from harness.errors import InputError
from tasks.base import Task

MOST = 300
"""Characters of a foreign message that are kept."""

_OUT_OF_MEMORY = ("out of memory", "alloc_failed")
# A path says whose machine it is; its last name says which file.
_FOLDERS = re.compile(r"(?<![\w.:/])(?:/[^/\s'\"]+)+/(?=[^/\s'\"])")


class Fault(Exception):
    """A fault that was told when it came up: its message is the line."""


def told(owner: object, error: Exception) -> str:
    """What went wrong in one line: "attend, layer 3: ValueError: my own bug (boom.py:24)".

    Args:
        owner: the method, or the task, that was asked; its class, where there is no object yet.
        error: what came of it.
    """
    if isinstance(error, Fault):
        return str(error)
    where = _broken(owner, error) if isinstance(error, BrokenPromise) else _raised(owner, error)
    return f"{where[0]}{_message(error)}{where[1]}"


@contextmanager
def blamed(owner: object, label: str) -> Iterator[None]:
    """Turns whatever the owner raises into one line.

    Args:
        owner: as `told` takes it.
        label: how the user calls it.

    Raises:
        InputError: it raised something, or bad input is told already.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever a third party's code raises
        raise InputError(f"{label}: {told(owner, error)}") from error


def ran_out(error: BaseException | None) -> bool:
    """Whether the device had no memory left, whoever says so, and whatever came of it.

    PyTorch's allocator says it by a type. What takes memory past it (modules of kernels, workspaces, graphs) says it in
    words, and an allocation that fails while a graph is captured may come out as the failure of the capture.
    """
    while error is not None:
        told_so = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OUT_OF_MEMORY)
        if told_so or isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def comes_from(owner: object, error: Exception) -> bool:
    """Whether the exception came out of one of the owner's functions."""
    return isinstance(error, BrokenPromise) or bool(_called(owner, error))


def _called(owner: object, error: Exception) -> list[FrameType]:
    """The owner's functions on the way to the error, outermost first."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return [frame for frame in frames if _is_of(owner, _self(frame)) and hasattr(_kind(owner), frame.f_code.co_name)]


def _is_of(owner: object, asked: object) -> bool:
    """Whether it is the owner or its class; of a class, whether it is one of its objects."""
    return asked is owner or asked is _kind(owner) or (isinstance(owner, type) and isinstance(asked, owner))


def _kind(owner: object) -> type:
    return owner if isinstance(owner, type) else type(owner)


def _broken(owner: object, error: BrokenPromise) -> tuple[str, str]:
    code = getattr(getattr(_kind(owner), error.hook), "__code__", None)
    return _hook(error.hook, error.layer), _place(code.co_filename, code.co_firstlineno) if code else ""


def _raised(owner: object, error: Exception) -> tuple[str, str]:
    called, own = _called(owner, error), _folders(_kind(owner))
    layers = (frame.f_locals.get("layer") for frame in called)
    layer = next((layer for layer in layers if isinstance(layer, int)), None)
    lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    places = [place for place in lines if Path(place[0]).parent in own] or _outside(lines)
    return _hook(called[0].f_code.co_name, layer) if called else "", _place(*places[-1]) if places else ""


def _self(frame: FrameType) -> object:
    """What the frame's function was called on: its first argument, whatever that is named."""
    names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
    return frame.f_locals.get(names[0]) if names else None


def _folders(kind: type) -> set[Path]:
    """Where the class and its bases lie, the interface that all have left out."""
    own = [base for base in kind.__mro__ if base not in (Method, Task, object)]
    functions = [value for base in own for value in vars(base).values() if isinstance(value, FunctionType)]
    return {Path(function.__code__.co_filename).parent for function in functions}


def _outside(lines: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(name, line) for name, line in lines if "site-packages" not in Path(name).parts]


def _hook(name: str, layer: int | None) -> str:
    return f"{name}: " if layer is None else f"{name}, layer {layer}: "


def _place(file: str, line: int) -> str:
    return f" ({Path(file).name}:{line})"


def _message(error: Exception) -> str:
    text = _FOLDERS.sub("", " ".join(str(error).split()))[:MOST]
    if isinstance(error, InputError | BrokenPromise):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
