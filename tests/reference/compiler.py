"""Every launch that is interpreted is compiled for a GPU as well, whether or not there is one.

The interpreter runs kernels as Python, and lets through what the compiler refuses. Compiling needs another process: in
this one the functions that kernels call are interpreted, and the language is patched.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

CAPABILITY = 90
"""Of the GPU that is compiled for: Hopper."""


class Launch(NamedTuple):
    """What a kernel is compiled from; tensors are given as their dtypes."""

    module: str
    name: str
    args: Sequence[Any]
    options: Mapping[str, Any]

    def kind(self) -> tuple[Any, ...]:
        """Launches of one kind differ in sizes alone, which change no line of the code."""
        return self._kind(lambda size: min(abs(size), 2))

    def sort(self) -> tuple[Any, ...]:
        """Launches of one sort have the same dtypes and flags, whatever is 1 or more than that."""
        return self._kind(lambda _: int)

    def _kind(self, of_size: Callable[[int], Any]) -> tuple[Any, ...]:
        def of(value: Any) -> Any:
            if isinstance(value, int) and not isinstance(value, bool):
                return of_size(value)
            return float if isinstance(value, float) else value

        named = [*enumerate(self.args), *sorted(self.options.items(), key=lambda item: item[0])]
        return self.module, self.name, tuple((name, of(value)) for name, value in named)


def launch(function: Any, args: Sequence[Any], options: Mapping[str, Any]) -> Launch:
    """Of a kernel, by its Python function."""
    kinds = {name: _described(value) for name, value in options.items()}
    return Launch(function.__module__, function.__name__, [_described(arg) for arg in args], kinds)


def _described(value: Any) -> Any:
    return value.dtype if isinstance(value, Tensor) else value


class Compiler:
    """A process that compiles; it ends with this one."""

    def __init__(self) -> None:
        root = Path(__file__).resolve().parents[2]
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], cwd=root, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._known: set[tuple[Any, ...]] = set()

    def check(self, asked: Launch) -> None:
        """Raises `AssertionError` where the compiler refuses the kernel; of launches of one kind it sees the first."""
        if (kind := asked.kind()) in self._known:
            return
        assert self._process.stdin is not None and self._process.stdout is not None
        pickle.dump(asked, self._process.stdin)
        self._process.stdin.flush()
        fault = pickle.load(self._process.stdout)
        assert not fault, f"{asked.module}.{asked.name} does not compile: {fault}"
        self._known.add(kind)


@cache
def compiler() -> Compiler:
    """One for all tests."""
    return Compiler()


class _Driver:
    """What Triton asks a GPU's driver when it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)


def _fault(asked: Launch) -> str:
    """What the compiler says against a launch, or nothing."""
    kernel = getattr(import_module(asked.module), asked.name)
    try:
        kernel.warmup(*asked.args, grid=(1,), **{name: _mocked(value) for name, value in asked.options.items()})
    except Exception as error:  # of many kinds, by stage
        return f"{type(error).__name__}: {error}"
    return ""


def _mocked(value: Any) -> Any:
    from triton.runtime.jit import MockTensor

    return MockTensor(value) if isinstance(value, torch.dtype) else value


class _Depth:
    """How far kernels are compiled: the first launch of a sort down to machine code, others to the layouts of blocks.

    What comes behind those is most of the work, and goes by dtypes and flags, not by sizes.
    """

    def __init__(self) -> None:
        self._sorts: set[tuple[Any, ...]] = set()
        self._whole = True

    def next(self, asked: Launch) -> None:
        """A launch is to be compiled."""
        self._whole = asked.sort() not in self._sorts
        self._sorts.add(asked.sort())

    def stages(self, *pipeline: Any) -> tuple[str, str] | None:
        """Triton's `add_stages_inspection_hook`: without arguments, what sets its cache apart; else changes stages."""
        if not pipeline:
            depth = "whole" if self._whole else "layouts"
            return depth, depth
        if not self._whole:
            pipeline[1].update(llir=_nothing, ptx=_nothing, cubin=_nothing)
        return None


def _nothing(_: Any, metadata: dict[str, Any]) -> bytes:
    metadata.update(name="", shared=0)
    return b""


def _serve(asked: BinaryIO, told: BinaryIO) -> None:
    from triton import knobs
    from triton.runtime import driver

    driver.set_active(_Driver())
    depth = _Depth()
    knobs.runtime.add_stages_inspection_hook = depth.stages
    while True:
        try:
            question = pickle.load(asked)
        except EOFError:
            return
        depth.next(question)
        pickle.dump(_fault(question), told)
        told.flush()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed goes elsewhere
    _serve(sys.stdin.buffer, answers)
