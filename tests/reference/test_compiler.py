"""What stands between the interpreter and a GPU: the compiler is asked about every launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.reference.compiler import Compiler, launch

triton = pytest.importorskip("triton", reason="kernels need triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def _plain(x, n, BLOCK: tl.constexpr) -> Any:
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def _type_in_a_tuple(x, n, BLOCK: tl.constexpr) -> Any:
    at, pointer = tl.arange(0, BLOCK), tl.pointer_type(tl.int64)  # the interpreter takes it
    tl.store(x.to(pointer) + at, 0, mask=at < n)


def test_what_the_compiler_refuses_is_told_and_what_it_takes_is_not() -> None:
    compiler, x = Compiler(), torch.zeros(8, dtype=torch.int64)
    compiler.check(launch(_plain.fn, (x, 8), {"BLOCK": 8, "num_warps": 1}))
    with pytest.raises(AssertionError, match="_type_in_a_tuple does not compile"):
        compiler.check(launch(_type_in_a_tuple.fn, (x, 8), {"BLOCK": 8}))


def test_sizes_make_no_other_kind_and_flags_do() -> None:
    x = torch.zeros(8)
    kinds = [launch(_plain.fn, (x, n), {"BLOCK": block}).kind() for n, block in ((8, 8), (80, 16), (8, True), (8, 0))]
    assert kinds[0] == kinds[1] and len(set(kinds)) == 3
    assert launch(_plain.fn, (x, 8), {"BLOCK": 8}).kind() != launch(_plain.fn, (x.half(), 8), {"BLOCK": 8}).kind()
