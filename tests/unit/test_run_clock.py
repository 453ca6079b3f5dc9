from __future__ import annotations

from layerwise.server.run_clock import RunClock, StallWatch


def test_a_pause_counts_once_training_has_gone_on_after_it() -> None:
    clock = RunClock()
    clock.reach(4.0)
    clock.pause(3.0)
    assert clock.seconds == 4.0
    clock.reach(9.0)
    assert clock.seconds == 6.0


def test_a_report_of_an_older_close_takes_no_time_back() -> None:
    clock = RunClock()
    clock.reach(4.0)
    clock.reach(2.0)
    assert clock.seconds == 4.0


def test_the_time_without_a_first_shard_counts() -> None:
    clock = RunClock()
    clock.reach(4.0)
    clock.begin_anew(2.5)
    assert clock.seconds == 6.5
    clock.reach(1.0)
    assert clock.seconds == 7.5


def test_a_silence_is_warned_of_once_and_ends_with_anything_that_moves() -> None:
    watch = StallWatch(lease=10.0, task=5.0, now=0.0)
    assert not watch.is_to_warn(10.0)
    assert watch.is_to_warn(11.0)
    assert not watch.is_to_warn(12.0)
    watch.moved(12.0)
    assert not watch.is_to_warn(22.0)
    assert watch.is_to_warn(23.0)


def test_a_run_may_be_silent_for_longer_while_it_writes_cuts() -> None:
    watch = StallWatch(lease=10.0, task=5.0, now=0.0)
    assert not watch.has_stalled(30.0, saving=False)
    assert watch.has_stalled(31.0, saving=False)
    assert not watch.has_stalled(90.0, saving=True)
    assert watch.has_stalled(91.0, saving=True)


def test_what_waits_for_room_or_could_not_be_heard_is_no_silence() -> None:
    watch = StallWatch(lease=10.0, task=5.0, now=0.0)
    watch.wait_for_room(20.0)
    assert watch.silence(25.0) == 5.0
    watch.excuse(3.0, 25.0)
    assert watch.silence(25.0) == 2.0
    watch.excuse(100.0, 26.0)
    assert watch.silence(26.0) == 0.0
    assert watch.moved_at == 26.0
