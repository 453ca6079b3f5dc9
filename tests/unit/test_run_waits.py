"""What a run waits for ends, whatever becomes of those that are waited for."""

from __future__ import annotations

import json

import pytest

from layerwise.applied import AppliedSet
from layerwise.ids import Attempt, Microbatch
from layerwise.messages import (
    Assignment,
    BlockReport,
    CutTaken,
    DroppedAttempt,
    Lease,
    LeaseKind,
    Message,
    Ready,
    ReleaseCut,
    Role,
    Unassign,
)
from layerwise.server.recovery import MOST_RECOVERIES
from tests.unit.played_cluster import PlayedCluster, spec
from tests.unit.test_run_recovery import PATIENT, check_done, cluster, go_on, log, run_until, sent


def short_of_room(job: str) -> BlockReport:
    return BlockReport(
        job=job,
        block=1,
        layers=(),
        open_attempts=0,
        store_bytes=0,
        forward_queue=0,
        backward_queue=0,
        compute_seconds=0.0,
        log_bytes=0,
        shortage="no room for the event log in /data: free some",
    )


def test_a_job_whose_disk_is_full_can_be_cancelled() -> None:
    played = cluster()
    job = run_until(played, 12)
    played.cancel(job)
    for _ in range(4):
        assert played.state(job) == "stopping"
        played.say("shard-1", short_of_room(job))
        played.wait(19.0)
    assert played.state(job) == "cancelled"
    assert "did not drain within 60 s" in played.role.job(job)["message"]
    assert {node["state"] for node in played.role.nodes(played.now)} == {"free"}


@pytest.mark.parametrize("restart", ["before", "after"])
def test_a_job_that_is_cancelled_while_a_restarted_coordinator_waits_for_a_shard_is_cancelled(restart: str) -> None:
    played = cluster()
    job = run_until(played, 21)
    if restart == "after":
        played.silent.add("shard-0")
        played.cancel(job)
    played.kill("shard-1")
    played.restart_coordinator()
    played.silent.clear()
    played.come_back("shard-0", "forward-0")
    if restart == "before":
        played.cancel(job)
    for _ in range(4):
        assert played.state(job) == "stopping"
        played.wait(19.0)
    assert played.state(job) == "cancelled"
    assert "the cut at version 4 stands" in played.role.job(job)["message"]


def test_what_was_evaluated_is_remembered_before_the_copies_that_it_took_are_let_go() -> None:
    """Else the next coordinator would have a version evaluated that no shard can evaluate any more."""
    played = cluster()
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN and len(played.leases) >= 20
    job = played.submit(spec(train={"evaluate_every": 4}, timeouts=PATIENT))
    assert ReleaseCut(job=job, version=4) in [one for _, one in sent(played, ReleaseCut)]
    played.restart_coordinator()
    played.sent.clear()
    played.come_back("shard-0", "shard-1", "forward-0")
    assert [one["version"] for one in played.role.job(job)["evaluations"]] == [4]
    assert all(one.kind is LeaseKind.TRAIN for _, one in sent(played, Lease))
    go_on(played)
    check_done(played, job)
    assert [one["version"] for one in played.role.job(job)["evaluations"]] == [4, 8, 10]


def test_a_shard_that_dies_again_and_again_of_its_block_ends_the_job_before_it_has_trained() -> None:
    played = cluster()
    played.silent.add("shard-1")
    job = played.submit(spec(timeouts=PATIENT))
    for _ in range(MOST_RECOVERIES):
        played.kill("shard-1")
        played.add(Role.SHARD, "shard-1")
        played.wait(1.0)
        assert played.state(job) == "preparing"
    played.kill("shard-1")
    assert played.state(job) == "failed"
    assert f"block 1 lost its shard {MOST_RECOVERIES + 1} times before training began" in log(played, job)[-1]


def test_a_shard_that_dies_again_and_again_of_the_measurement_ends_the_job() -> None:
    played = PlayedCluster()
    played.silent.add("shard-0")
    played.add(Role.SHARD, "shard-0", "shard-1")
    played.add(Role.FORWARD, "forward-0")
    job = played.submit(spec(timeouts=PATIENT))
    for _ in range(MOST_RECOVERIES + 1):
        assert played.state(job) == "preparing"
        played.kill("shard-0")
        played.add(Role.SHARD, "shard-0")
        played.wait(1.0)
    assert played.state(job) == "failed"


def test_many_shards_lost_at_once_before_training_begins_are_all_replaced() -> None:
    played = cluster(shards=4)
    played.silent.add("forward-0")
    job = played.submit(spec(cluster={"shards": 4}, timeouts=PATIENT))
    for _ in range(2):
        names = [f"shard-{index}" for index in range(4)]
        for name in names:
            played.kill(name)
        played.add(Role.SHARD, *names)
    played.wake("forward-0")
    check_done(played, job)


def test_a_worker_of_an_earlier_run_of_the_job_is_told_everything_anew() -> None:
    """It knows another route, over fewer blocks, and would never be ready for this one."""
    played = cluster(forward=2)
    job = run_until(played, 12, cluster={"forward": 2})
    hosting = played.hosting("forward-1")
    played.kill("forward-1")  # cut off, it does not hear that the job is cancelled
    played.cancel(job)
    go_on(played)
    assert played.state(job) == "cancelled"
    played.add(Role.SHARD, "shard-2")
    played.add(Role.FORWARD, "forward-2")
    played.hold = lambda worker, lease: True
    _, effects = played.role.resume(job, played.now, shards=3)
    played.perform(effects)
    played.run()
    played.kill("forward-2")
    played.sent.clear()
    played.workers["forward-1"] = hosting[0]
    played.roles["forward-1"] = Role.FORWARD
    played.come_back("forward-1")
    to_it = [type(message) for name, message in played.sent if name == "forward-1"]
    assert (Unassign in to_it, Assignment in to_it) == (True, True)
    played.hold = lambda worker, lease: False
    played.play_held()
    check_done(played, job)


NOTHING = json.dumps(AppliedSet().to_json())
DROPPED = DroppedAttempt(attempt=Attempt(Microbatch(0, 1, 2)), reason="it can't be loaded")


@pytest.mark.parametrize(
    "nonsense",
    [
        Ready(job="toy-1", block=1, generation=1, applied_json=(NOTHING, NOTHING), version=0, drops=(DROPPED,)),
        CutTaken(job="toy-1", block=0, version=4),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_makes_no_sense_fails_its_job_only_also_when_it_is_looked_at_later(nonsense: Message) -> None:
    played = cluster(forward=2)
    played.silent.add("forward-1")
    job = played.submit(spec(cluster={"forward": 2}, timeouts=PATIENT))
    assert job == "toy-1"
    played.say("shard-1", nonsense)
    assert played.state(job) == "preparing"
    played.kill("forward-1")
    played.wait(1.0)
    assert played.state(job) == "failed"
    assert "training can't begin" in played.role.job(job)["message"]
