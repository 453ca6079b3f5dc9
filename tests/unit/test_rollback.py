"""How training goes on after it was rolled back."""

from __future__ import annotations

from typing import Any

from layerwise.messages import Course
from layerwise.server.rollback import MOST_ROLLBACKS, course_after, roll_back


def after(before: list[dict[str, Any]], version: int, reached: int) -> dict[str, Any]:
    found = roll_back(before, version=version, reached=reached, num_updates=1000, why="it rose", now=7.0)
    return found.to_json()


def test_a_job_that_was_never_rolled_back_trains_as_its_file_says() -> None:
    assert course_after([]) == Course(version=-1, rate_factor=1.0, synchronous_until=0)


def test_the_first_halves_the_rate_and_is_synchronous_for_twice_the_way_back() -> None:
    first = after([], 100, 180)
    assert course_after([first]) == Course(version=100, rate_factor=0.5, synchronous_until=260)
    assert after([], 100, 101)["synchronous_until"] == 150  # and for a while at least
    assert after([], 900, 990)["synchronous_until"] == 1000
    assert (first["why"], first["time"]) == ("it rose", 7.0)


def test_the_last_one_stays_synchronous() -> None:
    first = after([], 100, 180)
    second = after([first], 120, 200)
    assert MOST_ROLLBACKS == 2
    assert course_after([first, second]) == Course(version=120, rate_factor=0.25, synchronous_until=1000)
