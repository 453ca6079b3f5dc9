from __future__ import annotations

from layerwise.server.recovery import LEAST_SECONDS, MOST_RECOVERIES, Recovery


def test_a_recovery_says_how_far_layers_went_back_and_how_long_it_took() -> None:
    recovery = Recovery()
    recovery.lose(1, "shard-1", 7, 100.0)
    [(line, fields)] = recovery.end({1: 4}, 24, 103.5)
    assert line == "block 1 goes back 3 updates, from version 7 to 4; 24 samples are leased again"
    assert fields == {"block": 1, "shard": "shard-1", "cut": 4, "rewind": 3, "samples": 24, "seconds": 3.5}
    assert recovery.made == [{"time": 100.0, **fields}]


def test_one_update_is_one_update_and_a_block_never_goes_forward() -> None:
    recovery = Recovery()
    recovery.lose(0, "a", 5, 0.0)
    recovery.lose(1, "b", 3, 0.0)
    lines = [line for line, _ in recovery.end({0: 4, 1: 4}, 8, 1.0)]
    assert lines == [
        "block 0 goes back 1 update, from version 5 to 4; 8 samples are leased again",
        "block 1 goes back 0 updates, from version 4 to 4; 8 samples are leased again",
    ]


def test_a_block_lost_twice_before_training_goes_on_is_one_recovery_from_the_first_loss_on() -> None:
    recovery = Recovery()
    recovery.lose(2, "a", 9, 10.0)
    recovery.lose(2, "b", 4, 12.0)
    recovery.end({2: 4}, 40, 15.0)
    assert recovery.made == [
        {"time": 10.0, "block": 2, "shard": "a", "cut": 4, "rewind": 5, "samples": 40, "seconds": 5.0}
    ]


def test_blocks_that_were_restored_without_being_lost_are_no_recovery() -> None:
    recovery = Recovery()
    recovery.lose(1, "b", 6, 0.0)
    assert len(recovery.end({0: 4, 1: 4, 2: 4}, 8, 1.0)) == 1
    assert [one["block"] for one in recovery.made] == [1]


def test_a_shard_that_came_back_with_its_layers_is_no_recovery_and_is_not_remembered_as_lost() -> None:
    recovery = Recovery()
    recovery.lose(1, "b", 6, 0.0)
    assert recovery.end({}, 0, 1.0) == []
    assert recovery.end({1: 4}, 0, 2.0) == []
    assert recovery.made == []


def begin(recovery: Recovery, version: int) -> int:
    recovery.begin(version, 0.0)
    return recovery.in_a_row.times


def test_recoveries_that_get_no_further_are_counted_in_a_row() -> None:
    """Updates that are made again from a cut once counted as getting on."""
    recovery = Recovery()
    assert [begin(recovery, version) for version in (60, 50, 58, 60)] == [1, 2, 3, 4]
    assert [begin(recovery, version) for version in (61, 50)] == [1, 2]


def test_after_a_rollback_what_was_reached_before_counts_no_more() -> None:
    recovery = Recovery()
    begin(recovery, 60)
    recovery.go_back(20)
    assert [begin(recovery, 60) for _ in range(2)] == [1, 2], "training has not begun at the cut yet"
    recovery.end({0: 20}, 0, 1.0)
    assert [begin(recovery, version) for version in (24, 24, 25)] == [1, 2, 1]


def test_what_happens_all_at_once_is_not_given_up() -> None:
    """A coordinator that was held up hears of many losses in one moment, and most of them are over."""
    recovery = Recovery()
    recovery.begin(7, 0.0)
    for _ in range(10 * MOST_RECOVERIES):
        recovery.begin(7, 100.0)
        assert not recovery.in_a_row.goes_on
    recovery.begin(7, 100.0 + LEAST_SECONDS)
    assert not recovery.in_a_row.goes_on
    recovery.begin(7, 101.0 + LEAST_SECONDS)
    assert recovery.in_a_row.goes_on
    recovery.begin(8, 200.0)
    assert not recovery.in_a_row.goes_on
