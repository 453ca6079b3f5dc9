"""Real processes are killed, paused and cut off in the middle of a job: it ends as if nothing had been, and can prove it.

Each run counts only if every planned fault has happened; none is repeated when it fails.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from layerwise.chaos.chaos_cluster import cluster_for, shape_of
from layerwise.chaos.faults import ProcessFault, ProcessFaultKind
from layerwise.chaos.plan import ChaosPlan, Scenario, draw_plan
from layerwise.chaos.report import ChaosReport
from layerwise.chaos.run import ChaosRun
from layerwise.cluster import LocalCluster
from layerwise.faults import FrameFault, FrameFaultKind
from tests.chaos.conftest import HEARTBEAT_SECONDS, UPDATES, Run, small_job

ROLES = ("shard", "forward", "backward", "coordinator")
ACCURACY = 0.7
"""Far above guessing, below any run of the small job without faults."""


def check(report: ChaosReport) -> None:
    """All faults happened, the job is done, every promise holds, and it has learned what it should."""
    stacks = "" if report.hang is None else "\n".join(f"{name}:\n{text}" for name, text in report.hang.stacks.items())
    assert report.passed, "\n".join([*report.failures, stacks, json.dumps(report.plan.to_json())])
    assert report.document["validation"]["accuracy"] > ACCURACY


def target(role: str, rng: random.Random) -> str:
    return role if role == "coordinator" else f"{role}:{rng.randrange(2)}"


def kill(at: str, version: int, rng: random.Random) -> ProcessFault:
    return ProcessFault(kind=ProcessFaultKind.KILL, target=at, at_version=version, after=rng.uniform(0.0, 0.05))


def pause(at: str, version: int, seconds: float) -> ProcessFault:
    return ProcessFault(kind=ProcessFaultKind.PAUSE, target=at, at_version=version, seconds=seconds)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("role", ROLES)
def test_a_killed_process_costs_no_sample(under: Run, role: str, seed: int) -> None:
    rng = random.Random(f"{role} {seed}")
    check(under(kill(target(role, rng), rng.randint(3, UPDATES // 2), rng), seed=seed))


@pytest.mark.parametrize("role", ROLES)
def test_a_process_that_is_paused_and_comes_back_costs_no_sample(under: Run, role: str) -> None:
    """Once for less than any time-out, once for so long that others have taken its place."""
    place = target(role, random.Random(role))
    check(under(pause(place, 5, 0.5), pause(place, 15, 1.5 * HEARTBEAT_SECONDS), updates=2 * UPDATES))


def test_everybody_killed_at_once_loses_no_sample(under: Run) -> None:
    check(under(kill("all", UPDATES // 2, random.Random(3))))


def test_two_roles_killed_at_one_version_lose_no_sample(under: Run) -> None:
    rng = random.Random(4)
    check(under(kill("shard:1", 12, rng), kill("forward:0", 12, rng), kill("coordinator", 20, rng)))


def test_a_job_that_stops_moving_fails_with_the_stacks_of_all_processes(cluster: LocalCluster, tmp_path: Path) -> None:
    """A pause without end, in mid-training. The job says so after 2 s, which is no movement, and would give itself up after 6."""
    plan = ChaosPlan(scenario=Scenario.PAUSE, seed=0, process_faults=(pause("shard:0", 10, 3600.0),))
    job = small_job(tmp_path / "run", timeouts={"heartbeat": 60.0, "lease": 2.0, "task": 1.0})
    report = ChaosRun(cluster, job, plan, watchdog_seconds=3.0).run()
    assert report.hang is not None
    assert any(sentence.startswith("nothing moved for 3 s (training)") for sentence in report.failures)
    assert report.hang.stacks.keys() == set(cluster.names)
    for text in report.hang.stacks.values():
        assert "Thread 0x" in text


def test_frames_that_are_late_repeated_overtaken_or_lost_cost_no_sample(tmp_path: Path) -> None:
    """On a cluster of its own: what happens to frames is planned before processes start."""
    job = small_job(tmp_path / "run", cluster={"shards": 2, "forward": 1})
    shape = shape_of(job)
    faults: list[FrameFault] = []
    for scenario in (Scenario.DELAY, Scenario.DUPLICATE, Scenario.REORDER, Scenario.DROP):
        faults += draw_plan(scenario, 1, shape).frame_faults
    plan = ChaosPlan(scenario=Scenario.MIXED, seed=1, frame_faults=tuple(faults))
    running, fired = cluster_for(job, plan, tmp_path, threads=1)
    with running:
        running.wait_for_nodes()
        report = ChaosRun(running, job, plan, fired=fired).run()
    check(report)
    assert {outcome.kind for outcome in report.faults} == {str(kind) for kind in FrameFaultKind}


def test_a_disk_that_is_full_for_a_while_costs_cuts_and_nothing_else(tmp_path: Path) -> None:
    job = small_job(tmp_path / "run", cluster={"shards": 2, "forward": 1})
    plan = draw_plan(Scenario.DISK_FULL, 1, shape_of(job))
    running, fired = cluster_for(job, plan, tmp_path, threads=1)
    with running:
        running.wait_for_nodes()
        check(ChaosRun(running, job, plan, fired=fired).run())
