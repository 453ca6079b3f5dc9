from __future__ import annotations

from layerwise.worker.lease_room import LEASE_SECONDS, MAX_AHEAD, LeaseRoom


def room(*, ordered: bool = False) -> LeaseRoom:
    made = LeaseRoom(prefetch=2)
    made.open(3, ordered=ordered)
    return made


def close(made: LeaseRoom, rate: int) -> None:
    """A second in which ``rate`` microbatches close, after one with which the counting begins."""
    for one in range(rate + 1):
        made.count(1.0 + one / rate)


def test_there_is_no_room_before_the_data_are_there() -> None:
    made = LeaseRoom(prefetch=2)
    assert (made.capacity, made.size) == (0, 0)
    made.open(3, ordered=False)
    assert (made.capacity, made.size) == (5, 5)


def test_the_room_grows_by_some_seconds_of_training_but_not_what_may_be_loaded() -> None:
    made = room()
    close(made, rate=8)
    assert made.size == 5 + 8 * LEASE_SECONDS
    assert made.capacity == 5


def test_nothing_is_leased_ahead_where_microbatches_are_admitted_in_order() -> None:
    made = room(ordered=True)
    close(made, rate=8)
    assert made.size == 5


def test_however_fast_training_is_the_room_has_an_end() -> None:
    made = room()
    close(made, rate=4096)
    assert made.size == 5 + MAX_AHEAD
