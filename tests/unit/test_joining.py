"""Workers that join a job beyond the places that it asks for: they help while they are there, and nobody misses them."""

from __future__ import annotations

from typing import Any

import pytest

from layerwise.errors import NotAllowedError
from layerwise.messages import (
    Assignment,
    Dismissal,
    DismissalReason,
    Failure,
    Lease,
    LeaseKind,
    LeaseReturn,
    Message,
    Reroute,
    Role,
    Unassign,
    Workers,
)
from layerwise.roles import Send
from tests.unit.played_cluster import PlayedCluster, spec

PATIENT = {"heartbeat": 10_000.0, "lease": 5_000.0, "task": 5_000.0}
DETACHED = {"shards": 2, "forward": 1, "backward": {"attached": True, "detached": 1}}


def hold_training(worker: str, lease: Lease) -> bool:
    return lease.kind is LeaseKind.TRAIN


def cluster(*, backward: int = 0, shards: int = 2) -> PlayedCluster:
    """As many processes as a job needs; its microbatches are leased and held back."""
    played = PlayedCluster()
    played.add(Role.SHARD, *(f"shard-{index}" for index in range(shards)))
    played.add(Role.FORWARD, "forward-0")
    played.add(Role.BACKWARD, *(f"backward-{index}" for index in range(backward)))
    played.hold = hold_training
    return played


def go_on(played: PlayedCluster) -> None:
    played.hold = lambda worker, lease: False
    played.play_held()


def sent(played: PlayedCluster, kind: type[Message]) -> list[tuple[str, Any]]:
    return [(peer, message) for peer, message in played.sent if isinstance(message, kind)]


def log(played: PlayedCluster, job: str) -> list[str]:
    return [event.message for event in played.role.events(job, 0)]


def works_for(played: PlayedCluster, name: str) -> str | None:
    return next((one["job"] for one in played.role.nodes(played.now) if one["name"] == name), None)


def check_done(played: PlayedCluster, job: str) -> None:
    document = played.role.job(job)
    assert (document["state"], document["ledger"]["samples_applied"]) == ("done", 80), document["message"]


@pytest.mark.parametrize("join", ["", "toy-1"])
def test_any_number_of_forward_workers_joins_a_running_job_and_gets_leases(join: str) -> None:
    played = cluster()
    job = played.submit(spec(timeouts=PATIENT))
    guests = [f"forward-guest-{index}" for index in range(3)]
    played.add(Role.FORWARD, *guests, join=join)
    assert {works_for(played, name) for name in guests} == {job}
    assert played.role.job(job)["joined_workers"] == guests
    assert [one["join"] for one in played.role.nodes(played.now) if one["name"] == guests[0]] == [join]
    assert {worker for worker, _ in played.held} == {"forward-0", *guests}
    assert sent(played, Workers)[-1] == ("shard-0", Workers(job=job, names=("forward-0", *guests)))
    go_on(played)
    check_done(played, job)


def test_an_extra_worker_that_does_not_join_stays_free() -> None:
    played = cluster()
    played.submit()
    played.add(Role.FORWARD, "forward-1")
    assert works_for(played, "forward-1") is None


def test_a_worker_that_joined_leaves_in_mid_job_and_what_it_held_goes_to_others() -> None:
    played = cluster()
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN and worker == "forward-guest"
    played.silent.add("forward-0")
    job = played.submit(spec(timeouts=PATIENT | {"start": 10.0}))
    played.add(Role.FORWARD, "forward-guest", join="")
    played.silent.discard("forward-0")
    played.wake("forward-0")
    assert played.held
    played.kill("forward-guest")
    assert played.role.job(job)["joined_workers"] == []
    assert any(line.startswith("forward worker forward-guest, which had joined, left") for line in log(played, job))
    assert {event.level for event in played.role.events(job, 0)} == {"info"}
    check_done(played, job)


def test_a_place_of_the_job_is_not_filled_by_who_joins_but_training_does_not_starve() -> None:
    played = cluster()
    job = played.submit(spec(timeouts=PATIENT | {"start": 10.0}))
    played.add(Role.FORWARD, "forward-guest", join="")
    played.kill("forward-0")
    for _ in range(3):
        played.wait(8.0)
    assert played.state(job) == "running"
    assert "no forward worker" not in played.role.job(job)["message"]
    played.add(Role.FORWARD, "forward-1")
    assert works_for(played, "forward-1") == job
    assert "forward worker forward-1 takes a free place" in log(played, job)
    go_on(played)
    check_done(played, job)


def test_the_job_is_not_begun_by_workers_that_join_alone_and_says_so() -> None:
    played = PlayedCluster()
    played.add(Role.SHARD, "shard-0", "shard-1")
    played.add(Role.FORWARD, "forward-guest", join="")
    job = played.submit()
    document = played.role.job(job)
    assert document["state"] == "queued"
    assert document["waiting_for"] == (
        "needs 1 forward worker; 0 of 0 are free; 1 more was started with --join, and no job counts on those"
    )
    played.add(Role.FORWARD, "forward-0")
    check_done(played, job)


def test_training_does_not_wait_for_a_worker_that_joins_to_get_ready() -> None:
    played = cluster()
    played.silent.add("forward-guest")
    played.add(Role.FORWARD, "forward-guest", join="")
    go_on(played)
    job = played.submit()
    assert sent(played, Assignment)[-1][0] == "forward-guest"
    check_done(played, job)


def test_a_worker_without_a_job_named_goes_from_the_oldest_job_to_the_next() -> None:
    played = cluster(shards=4)
    played.add(Role.FORWARD, "forward-1")
    first, second = played.submit(spec(timeouts=PATIENT)), played.submit(spec(timeouts=PATIENT))
    played.add(Role.FORWARD, "forward-guest", join="")
    assert works_for(played, "forward-guest") == first
    played.cancel(first)
    go_on(played)
    assert played.state(first) == "cancelled"
    assert works_for(played, "forward-guest") == second or played.state(second) == "done"
    assert "forward worker forward-guest joins" in log(played, second)


@pytest.mark.parametrize(
    ("join", "role", "reason", "words"),
    [
        ("toy-9", Role.FORWARD, DismissalReason.NOT_FOUND, "no job 'toy-9' to join here; the newest are: toy-1"),
        ("toy-1", Role.BACKWARD, DismissalReason.NOT_ALLOWED, "can't join job toy-1: it takes no detached backward"),
    ],
)
def test_who_can_not_join_is_told_why_and_is_gone(join: str, role: Role, reason: DismissalReason, words: str) -> None:
    played = cluster()
    job = played.submit()
    played.add(role, "guest", join=join)
    ((peer, dismissal),) = sent(played, Dismissal)
    assert (peer, dismissal.reason) == ("guest", reason)
    assert words in dismissal.message
    assert "guest" not in {one["name"] for one in played.role.nodes(played.now)}
    go_on(played)
    check_done(played, job)


def test_a_worker_that_lacks_an_import_of_the_job_is_told_which() -> None:
    played = PlayedCluster()
    played.hold = hold_training
    played.add(Role.SHARD, "shard-0", "shard-1", imports=("mine",))
    played.add(Role.FORWARD, "forward-0", imports=("mine",))
    played.submit(spec(data={"import": "mine:data", "batch": 8, "name": None}, model={"import": "mine:model"}))
    played.add(Role.FORWARD, "forward-guest", join="toy-1")
    assert "start it with --allow-import mine" in sent(played, Dismissal)[0][1].message


def test_a_worker_that_named_its_job_waits_for_a_resume_and_ends_with_the_job() -> None:
    played = cluster()
    job = played.submit(spec(timeouts=PATIENT))
    played.add(Role.FORWARD, "forward-guest", join=job)
    played.say("shard-1", Failure(job=job, message="the disk burns"))
    assert played.state(job) == "failed"
    assert works_for(played, "forward-guest") is None
    played.held.clear()
    played.hold = lambda worker, lease: False
    played.resume(job)
    check_done(played, job)
    assert {worker for worker, _ in played.leases} == {"forward-0", "forward-guest"}
    ((peer, dismissal),) = sent(played, Dismissal)
    assert (peer, dismissal.reason) == ("forward-guest", DismissalReason.OVER)
    assert dismissal.message == "job toy-1 is done, so nothing is left to join"


def test_detached_workers_that_join_serve_the_blocks_with_the_fewest_workers() -> None:
    played = cluster(backward=1)
    job = played.submit(spec(cluster=DETACHED, timeouts=PATIENT))
    played.add(Role.BACKWARD, "guest-0", "guest-1", "guest-2", join=job)
    blocks = {peer: one.block for peer, one in sent(played, Assignment) if peer.startswith("guest")}
    assert blocks == {"guest-0": 1, "guest-1": 0, "guest-2": 1}
    played.kill("guest-1")
    played.add(Role.BACKWARD, "guest-3", join=job)
    assert sent(played, Assignment)[-1][1].block == 0
    go_on(played)
    check_done(played, job)


def test_who_joined_gets_the_new_route_when_a_shard_is_replaced() -> None:
    played = cluster(backward=1)
    job = played.submit(spec(cluster=DETACHED, timeouts=PATIENT))
    played.add(Role.FORWARD, "forward-guest", join="")
    played.add(Role.BACKWARD, "backward-guest", join="")
    played.kill("shard-1")
    played.add(Role.SHARD, "shard-1")
    assert {peer for peer, _ in sent(played, Reroute)} >= {"forward-guest", "backward-guest"}
    go_on(played)
    check_done(played, job)


def test_who_joined_is_found_again_by_a_coordinator_that_was_started_again() -> None:
    played = cluster(backward=1)
    job = played.submit(spec(cluster=DETACHED, timeouts=PATIENT))
    played.add(Role.FORWARD, "forward-guest", join="")
    played.add(Role.BACKWARD, "backward-guest", join=job)
    played.restart_coordinator()
    played.sent.clear()
    played.come_back("forward-guest", "shard-0", "shard-1", "backward-0", "backward-guest", "forward-0")
    assert "forward-guest" not in {peer for peer, _ in sent(played, Unassign)}
    assert works_for(played, "forward-guest") == works_for(played, "backward-guest") == job
    assert set(played.role.job(job)["joined_workers"]) == {"forward-guest", "backward-guest"}
    go_on(played)
    check_done(played, job)


def test_a_drain_lets_who_joined_go_at_once_without_stopping_the_job() -> None:
    played = cluster()
    job = played.submit(spec(timeouts=PATIENT))
    played.add(Role.FORWARD, "forward-guest", join="")
    _, effects = played.role.drain("forward-guest", played.now)
    assert Send("forward-guest", Unassign(job=job)) in effects
    played.perform(effects)
    played.run()
    assert works_for(played, "forward-guest") is None
    assert "forward worker forward-guest, which had joined, left (forward-guest is drained)" in log(played, job)
    assert not any("stopping at the next update" in line for line in log(played, job))
    with pytest.raises(NotAllowedError, match="1 forward worker of job toy-1 is there, and 0 others are free"):
        played.role.drain("forward-0", played.now)
    _, effects = played.role.undrain("forward-guest", played.now)
    played.perform(effects)
    played.run()
    assert works_for(played, "forward-guest") == job
    go_on(played)
    check_done(played, job)


@pytest.mark.parametrize("loads", [False, True])
def test_a_worker_that_joined_without_the_data_is_sent_away_and_the_job_goes_on(loads: bool) -> None:
    played = cluster()
    job = played.submit(spec(timeouts=PATIENT))
    played.add(Role.FORWARD, "forward-guest", join=job)
    if loads:
        attempt = next(lease.attempts[0] for worker, lease in played.held if worker == "forward-guest")
        played.say("forward-guest", LeaseReturn(job=job, attempt=attempt, reason="load-failed: train.bin is not here"))
    else:
        played.say("forward-guest", Failure(job=job, message="train.bin is not here"))
    ((_, dismissal),) = sent(played, Dismissal)
    assert dismissal.reason is DismissalReason.NOT_ALLOWED
    assert dismissal.message == "forward-guest can't take part in job toy-1: train.bin is not here"
    played.say("forward-guest", Failure(job=job, message="train.bin is still not here"))
    played.kill("forward-guest")
    go_on(played)
    check_done(played, job)


def test_a_job_in_position_order_says_that_one_more_worker_does_not_make_it_faster() -> None:
    played = cluster()
    job = played.submit(spec(timeouts=PATIENT, **{"async": {"window": 1}}))
    played.add(Role.FORWARD, "forward-guest", join="")
    assert works_for(played, "forward-guest") == job
    assert log(played, job)[-1] == (
        "forward worker forward-guest joins; microbatches of this job go in position order, which it does not make faster"
    )
