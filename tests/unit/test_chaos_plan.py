"""Plans of chaos runs: repeatable, within what a job is sure to reach, and about what their scenario says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.chaos.chaos_cluster import cluster_for
from layerwise.chaos.faults import ProcessFault, ProcessFaultKind, process_named
from layerwise.chaos.plan import LATEST, ChaosPlan, JobShape, Scenario, draw_plan, replaced_after
from layerwise.cli.chaos import SCENARIOS
from layerwise.errors import ConfigError
from layerwise.fault_points import parse_faults
from layerwise.faults import FrameFaultKind
from layerwise.job import parse_job

SHAPE = JobShape(
    num_updates=40,
    num_microbatches=160,
    num_cuts=8,
    window=3,
    shards=2,
    forward=2,
    detached=2,
    timeout_seconds=3.0,
)
FRAME_SCENARIOS = (Scenario.DELAY, Scenario.DUPLICATE, Scenario.REORDER, Scenario.DROP)

seeds = st.integers(0, 10_000)
shapes = st.builds(
    JobShape,
    num_updates=st.integers(10, 500),
    num_microbatches=st.integers(500, 5000),
    num_cuts=st.integers(3, 20),
    window=st.integers(1, 12),
    shards=st.integers(1, 6),
    forward=st.integers(1, 4),
    detached=st.integers(1, 4),
    timeout_seconds=st.floats(0.5, 60.0),
)


@given(st.sampled_from(Scenario), seeds, shapes)
def test_a_plan_is_the_same_each_time_and_lies_within_the_job(scenario: Scenario, seed: int, shape: JobShape) -> None:
    plan = draw_plan(scenario, seed, shape)
    assert plan == draw_plan(scenario, seed, shape)
    assert plan.num_faults >= 1
    assert json.loads(json.dumps(plan.to_json()))["seed"] == seed
    versions = [fault.at_version for fault in plan.process_faults]
    assert versions == sorted(versions)
    assert all(0 < version <= LATEST * shape.num_updates for version in versions)
    assert all(fault.target == "all" or fault.target in shape.targets for fault in plan.process_faults)
    for frame in plan.frame_faults:
        assert 1 <= frame.frame <= max(5, LATEST * shape.num_microbatches / shape.window)
        assert frame.receiver != frame.sender
    for disk in parse_faults(",".join(plan.disk_faults)):
        assert disk.last is not None
        assert disk.last < shape.num_cuts


def test_the_command_offers_every_scenario() -> None:
    assert list(SCENARIOS) == [str(scenario) for scenario in Scenario]


@pytest.mark.parametrize("role", ["shard", "forward", "backward", "coordinator"])
def test_a_kill_scenario_kills_its_role_only(role: str) -> None:
    for seed in range(20):
        plan = draw_plan(Scenario(f"kill-{role}"), seed, SHAPE)
        assert {fault.target.partition(":")[0] for fault in plan.process_faults} == {role}
        assert {fault.kind for fault in plan.process_faults} == {ProcessFaultKind.KILL}


def test_pauses_meet_every_role_and_some_outlast_the_time_out() -> None:
    pauses = [fault for seed in range(20) for fault in draw_plan(Scenario.PAUSE, seed, SHAPE).process_faults]
    assert {fault.target.partition(":")[0] for fault in pauses} == {"shard", "forward", "backward", "coordinator"}
    long = [fault for fault in pauses if fault.seconds > SHAPE.timeout_seconds]
    assert 0 < len(long) < len(pauses)
    assert min(fault.seconds for fault in long) > replaced_after(SHAPE.timeout_seconds)


def test_a_plan_needs_spares_where_somebody_is_replaced_while_paused() -> None:
    for seed in range(20):
        plan = draw_plan(Scenario.PAUSE, seed, SHAPE)
        long = {fault.target for fault in plan.process_faults if fault.seconds > SHAPE.timeout_seconds}
        assert plan.needs_spares(SHAPE.timeout_seconds) is bool(long - {"coordinator"})


def test_frames_suffer_before_somebody_is_replaced_for_good() -> None:
    plans = [draw_plan(Scenario.MIXED, seed, SHAPE) for seed in range(200)]
    replacing = [plan for plan in plans if plan.needs_spares(SHAPE.timeout_seconds)]
    assert 0 < len(replacing) < len(plans)
    for plan in replacing:
        part = plan.process_faults[0].at_version / SHAPE.num_updates
        frames = max(5, part * SHAPE.num_microbatches / SHAPE.window)
        assert max(fault.frame for fault in plan.frame_faults) <= frames


def test_a_cluster_has_one_more_of_each_role_where_a_plan_needs_spares(tmp_path: Path) -> None:
    job = parse_job(
        {
            "name": "small",
            "model": {"name": "mlp", "hidden": [8, 8]},
            "data": {"name": "digits", "batch": 32},
            "cluster": {"shards": 2, "backward": {"attached": True, "detached": 1}},
            "timeouts": {"heartbeat": 3.0},
        }
    )
    fault = ProcessFault(kind=ProcessFaultKind.PAUSE, target="shard:0", at_version=3, seconds=7.0)
    for faults, counts in (((), (2, 1, 1)), ((fault,), (3, 2, 2)), ((replace(fault, seconds=5.0),), (2, 1, 1))):
        plan = ChaosPlan(scenario=Scenario.PAUSE, seed=0, process_faults=faults)
        cluster, _ = cluster_for(job, plan, tmp_path)
        assert (cluster.shards, cluster.forward, cluster.backward) == counts


def test_pauses_are_short_where_the_time_out_is_long() -> None:
    shape = replace(SHAPE, timeout_seconds=60.0)
    pauses = [fault for seed in range(20) for fault in draw_plan(Scenario.PAUSE, seed, shape).process_faults]
    assert max(fault.seconds for fault in pauses) < 2.0


@pytest.mark.parametrize("scenario", FRAME_SCENARIOS)
def test_a_frame_scenario_has_its_kind_of_fault_only(scenario: Scenario) -> None:
    plan = draw_plan(scenario, 1, SHAPE)
    assert {str(fault.kind) for fault in plan.frame_faults} == {str(scenario)}
    assert not plan.process_faults


def test_frames_are_overtaken_between_shards_where_there_are_two() -> None:
    plans = [draw_plan(scenario, seed, SHAPE) for scenario in (Scenario.REORDER, Scenario.MIXED) for seed in range(20)]
    faults = [fault for plan in plans for fault in plan.frame_faults if fault.kind is FrameFaultKind.REORDER]
    assert {(fault.receiver, fault.sender) for fault in faults} == {("shard-0", "shard-1"), ("shard-1", "shard-0")}
    assert draw_plan(Scenario.REORDER, 0, replace(SHAPE, shards=1)).frame_faults


def test_mixed_plans_have_everything_in_the_end() -> None:
    plans = [draw_plan(Scenario.MIXED, seed, SHAPE) for seed in range(40)]
    hit = {fault.target.partition(":")[0] for plan in plans for fault in plan.process_faults}
    assert hit == {"shard", "forward", "backward", "coordinator"}
    assert {fault.kind for plan in plans for fault in plan.process_faults} == set(ProcessFaultKind)
    assert {fault.kind for plan in plans for fault in plan.frame_faults} == set(FrameFaultKind)


def test_seeds_differ() -> None:
    plans = {str(draw_plan(Scenario.MIXED, seed, SHAPE).to_json()["process_faults"]) for seed in range(20)}
    assert len(plans) == 20


def test_a_role_that_the_job_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.backward\.detached=2"):
        draw_plan(Scenario.KILL_BACKWARD, 0, replace(SHAPE, detached=0))


def test_a_job_too_short_is_refused() -> None:
    with pytest.raises(ConfigError, match="9 updates are too few"):
        draw_plan(Scenario.MIXED, 0, replace(SHAPE, num_updates=9))


def test_a_job_with_too_few_cuts_for_a_full_disk_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.every"):
        draw_plan(Scenario.DISK_FULL, 0, replace(SHAPE, num_cuts=2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": "shards:1"},
        {"target": "shard"},
        {"target": "forward:x"},
        {"target": "shard:0", "seconds": 1.0},
        {"target": "shard:0", "at_version": -1},
        {"target": "shard:0", "kind": ProcessFaultKind.PAUSE},
    ],
)
def test_an_impossible_fault_is_refused(wrong: dict[str, object]) -> None:
    values: dict[str, object] = {"kind": ProcessFaultKind.KILL, "at_version": 3, **wrong}
    with pytest.raises(ValueError, match="no such fault"):
        ProcessFault(**values)  # type: ignore[arg-type]


def test_places_are_looked_up_in_the_document() -> None:
    document = {"blocks": [{"shard": "b"}, {"shard": "a"}], "forward_workers": ["f"], "backward_workers": []}
    assert process_named("shard:1", document) == "a"
    assert process_named("shard:2", document) is None
    assert process_named("forward:0", document) == "f"
    assert process_named("forward:1", document) is None, "a fault of somebody who is away hits nobody else"
    assert process_named("backward:0", document) is None
    assert process_named("coordinator", {}) == "coordinator"
    assert process_named("shard:0", {}) is None


def test_an_empty_plan_has_no_faults() -> None:
    assert ChaosPlan(scenario=Scenario.MIXED, seed=0).num_faults == 0
