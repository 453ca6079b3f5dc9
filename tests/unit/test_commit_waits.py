"""Cuts that all blocks have saved before the first shard has told what closed by then."""

from __future__ import annotations

from typing import Any

from layerwise.ids import Attempt, first_attempt
from layerwise.messages import AttemptClosed, AttemptsClosed, CommitCut, Lease, LeaseKind, LeaseRequest, Outcome, Role
from layerwise.server.training import NOT_FINITE
from tests.unit.played_cluster import PlayedCluster, spec


def trained(played: PlayedCluster, microbatches: int, **changes: Any) -> str:
    """A job on two shards that stands still once so many microbatches have closed."""

    def hold(worker: str, lease: Lease) -> bool:
        return lease.kind is LeaseKind.TRAIN and len(played.leases) >= microbatches

    played.add(Role.SHARD, "shard-0", "shard-1")
    played.add(Role.FORWARD, "forward-0")
    played.hold = hold
    job = played.submit(spec(**changes))
    assert len(played.jobs[job].done) == microbatches
    played.sent.clear()
    return job


def take_in(played: PlayedCluster, job: str, count: int, outcome: Outcome, reason: str = "") -> AttemptsClosed:
    """All blocks take in the next ``count`` microbatches; gives what the first shard will tell of them."""
    known = played.jobs[job]
    dropped = outcome is Outcome.DROPPED
    closed = []
    for index in range(len(known.done), len(known.done) + count):
        attempt = Attempt(known.plan.microbatch(index), first_attempt(known.assignment.generation))
        known.number += 1
        known.done.add(index, dropped=dropped)
        known.held.add(index, dropped=dropped)
        for place in known.route:
            played.apply(place.shard, attempt, dropped=dropped)
        loss = None if dropped else 1.0
        closed.append(AttemptClosed(attempt=attempt, number=known.number, outcome=outcome, loss=loss, reason=reason))
    played.run()
    return AttemptsClosed(job=job, closed=tuple(closed), active_seconds=1000.0)


def commits(played: PlayedCluster) -> list[tuple[int, tuple[int, ...]]]:
    return [(message.version, message.keep) for _, message in played.sent if isinstance(message, CommitCut)]


def durable(played: PlayedCluster, job: str) -> list[int]:
    return [cut.version for cut in played.role.record(job).cuts]


def test_what_is_told_with_a_divergence_commits_nothing_over_the_cut_to_go_back_to() -> None:
    """The losses after the one that tripped the guard move the pin on, and the commit would have deleted what it let go."""
    played = PlayedCluster()
    train = {"steps": 200, "on_divergence": "rollback", "on_bad_sample": "drop", "max_dropped": 1.0}
    job = trained(played, 160, train=train, checkpoint={"every": 2, "keep": 1})
    before = durable(played, job)
    told = take_in(played, job, 24, Outcome.DROPPED, NOT_FINITE)
    played.say("shard-0", told)
    (rollback,) = played.role.job(job)["rollbacks"]
    assert rollback["version"] > 0
    assert rollback["version"] in before
    assert rollback["version"] in durable(played, job)


def test_what_is_told_once_a_new_route_is_chosen_commits_nothing() -> None:
    """The commit would have forgotten the cut that a block is restored from, for one of a life that is over."""
    played = PlayedCluster()
    job = trained(played, 23, checkpoint={"every": 2, "keep": 2})
    told = take_in(played, job, 1, Outcome.APPLIED)
    assert durable(played, job) == [2, 4]
    played.damaged.add(4)
    played.silent.add("shard-0")  # a pass goes on: it does not rest yet
    played.kill("shard-1")
    played.add(Role.SHARD, "shard-1")
    played.say("shard-0", told)
    assert commits(played) == []
    assert durable(played, job) == [2]
    played.wake("shard-0")
    assert played.state(job) == "running"


def test_a_run_in_which_only_a_commit_waits_is_given_up_as_soon_as_any_other() -> None:
    """Nothing is being written, so that nobody has to be patient with a disk."""
    played = PlayedCluster()
    timeouts = {"lease": 20, "task": 10, "start": 10_000, "heartbeat": 10_000}
    job = trained(played, 23, checkpoint={"every": 2, "keep": 2}, timeouts=timeouts)
    take_in(played, job, 1, Outcome.APPLIED)
    begun = played.now
    while played.state(job) == "running":
        played.report("shard-0", "shard-1")
        played.say("forward-0", LeaseRequest(job=job, count=3))
        played.wait(1.0)
    assert "nothing has moved" in played.role.job(job)["message"]
    assert played.now - begun < 2 * (20 + 4 * 10)
