"""What stands between the interpreter and a GPU: the compiler is asked about every launch."""

from __future__ import annotations

import pytest
import torch

from tests.reference.compiler import Compiler, launch

pytest.importorskip("triton", reason="kernels need triton")


def test_what_the_compiler_refuses_is_told_and_what_it_takes_is_not() -> None:
    from tests.reference.kernels import plain, type_in_a_tuple

    compiler, x = Compiler(), torch.zeros(8, dtype=torch.int64)
    compiler.check(launch(plain.fn, (x, 8), {"BLOCK": 8, "num_warps": 1}))
    with pytest.raises(AssertionError, match="type_in_a_tuple does not compile"):
        compiler.check(launch(type_in_a_tuple.fn, (x, 8), {"BLOCK": 8}))


def test_sizes_make_no_other_kind_and_flags_do() -> None:
    from tests.reference.kernels import plain

    x = torch.zeros(8)
    asked = [launch(plain.fn, (x, n), {"BLOCK": block}) for n, block in ((8, 8), (80, 16), (8, True), (8, 0))]
    kinds, sorts = [each.kind() for each in asked], [each.sort() for each in asked]
    assert kinds[0] == kinds[1] and len(set(kinds)) == 3
    assert sorts[0] == sorts[1] == sorts[3] != sorts[2]
    half = launch(plain.fn, (x.half(), 8), {"BLOCK": 8})
    assert kinds[0] != half.kind() and sorts[0] != half.sort()
