from __future__ import annotations

import pytest

from layerwise.schedules import WARMUP_START, learning_rate_factor
from layerwise.sections import Constant, Cosine, ScheduleSpec, Step


@pytest.mark.parametrize("schedule", [Constant(warmup=0.2), Cosine(warmup=0.2), Step(warmup=0.2)])
def test_warm_up_rises_to_one_from_above_zero(schedule: ScheduleSpec) -> None:
    rising = [learning_rate_factor(schedule, done, 100) for done in range(21)]
    assert rising[0] == WARMUP_START
    assert rising == sorted(rising)
    assert rising[-1] == 1.0


def test_constant_stays_at_one() -> None:
    assert {learning_rate_factor(Constant(), done, 10) for done in range(12)} == {1.0}


def test_cosine_falls_to_its_final_value_and_stays_there() -> None:
    schedule = Cosine(warmup=0.0, final=0.1)
    falling = [learning_rate_factor(schedule, done, 100) for done in range(101)]
    assert falling[0] == 1.0
    assert falling == sorted(falling, reverse=True)
    assert falling[50] == pytest.approx(0.55)
    assert falling[-1] == pytest.approx(0.1)
    assert learning_rate_factor(schedule, 150, 100) == falling[-1]


def test_step_falls_at_each_milestone() -> None:
    schedule = Step(milestones=(0.5, 0.75), gamma=0.1)
    assert [learning_rate_factor(schedule, done, 100) for done in (0, 49, 50, 75, 99)] == pytest.approx(
        [1, 1, 0.1, 0.01, 0.01]
    )


@pytest.mark.parametrize(("done", "total"), [(-1, 10), (0, 0)])
def test_a_point_outside_any_run_is_a_bug_and_said(done: int, total: int) -> None:
    with pytest.raises(ValueError):
        learning_rate_factor(Constant(), done, total)
