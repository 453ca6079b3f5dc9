"""A job that goes on with another number of shards: only where its layers are changes, and a window that does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from layerwise.errors import ConfigError
from layerwise.job import parse_job
from layerwise.messages import Assignment, Role
from layerwise.profile import LayerProfile, Profile
from layerwise.server.job_record import JobRecord, JobState
from layerwise.server.preparation import prepare, prepared_before
from layerwise.server.resharding import with_shards
from layerwise.settings import ResolvedSettings
from tests.unit.played_cluster import PlayedCluster, profile, spec


def record(measured: Profile | None = None, **changes: Any) -> JobRecord:
    """A job of two shards that was stopped."""
    text = spec(**changes)
    measured = measured or profile()
    prepared = prepare(parse_job(text), measured)
    return JobRecord(
        job="toy-1",
        number=1,
        name="toy",
        state=JobState.CANCELLED,
        spec_json=parse_job(text).to_json(),
        directory="/runs/toy",
        created=0.0,
        settings_json=prepared.settings.to_json(),
        profile_json=measured.to_json(),
        blocks=prepared.blocks,
    )


def settings(found: JobRecord) -> ResolvedSettings:
    return ResolvedSettings.from_json(found.settings_json)


def sharing(*layers: LayerProfile) -> Profile:
    return replace(profile(), layers=layers)


@pytest.mark.parametrize(("shards", "blocks"), [(1, ((0, 4),)), (4, ((0, 1), (1, 2), (2, 3), (3, 4)))])
def test_layers_are_spread_anew_and_the_plan_stays(shards: int, blocks: tuple[tuple[int, int], ...]) -> None:
    before = record(**{"async": {"window": 2, "accumulation": 4}})
    found, notes = with_shards(before, shards)
    assert found.blocks == blocks
    assert notes[0].startswith(f"{shards} shards instead of 2, with layers ")
    assert replace(settings(found), warnings=()) == replace(settings(before), warnings=())
    assert parse_job(found.spec_json) == parse_job(before.spec_json).with_shards(shards)
    again = prepared_before(found)
    assert again is not None
    assert again.blocks == blocks


def test_the_number_that_it_has_changes_nothing() -> None:
    before = record()
    assert with_shards(before, 2) == (before, [])


def test_a_window_that_we_chose_stays_while_it_fits_and_is_chosen_anew_when_not() -> None:
    before = record()
    assert settings(before).window == 2
    found, notes = with_shards(before, 1)
    assert settings(found).window == 2
    assert len(notes) == 1
    found, notes = with_shards(before, 4)
    assert settings(found).window == 4
    assert "async.window: 4 from here on instead of 2, which was chosen for 2 shards" in notes
    assert settings(found).plan == settings(before).plan
    assert settings(found).delay_policy == settings(before).delay_policy
    # What the user left open stays open for the next time.
    assert parse_job(found.spec_json).asynchrony.window == "auto"
    found, notes = with_shards(found, 1)
    assert settings(found).window == 1


def test_the_delay_policy_stays_even_where_a_new_window_would_have_led_to_another() -> None:
    """The audit compares every life's learning rates with one policy."""
    before = record(**{"async": {"accumulation": 1}}, cluster={"shards": 1})
    assert settings(before).delay_policy == "constant"
    found, _ = with_shards(before, 4)
    assert settings(found).expected_staleness > 1
    assert settings(found).delay_policy == "constant"


def test_a_window_of_the_users_stays_with_a_warning_where_it_only_adds_staleness() -> None:
    before = record(**{"async": {"window": 4, "accumulation": 4}})
    found, notes = with_shards(before, 1)
    assert settings(found).window == 4
    assert any("is more than twice the 1 shards" in note for note in notes)
    assert any("is more than twice the 1 shards" in warning for warning in found.warnings)


def test_a_job_that_was_never_measured_only_asks_for_other_shards() -> None:
    before = replace(record(), settings_json="", profile_json="", blocks=())
    found, notes = with_shards(before, 3)
    assert notes == []
    assert parse_job(found.spec_json).cluster.shards == 3
    assert found.blocks == ()


def test_too_many_shards_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.shards is 5, but the model has only 4 layers"):
        with_shards(record(), 5)


def test_a_parameter_that_layers_share_keeps_them_in_one_block() -> None:
    layers = profile().layers
    tied = [replace(layers[0], shares_with=(2,)), layers[1], replace(layers[2], shares_with=(0,)), layers[3]]
    before = record(sharing(*tied))
    assert before.blocks == ((0, 3), (3, 4))
    with pytest.raises(ConfigError, match="layers 0, 2 share parameters and must stay in one block"):
        with_shards(before, 3)
    assert with_shards(before, 1)[0].blocks == ((0, 4),)


def test_detached_workers_must_be_enough_for_the_new_blocks() -> None:
    before = record(cluster={"shards": 2, "backward": {"attached": False, "detached": 2}})
    with pytest.raises(ConfigError, match=r"cluster\.backward\.detached: got 2, expected at least 3"):
        with_shards(before, 3)


def test_the_coordinator_resumes_on_as_many_shards_as_are_asked_for() -> None:
    played = PlayedCluster()
    played.add(Role.SHARD, "shard-0", "shard-1", "shard-2")
    played.add(Role.FORWARD, "forward-0")
    played.hold = lambda worker, lease: len(played.leases) >= 17
    job = played.submit(spec(**{"async": {"accumulation": 4}}))
    played.cancel(job)
    played.hold = lambda worker, lease: False
    played.play_held()
    assert played.state(job) == "cancelled"
    with pytest.raises(ConfigError, match="has only 4 layers"):
        played.role.resume(job, played.now, shards=9)
    assert played.state(job) == "cancelled"
    played.sent.clear()
    _, effects = played.role.resume(job, played.now, shards=3)
    played.perform(effects)
    assigned = [message for peer, message in played.sent if isinstance(message, Assignment) and peer == "shard-2"]
    assert len(assigned) == 1
    assert [(one.start, one.stop) for one in assigned[0].route] == [(0, 1), (1, 2), (2, 4)]
    assert json.loads(assigned[0].spec_json)["cluster"]["shards"] == 3
    assert played.role.record(job).blocks == ((0, 1), (1, 2), (2, 4))
    messages = [event.message for event in played.role.events(job, 0)]
    assert any(
        "resumed from the cut" in line and "; 3 shards instead of 2, with layers 0-0, 1-1, 2-3" in line
        for line in messages
    )
