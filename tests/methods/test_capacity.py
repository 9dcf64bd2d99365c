from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from methods.common.capacity import capacity


@given(needed=st.integers(1, 1 << 20), held=st.integers(0, 1 << 22))
def test_it_is_enough_and_never_far_too_much(needed: int, held: int) -> None:
    got = capacity(needed, held)
    assert needed <= got <= 4 * needed
    assert got == held or got <= 1.25 * needed + 1


@given(needed=st.integers(1, 1 << 20))
def test_what_was_rounded_up_once_stays(needed: int) -> None:
    assert capacity(capacity(needed, 0), 0) == capacity(needed, 0) == capacity(needed, capacity(needed, 0))


def test_an_octave_has_four_sizes() -> None:
    assert {capacity(needed, 0) for needed in range(1025, 2049)} == {1280, 1536, 1792, 2048}
    assert [capacity(needed, 0) for needed in range(1, 10)] == [1, 2, 3, 4, 5, 6, 7, 8, 10]
