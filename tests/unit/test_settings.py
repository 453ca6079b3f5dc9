from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import ConfigError, MalformedMessageError
from layerwise.job import ResolvedSettings, parse_job, resolve


def settings(num_blocks: int = 2, samples: int = 1000, hop: float | None = None, **sections: Any) -> ResolvedSettings:
    batch = sections.pop("batch", 32)
    job = {"name": "x", "model": "mlp", "data": {"name": "digits", "batch": batch}, **sections}
    return resolve(parse_job(job), samples, num_blocks, hop)


def test_the_defaults_fill_the_pipe_and_update_every_second_window() -> None:
    found = settings(num_blocks=4)
    assert (found.window, found.accumulation, found.expected_staleness) == (4, 8, 1)
    assert (found.backward_weights, found.delay_policy, found.warnings) == ("latest", "constant", ())
    assert found.max_staleness == found.plan.max_staleness(4)


@pytest.mark.parametrize(
    ("batch", "num_blocks", "accumulation"),
    [(32, 2, 4), (32, 3, 8), (30, 4, 10), (6, 4, 6), (6, 2, 6), (3, 2, 3), (2, 4, 2), (7, 2, 7)],
)
def test_accumulation_is_the_smallest_divisor_of_two_windows_else_of_one_else_the_batch(
    batch: int, num_blocks: int, accumulation: int
) -> None:
    assert settings(num_blocks=num_blocks, batch=batch).accumulation == accumulation


@pytest.mark.parametrize(("hop", "window"), [(None, 4), (0.0, 4), (0.04, 4), (0.05, 6), (0.5, 7), (5.0, 8), (100.0, 8)])
def test_slow_hops_need_a_longer_window_up_to_twice_the_shards(hop: float | None, window: int) -> None:
    assert settings(num_blocks=4, hop=hop).window == window


def test_one_shard_has_no_staleness() -> None:
    found = settings(num_blocks=1)
    assert (found.window, found.expected_staleness, found.max_staleness) == (1, 0, 0)


def test_steps_and_epochs_follow_from_each_other() -> None:
    assert (settings().steps, settings().epochs) == (32, 1)
    found = settings(train={"epochs": 3})
    assert (found.steps, found.epochs, found.plan.total_samples) == (96, 3, 3000)
    found = settings(train={"steps": 33})
    assert (found.steps, found.epochs, found.plan.total_samples) == (33, 2, 1032)


def test_synchronous_mode_is_never_stale_and_its_window_stays_within_an_update() -> None:
    found = settings(num_blocks=2, mode="synchronous")
    assert (found.window, found.accumulation, found.max_staleness, found.expected_staleness) == (4, 4, 0, 0)
    found = settings(num_blocks=4, mode="synchronous", batch=4)
    assert (found.window, found.accumulation) == (4, 4)
    found = settings(num_blocks=4, mode="synchronous", **{"async": {"accumulation": 2}})
    assert (found.window, found.accumulation) == (2, 2)
    assert settings(num_blocks=8, mode="synchronous", train={"optimizer": "sgd"}).warnings == ()


def test_both_modes_accumulate_alike() -> None:
    """So that runs in one mode and the other differ in nothing but the staleness."""
    for num_blocks in (1, 2, 3, 4, 8):
        both = [settings(num_blocks=num_blocks, mode=mode) for mode in ("asynchronous", "synchronous")]
        assert both[0].plan == both[1].plan


@given(st.integers(1, 8), st.integers(0, 6), st.sampled_from([1, 2, 4, 8, 16, 32]), st.integers(32, 200))
def test_an_automatic_window_keeps_the_staleness_promised(
    num_blocks: int, limit: int, accumulation: int, samples: int
) -> None:
    found = settings(
        num_blocks=num_blocks, samples=samples, **{"async": {"max_staleness": limit, "accumulation": accumulation}}
    )
    assert found.max_staleness <= limit
    assert 1 <= found.window <= num_blocks
    if found.window < num_blocks:
        assert found.plan.max_staleness(found.window + 1) > limit


def test_a_window_beyond_the_staleness_promised_is_refused_with_the_largest_one() -> None:
    options = {"window": 20, "accumulation": 4, "max_staleness": 2}
    with pytest.raises(ConfigError, match=r"async\.window: got 20, expected at most (\d+): ") as caught:
        settings(samples=3200, **{"async": options})
    largest = int(str(caught.value).split("at most ")[1].split(":")[0])
    assert settings(samples=3200, **{"async": {**options, "window": largest}}).window == largest


def test_detached_backward_workers_recompute() -> None:
    cluster = {"backward": {"attached": False, "detached": 2}}
    assert settings(cluster=cluster).backward_weights == "recompute"
    assert settings(cluster=cluster, mode="synchronous").backward_weights == "recompute"


@pytest.mark.parametrize(("num_blocks", "policy"), [(1, "constant"), (2, "constant"), (3, "inverse")])
def test_the_step_shrinks_with_the_delay_only_beyond_one_update(num_blocks: int, policy: str) -> None:
    assert settings(num_blocks=num_blocks, **{"async": {"accumulation": 1}}).delay_policy == policy
    assert settings(num_blocks=num_blocks, **{"async": {"delay_policy": "constant"}}).delay_policy == "constant"


def test_what_trains_badly_when_stale_is_warned_of() -> None:
    (sgd,) = settings(num_blocks=4, train={"optimizer": "sgd"}, **{"async": {"accumulation": 1}}).warnings
    assert "sgd with a staleness of 3 updates" in sgd
    assert "at least 3" in sgd
    (nu,) = settings(num_blocks=4, **{"async": {"accumulation": 2}}).warnings
    assert "train.optimizer.nu: 0.7 with async.accumulation 2 below the window of 4" in nu
    (window,) = settings(num_blocks=2, **{"async": {"window": 5, "accumulation": 8}}).warnings
    assert "async.window: 5 is more than twice the 2 shards" in window
    careful = {"optimizer": {"name": "muon", "nu": 0.4}}
    assert settings(num_blocks=4, train=careful, **{"async": {"accumulation": 2}}).warnings == ()


def test_data_that_does_not_fill_a_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.batch: got 32, expected at most the number of training samples, 31"):
        settings(samples=31)
    with pytest.raises(ConfigError, match="no training samples are left"):
        settings(samples=0)


def test_settings_survive_json() -> None:
    found = settings(num_blocks=3, train={"optimizer": "sgd"}, **{"async": {"accumulation": 1}})
    assert found.warnings
    assert ResolvedSettings.from_json(found.to_json()) == found
    with pytest.raises(MalformedMessageError):
        ResolvedSettings.from_json("{}")


def test_cuts_come_ten_times_a_run_where_the_job_does_not_say() -> None:
    def intervals(steps: int, **sections: Any) -> tuple[int, ...]:
        train = {"steps": steps, **sections.pop("train", {})}
        return settings(train=train, **sections).cut_intervals

    assert intervals(200) == (20,)
    assert intervals(5) == (1,)
    assert intervals(10**6) == (1000,)
    assert intervals(200, checkpoint={"every": None}) == ()
    assert intervals(200, train={"evaluate_every": 30}, checkpoint={"every": 50}) == (30, 50)


@pytest.mark.parametrize(
    ("checkpoint", "steps", "every"),
    [
        ({}, 1000, 0),
        ({"standby": True}, 1000, 10),
        ({"standby": True, "every": 500}, 1000, 50),
        ({"standby": True, "every": None}, 3000, 300),
        ({"standby": True, "standby_every": 7}, 1000, 7),
        ({"standby_every": 7}, 1000, 0),
    ],
)
def test_standby_copies_are_ten_between_two_cuts_and_ten_updates_apart_at_least(
    checkpoint: dict[str, Any], steps: int, every: int
) -> None:
    found = settings(train={"steps": steps}, cluster={"shards": 2}, checkpoint=checkpoint)
    assert found.standby_every == every
    assert ResolvedSettings.from_json(found.to_json()) == found
    assert not any("standby" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    "sections", [{"mode": "synchronous"}, {"async": {"window": 1}}], ids=["synchronous", "window 1"]
)
def test_what_equals_plain_training_has_no_standby_copies_and_says_so(sections: dict[str, Any]) -> None:
    found = settings(cluster={"shards": 2}, checkpoint={"standby": True}, **sections)
    assert found.standby_every == 0
    assert any(warning.startswith("checkpoint.standby: without effect") for warning in found.warnings)


def test_standby_copies_as_far_apart_as_cuts_are_warned_of() -> None:
    found = settings(cluster={"shards": 2}, checkpoint={"standby": True, "every": 5, "standby_every": 5})
    assert found.standby_every == 5
    assert any(
        warning.startswith("checkpoint.standby_every: 5 is no less than the 5 updates") for warning in found.warnings
    )
