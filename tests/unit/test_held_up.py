"""Time that a process missed is told once, to whoever asks first."""

from __future__ import annotations

import pytest

from layerwise.server.held_up import HELD_UP_SECONDS, HeldUp

TICK = 0.25


def ticking(at: float) -> HeldUp:
    made = HeldUp(TICK)
    made.ticked(at)
    return made


def test_before_the_first_tick_nothing_was_missed() -> None:
    assert HeldUp(TICK).missed(1e9) == 0.0


@pytest.mark.parametrize("late", [-TICK, 0.0, HELD_UP_SECONDS])
def test_a_tick_that_is_hardly_late_is_no_time_missed(late: float) -> None:
    assert ticking(16.0).missed(16.0 + TICK + late) == 0.0


def test_what_was_missed_counts_from_when_the_tick_was_due_and_once() -> None:
    made = ticking(16.0)
    assert made.missed(16.0 + TICK + 30.0) == 30.0
    assert made.missed(16.0 + TICK + 30.5) == 0.0


def test_time_that_is_missed_again_before_the_tick_is_told_again() -> None:
    made = ticking(16.0)
    assert made.missed(16.0 + TICK + 30.0) == 30.0
    assert made.missed(16.0 + TICK + 35.0) == 5.0


def test_after_a_tick_the_next_one_is_waited_for() -> None:
    made = ticking(16.0)
    made.ticked(40.0)
    assert made.missed(40.0 + TICK + 1.0) == 0.0
    assert made.missed(40.0 + TICK + 2.0) == 2.0
