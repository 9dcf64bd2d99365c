"""Triton kernels without a GPU: Triton's interpreter, made to work whatever was imported before, and much faster."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from dataclasses import replace
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
    interpreter._patch_attr = _patch_directly(interpreter.interpreter_semantic)
    # All but sums and extrema are reduced element by element.
    interpreter.ReduceOps.generic_reduce = _by_halves(interpreter.ReduceOps.generic_reduce)
    _know_types(interpreter.tl)
    _know_operands(interpreter.TritonSemantic, interpreter.tl)


def _known_scalars(numpy_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    def looked_up(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in known:
            known[name] = numpy_dtype(kind)
        return known[name]

    return looked_up


def _know_types(tl: Any) -> None:
    """One object for each type of a block, and for each shape: every value has both, and most work was to make them."""
    block, core = tl.block_type, tl.core
    make, known = block.__init__, dict[tuple[Any, ...], Any]()
    shapes: dict[str, tuple[Any, Any]] = {}

    def once(kind: Any, element: Any, shape: Any) -> Any:
        key = element.name, *[getattr(size, "value", size) for size in shape]
        if key not in known:
            made = object.__new__(kind)
            make(made, element, shape)
            known[key] = made
        return known[key]

    def tensor(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        if kind.name not in shapes:
            sizes = [core.constexpr(size) for size in (kind.shape if kind.is_block() else ())]
            shapes[kind.name] = core.tuple(sizes), core.constexpr(math.prod(size.value for size in sizes))
        self.shape, self.numel = shapes[kind.name]

    block.__new__, block.__init__ = staticmethod(once), lambda *_: None
    core.tensor.__init__ = tensor
    for kind in (core.dtype, core.pointer_type, block):
        kind.__eq__ = _same_object_first(kind.__eq__)


def _same_object_first(equal: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda one, other: one is other or equal(one, other)


def _know_operands(semantic: Any, tl: Any) -> None:
    """Operands of one type are ready as they are, and a constant is the same one everywhere."""
    make_ready, make_constant = semantic.binary_op_type_checking_impl, semantic.scalar_constant
    constants: dict[tuple[Any, ...], Any] = {}

    def ready(self: Any, left: Any, right: Any, *asked: bool) -> Any:
        tensors = isinstance(left, tl.tensor) and isinstance(right, tl.tensor)
        # Pointers have rules of their own, and a quotient of half precision another type.
        if tensors and left.type is right.type and not left.dtype.is_ptr() and not asked[3:]:
            return left, right
        return make_ready(self, left, right, *asked)

    def constant(self: Any, value: Any, dtype: Any) -> Any:
        key = type(value), value, dtype.name
        if key not in constants:
            constants[key] = make_constant(self, value, dtype)
        return constants[key]

    semantic.binary_op_type_checking_impl, semantic.scalar_constant = ready, constant
    semantic.broadcast_impl_value = _known_widths(semantic.broadcast_impl_value, tl.tensor)


def _known_widths(broadcast: Callable[..., Any], tensor: Any) -> Callable[..., Any]:
    """What two types become beside each other is found out once."""
    wider: dict[tuple[str, str], list[Any]] = {}

    def known(self: Any, *pair: Any) -> Any:
        left, right = pair
        key = left.type.name, right.type.name
        if key not in wider:
            found = broadcast(self, left, right)
            wider[key] = [None if after is before else after.type for before, after in zip(pair, found, strict=True)]
        return [one if kind is None else spread(one, kind) for one, kind in zip(pair, wider[key], strict=True)]

    def spread(value: Any, kind: Any) -> Any:
        handle, sizes = value.handle, kind.shape.values
        # A scalar is written out, for atomic operations read memory as it lies; what was a block is a view.
        data = np.broadcast_to(handle.data, sizes) if value.type.is_block() else np.full(sizes, handle.data)
        return tensor(type(handle)(data, handle.dtype.scalar), kind)

    return known


def _patch_directly(semantic: Any) -> Callable[..., None]:
    """A patched name calls what the builtin wraps, with nothing between."""

    def patch(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)

        def patched(*args: Any, **options: Any) -> Any:
            options["_semantic"] = semantic
            return function(*args, **options)

        scope.set_attr(owner, name, patched)

    return patch


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
