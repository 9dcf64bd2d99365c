"""Triton kernels without a GPU: Triton's interpreter, made to work whatever was imported before."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

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
