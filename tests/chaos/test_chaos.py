"""Real processes are killed and paused, frames disturbed and disks full in the middle of a job: it ends as if nothing had been, and can prove it.

Plans are drawn as the command draws them. Each run counts only if every planned fault has happened; none is repeated
when it fails.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from layerwise.chaos.faults import ProcessFault, ProcessFaultKind
from layerwise.chaos.plan import ChaosPlan, JobShape, Scenario, draw_plan, replaced_after
from layerwise.chaos.report import ChaosReport
from layerwise.chaos.run import ChaosRun
from layerwise.cluster import LocalCluster
from layerwise.faults import FrameFaultKind
from tests.chaos.conftest import ACCURACY, HEARTBEAT_SECONDS, Run, small_job

ONE_FORWARD = {"shards": 2, "forward": 1}


def check(report: ChaosReport) -> None:
    """All faults happened, the job is done, every promise holds, and it has learned what it should."""
    stacks = "" if report.hang is None else "\n".join(f"{name}:\n{text}" for name, text in report.hang.stacks.items())
    assert report.passed, "\n".join([*report.failures, stacks, json.dumps(report.plan.to_json())])
    assert report.document["validation"]["accuracy"] > ACCURACY


def together(shape: JobShape, *scenarios: Scenario) -> ChaosPlan:
    """The faults of several scenarios in one run."""
    plans = [draw_plan(scenario, 1, shape) for scenario in scenarios]
    return ChaosPlan(
        scenario=Scenario.MIXED,
        seed=1,
        process_faults=tuple(fault for plan in plans for fault in plan.process_faults),
        frame_faults=tuple(fault for plan in plans for fault in plan.frame_faults),
    )


def test_killed_workers_and_coordinators_cost_no_sample(under: Run) -> None:
    """Two of each: both forward workers, one backward worker twice, the coordinator twice."""
    report = under(
        lambda shape: together(shape, Scenario.KILL_FORWARD, Scenario.KILL_BACKWARD, Scenario.KILL_COORDINATOR)
    )
    check(report)
    killed = Counter(outcome.process.partition("-")[0] for outcome in report.faults)
    assert killed == {"forward": 2, "backward": 2, "coordinator": 2}


@pytest.mark.parametrize("scenario", [Scenario.KILL_SHARD, Scenario.KILL_ALL])
def test_killed_shards_cost_no_sample(under: Run, scenario: Scenario) -> None:
    check(under(lambda shape: draw_plan(scenario, 1, shape)))


def test_processes_that_are_paused_replaced_and_go_on_cost_no_sample(alone: Run) -> None:
    """One of each role. Where the pause is long, a spare has the place before the process goes on, and it has to leave."""
    report = alone(lambda shape: draw_plan(Scenario.PAUSE, 26, shape), updates=240)
    check(report)
    long = replaced_after(HEARTBEAT_SECONDS)
    planned = {fault.target.partition(":")[0]: fault.seconds > long for fault in report.plan.process_faults}
    assert planned == {"shard": True, "forward": True, "backward": True, "coordinator": False}
    replaced = {one.process.partition("-")[0]: one.replaced for one in report.faults}
    assert replaced == {"shard": True, "forward": True, "backward": True, "coordinator": None}
    (shard,) = (one for one in report.faults if one.process.startswith("shard"))
    owners = [block["shard"] for block in report.document["blocks"]]
    assert sorted(owners) == sorted({"shard-0", "shard-1", "shard-2"} - {shard.process})
    # The block has a new life, in the spare; the process before it had to leave, and has done nothing more in its own.
    assert report.log_facts is not None
    (rewind,) = report.log_facts.rewinds
    assert report.document["blocks"][owners.index("shard-2")]["life"] == rewind.life > 1
    assert shard.version is not None
    assert rewind.from_version <= shard.version + 1


def test_a_job_that_stops_moving_fails_with_the_stacks_of_all_processes(cluster: LocalCluster, tmp_path: Path) -> None:
    """A pause without end, in mid-training. The job says so after 2 s, which is no movement, and would give itself up after 6."""
    fault = ProcessFault(kind=ProcessFaultKind.PAUSE, target="shard:0", at_version=10, seconds=3600.0)
    plan = ChaosPlan(scenario=Scenario.PAUSE, seed=0, process_faults=(fault,))
    job = small_job(tmp_path / "run", timeouts={"heartbeat": 60.0, "lease": 2.0, "task": 1.0})
    report = ChaosRun(cluster, job, plan, watchdog_seconds=3.0).run()
    assert report.hang is not None
    assert any(re.match(r"nothing moved for \d+ s \(training\)", sentence) for sentence in report.failures)
    assert report.hang.stacks.keys() == set(cluster.names)
    for text in report.hang.stacks.values():
        assert "Thread 0x" in text


def test_frames_that_are_late_repeated_overtaken_or_lost_cost_no_sample(alone: Run) -> None:
    scenarios = (Scenario.DELAY, Scenario.DUPLICATE, Scenario.REORDER, Scenario.DROP)
    report = alone(lambda shape: together(shape, *scenarios), cluster=ONE_FORWARD)
    check(report)
    assert {outcome.kind for outcome in report.faults} == {str(kind) for kind in FrameFaultKind}


def test_a_disk_that_is_full_for_a_while_costs_cuts_and_nothing_else(alone: Run) -> None:
    check(alone(lambda shape: draw_plan(Scenario.DISK_FULL, 1, shape), cluster=ONE_FORWARD))
