"""Triton kernels without a GPU: Triton's interpreter, made to work whatever was imported before, and much faster."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.reference.compiler import compiler, launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def kernels(name: str) -> ModuleType:
    """The module `harness.engine.kernels.<name>`: compiled where there is a GPU, else interpreted."""
    pytest.importorskip("triton", reason="kernels need triton")
    if DEVICE == "cuda":
        return importlib.import_module(f"harness.engine.kernels.{name}")
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        _mend()
        return _interpreted(importlib.import_module(f"harness.engine.kernels.{name}"))
    finally:
        os.environ.pop("TRITON_INTERPRET")
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def _interpreted(module: ModuleType) -> ModuleType:
    """The module, and those that its kernels call into, decorated anew if need be."""
    compiled = _compiled(module)
    if not compiled:
        return module
    for name in {function.fn.__module__ for function in compiled.values()} - {module.__name__}:
        _interpreted(importlib.import_module(name))
    return importlib.reload(module)


def _mend() -> None:
    """`triton.jit` asks the environment when it decorates: what it decorated before is decorated again."""
    import triton.language as tl
    from triton.runtime import interpreter

    # Triton would import it later, and it checks that what it builds on has not been touched.
    importlib.import_module("triton.experimental.gluon")

    for name, function in _compiled(tl.standard).items():
        again = interpreter.InterpretedFunction(function.fn)
        for place in (tl, tl.standard):
            if getattr(place, name, None) is function:
                setattr(place, name, again)
    if not hasattr(interpreter._patch_lang_tensor, "mended"):
        interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)
        interpreter.InterpretedFunction.run = _compiling(interpreter.InterpretedFunction.run)
        _hasten(interpreter)


def _compiling(run: Callable[..., Any]) -> Callable[..., Any]:
    """Shows the compiler what is launched, too: it refuses much that the interpreter takes."""

    def checked(function: Any, *args: Any, **options: Any) -> Any:
        asked = {name: value for name, value in options.items() if name not in ("grid", "warmup")}
        compiler().check(launch(function.fn, args, asked))
        return run(function, *args, **options)

    return checked


def _hasten(interpreter: Any) -> None:
    """Leaves out what the interpreter does over and over; what it computes stays the same."""
    # It looks for integer overflows, and outside of debug mode says nothing about them.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    # A table is built for every dtype that is looked up in it.
    interpreter._get_np_dtype = _known_scalars(interpreter._get_np_dtype)
    # The language is patched anew at every call of a function, and a kernel takes its own patches back.
    interpreter._patch_lang = _patch_once(interpreter._patch_lang, interpreter._LangPatchScope)
    # All but sums and extrema are reduced element by element.
    interpreter.ReduceOps.generic_reduce = _by_halves(interpreter.ReduceOps.generic_reduce)


def _known_scalars(numpy_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    from triton.language import dtype

    known = cache(numpy_dtype)
    # Pointers have no hash.
    return lambda kind: known(kind.scalar) if type(kind.scalar) is dtype else numpy_dtype(kind)


def _patch_once(patch: Callable[[Any], Any], nothing: Callable[[], Any]) -> Callable[[Any], Any]:
    patched: set[str] = set()

    def once(function: Any) -> Any:
        if function.__module__ not in patched:
            patched.add(function.__module__)
            patch(function)
        return nothing()

    return once


def _by_halves(one_by_one: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Joins one half of a row with the other until one element is left, as a GPU does."""

    def reduced(reduction: Any, row: tuple[Any, ...]) -> Any:
        if reduction.axis != 0 or reduction.keep_dims or row[0].handle.data.ndim != 1:
            return one_by_one(reduction, row)
        dtypes = [part.dtype for part in row]
        while row[0].handle.data.size > 1:
            halves = [np.split(part.handle.data, 2) for part in row]
            left, right = (map(reduction.to_tensor, half, dtypes) for half in zip(*halves, strict=True))
            joined = reduction.combine_fn.fn(*left, *right)
            row = joined if isinstance(joined, tuple) else (joined,)
        return [reduction.to_tensor(part.handle.data.item(), dtype) for part, dtype in zip(row, dtypes, strict=True)]

    return reduced


def _compiled(module: ModuleType) -> dict[str, Any]:
    from triton.runtime.jit import JITFunction

    return {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}


def _with_index(patch: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Bounds of a loop reach `range` as arrays of one element, which numpy since 2.4 refuses to take for a number."""

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    mended.mended = True  # type: ignore[attr-defined]
    return mended
