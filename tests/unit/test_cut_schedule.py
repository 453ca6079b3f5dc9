from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.server.cut_schedule import CutSchedule


def test_cuts_are_at_multiples_and_at_the_end() -> None:
    schedule = CutSchedule(final=11, intervals=(4, 5))
    assert schedule.following(0, 10) == (4, 5, 8, 10, 11)
    assert schedule.following(5, 2) == (8, 10)
    assert schedule.following(11, 3) == ()


def test_without_intervals_there_is_one_cut_at_the_end() -> None:
    assert CutSchedule(final=7).following(0, 3) == (7,)


def test_a_stop_moves_the_end_forward_but_never_back() -> None:
    schedule = CutSchedule(final=10, intervals=(4,))
    schedule.stop_at(6)
    schedule.stop_at(9)
    assert schedule.following(0, 5) == (4, 6)


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 update"):
        CutSchedule(final=3, intervals=(0,))


@given(st.integers(1, 40), st.sets(st.integers(1, 12), max_size=3), st.integers(0, 45))
def test_the_next_cut_is_the_lowest_member_above(final: int, intervals: set[int], version: int) -> None:
    schedule = CutSchedule(final=final, intervals=intervals)
    above = [one for one in range(version + 1, final + 1) if one in schedule]
    assert schedule.next_after(version) == (above[0] if above else None)
