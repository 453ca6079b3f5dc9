"""A node is drained: its jobs stop at an update boundary and go on from a cut there with other processes."""

from __future__ import annotations

from typing import Any

import pytest

from layerwise.errors import DeadlineError, NotAllowedError, NotFoundError
from layerwise.messages import Assignment, Hello, LeaseKind, Message, Reroute, Role, StartTraining, Stop, Unassign
from layerwise.server.job_store import SqliteJobStore
from layerwise.server.membership import is_of, node_of
from tests.unit.played_cluster import PlayedCluster, spec

PATIENT = {"heartbeat": 10_000.0, "lease": 5_000.0, "task": 5_000.0}


def cluster(**nodes: dict[Role, int]) -> PlayedCluster:
    """A node's processes are called as its supervisor calls them."""
    played = PlayedCluster()
    for node, counts in nodes.items():
        for role, count in counts.items():
            played.add(role, *(f"{role}-{node}-{index}" for index in range(count)))
    return played


def two_nodes() -> PlayedCluster:
    return cluster(a={Role.SHARD: 2, Role.FORWARD: 1}, b={Role.SHARD: 2, Role.FORWARD: 1})


def run_until(played: PlayedCluster, num_microbatches: int, **changes: Any) -> str:
    """A job whose first microbatches are closed and whose others are held back."""
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN and len(played.leases) >= num_microbatches
    return played.submit(spec(timeouts=PATIENT, **changes))


def drain(played: PlayedCluster, node: str, *, undo: bool = False) -> dict[str, Any]:
    turn = played.role.undrain if undo else played.role.drain
    document, effects = turn(node, played.now)
    played.perform(effects)
    played.run()
    return document


def go_on(played: PlayedCluster) -> None:
    played.hold = lambda worker, lease: False
    played.play_held()


def sent(played: PlayedCluster, kind: type[Message]) -> list[tuple[str, Any]]:
    return [(peer, message) for peer, message in played.sent if isinstance(message, kind)]


def log(played: PlayedCluster, job: str) -> list[str]:
    return [event.message for event in played.role.events(job, 0)]


def states(played: PlayedCluster) -> dict[str, str]:
    return {one["name"]: one["state"] for one in played.role.nodes(played.now)}


def check_done(played: PlayedCluster, job: str) -> None:
    """All 80 samples are applied once, and nothing was leased twice under one name."""
    document = played.role.job(job)
    assert document["state"] == "done", document["message"]
    assert document["ledger"] == {
        "samples_leased": 80,
        "samples_applied": 80,
        "samples_dropped": 0,
        "num_dropped": 0,
        "dropped": [],
    }
    assert document["recoveries"] == []
    attempts = [attempt for _, attempt in played.leases]
    assert len(set(attempts)) == len(attempts)


def test_a_node_is_a_name_of_a_supervisor_a_host_or_a_process() -> None:
    def hello(name: str) -> Hello:
        return Hello(role=Role.SHARD, name=name, address="", device="", host="here", pid=1, version="1")

    assert [node_of(hello(name)) for name in ("shard-rack-2-10", "shard-0", "mine")] == ["rack-2", "here", "here"]
    assert all(is_of(hello("shard-rack-2-10"), node) for node in ("rack-2", "here", "shard-rack-2-10"))
    assert not any(is_of(hello("shard-rack-2-10"), node) for node in ("rack", "2", "rack-2-10", "shard-rack-2", ""))


def test_a_job_stops_at_its_next_update_and_goes_on_from_a_cut_there_with_other_processes() -> None:
    played = two_nodes()
    job = run_until(played, 21)
    assert {one["shard"] for one in played.role.job(job)["blocks"]} == {"shard-a-0", "shard-a-1"}
    played.sent.clear()
    document = drain(played, "a")
    assert (document["node"], document["drained"], document["jobs"]) == ("a", True, [job])
    assert [peer for peer, _ in sent(played, Stop)] == ["shard-a-0"]
    assert sent(played, Assignment) == []
    assert states(played) == {
        "shard-a-0": "draining",
        "shard-a-1": "draining",
        "forward-a-0": "draining",
        "shard-b-0": "reserved",
        "shard-b-1": "reserved",
        "forward-b-0": "reserved",
    }
    assert "stopping, to go on with other processes" in played.role.job(job)["message"]
    go_on(played)
    check_done(played, job)
    # 21 microbatches of four to an update were in, so the sixth update was the boundary.
    assigned = sent(played, Assignment)
    assert {(peer, one.cut) for peer, one in assigned} == {("shard-b-0", 6), ("shard-b-1", 6), ("forward-b-0", 6)}
    unassigned = [peer for peer, _ in sent(played, Unassign)]
    assert unassigned[:3] == ["shard-a-0", "shard-a-1", "forward-a-0"]
    assert {states(played)[name] for name in unassigned[:3]} == {"drained"}
    assert {states(played)[f"{one}-b-0"] for one in ("shard", "forward")} == {"free"}
    assert "training goes on at version 6" in log(played, job)
    # Each microbatch went through the blocks once.
    assert len(played.leases) == 40


def test_survivors_begin_new_lives_at_the_cut_since_their_old_ones_end_there() -> None:
    played = cluster(a={Role.SHARD: 1, Role.FORWARD: 1}, b={Role.SHARD: 1}, c={Role.SHARD: 1})
    job = run_until(played, 21)
    before = {one["shard"]: one["life"] for one in played.role.job(job)["blocks"]}
    played.sent.clear()
    drain(played, "b")
    go_on(played)
    check_done(played, job)
    after = {one["shard"]: one["life"] for one in played.role.job(job)["blocks"]}
    assert set(after) == {"shard-a-0", "shard-c-0"}
    assert set(after.values()).isdisjoint(before.values())
    assert {peer: one.cut for peer, one in sent(played, Assignment)} == {"shard-a-0": 6, "shard-c-0": 6}
    assert [peer for peer, _ in sent(played, Reroute)] == ["forward-a-0"]


def test_a_drain_that_would_leave_a_job_without_a_shard_or_worker_changes_nothing() -> None:
    played = cluster(a={Role.SHARD: 2, Role.FORWARD: 1}, b={Role.SHARD: 1, Role.FORWARD: 1})
    job = run_until(played, 21)
    played.sent.clear()
    with pytest.raises(
        NotAllowedError, match=r"a can't be drained: 2 shards of job toy-1 are there, and 1 other is free"
    ):
        played.role.drain("a", played.now)
    played.kill("forward-b-0")
    with pytest.raises(NotAllowedError, match="1 forward worker of job toy-1 is there, and 0 others are free"):
        played.role.drain("forward-a-0", played.now)
    assert played.sent == []
    assert states(played)["shard-b-0"] == "free"
    with pytest.raises(NotFoundError, match="no process is of node 'z'; the nodes are: a, b"):
        played.role.drain("z", played.now)
    with pytest.raises(NotFoundError, match="'a' is not drained; drained are: none"):
        played.role.undrain("a", played.now)
    go_on(played)
    check_done(played, job)


def test_two_jobs_are_not_promised_the_same_successor() -> None:
    played = cluster(a={Role.SHARD: 2, Role.FORWARD: 2}, b={Role.SHARD: 1, Role.FORWARD: 2})
    one = {"shards": 1, "forward": 1}
    run_until(played, 5, cluster=one)
    played.submit(spec(timeouts=PATIENT, cluster=one, checkpoint={"path": "runs/other"}))
    with pytest.raises(NotAllowedError, match="job toy-2"):
        played.role.drain("a", played.now)
    assert states(played)["shard-b-0"] == "free"


def test_a_waiting_job_gets_neither_a_drained_process_nor_one_that_is_reserved() -> None:
    played = two_nodes()
    job = run_until(played, 21)
    drain(played, "a")
    waiting = played.submit(spec(cluster={"shards": 1, "forward": 1}, checkpoint={"path": "runs/other"}))
    assert played.state(waiting) == "queued"
    assert "2 more are on drained nodes" in played.role.job(waiting)["message"]
    go_on(played)
    check_done(played, job)
    assert played.state(waiting) == "done"
    assert {one["shard"] for one in played.role.job(waiting)["blocks"]} == {"shard-b-0"}


def test_a_drained_process_that_is_started_again_gets_no_work_until_the_drain_is_undone() -> None:
    played = cluster(a={Role.SHARD: 1}, b={Role.SHARD: 1, Role.FORWARD: 1})
    drain(played, "a")
    played.kill("shard-a-0")
    played.add(Role.SHARD, "shard-a-0")
    assert states(played)["shard-a-0"] == "drained"
    job = played.submit(spec(timeouts=PATIENT))
    assert played.state(job) == "queued"
    document = drain(played, "a", undo=True)
    assert document["drained"] is False
    check_done(played, job)


def test_a_reserved_process_that_is_lost_is_replaced_by_any_that_comes() -> None:
    played = cluster(a={Role.SHARD: 2, Role.FORWARD: 1}, b={Role.SHARD: 1})
    job = run_until(played, 21)
    drain(played, "shard-a-1")
    played.kill("shard-b-0")
    go_on(played)
    assert "waiting for a shard to take the place of shard-a-1" in played.role.job(job)["message"]
    assert states(played)["shard-a-1"] == "drained"
    played.wait(30.0)
    played.add(Role.SHARD, "shard-c-0")
    check_done(played, job)


def test_undone_before_the_boundary_everybody_stays() -> None:
    played = two_nodes()
    job = run_until(played, 21)
    drain(played, "a")
    drain(played, "a", undo=True)
    go_on(played)
    check_done(played, job)
    assert {one["shard"] for one in played.role.job(job)["blocks"]} == {"shard-a-0", "shard-a-1"}
    assert set(states(played).values()) == {"free"}


def test_a_job_that_is_cancelled_while_it_moves_ends_there() -> None:
    played = two_nodes()
    job = run_until(played, 21)
    drain(played, "a")
    played.cancel(job)
    go_on(played)
    assert played.state(job) == "cancelled"
    assert played.role.job(job)["steps"] == 6
    assert set(states(played).values()) == {"drained", "free"}


def test_a_job_in_its_last_update_ends_where_it_is() -> None:
    played = two_nodes()
    job = run_until(played, 39)
    drain(played, "a")
    go_on(played)
    check_done(played, job)
    assert {one["shard"] for one in played.role.job(job)["blocks"]} == {"shard-a-0", "shard-a-1"}
    assert set(states(played).values()) == {"drained", "free"}


def test_a_job_that_does_not_train_yet_moves_as_soon_as_it_does() -> None:
    played = two_nodes()
    played.silent.add("shard-a-0")
    job = played.submit(spec(timeouts=PATIENT))
    assert played.state(job) == "preparing"
    drain(played, "a")
    played.wake("shard-a-0")
    check_done(played, job)
    assert {one["shard"] for one in played.role.job(job)["blocks"]} == {"shard-b-0", "shard-b-1"}


@pytest.mark.parametrize("name", ["shard-a-0", "shard-b-0"])
def test_a_shard_lost_on_the_way_to_the_boundary_is_recovered_first(name: str) -> None:
    played = cluster(a={Role.SHARD: 1, Role.FORWARD: 1}, b={Role.SHARD: 1}, c={Role.SHARD: 2})
    job = run_until(played, 21)
    drain(played, "shard-a-0")
    played.kill(name)
    played.add(Role.SHARD, name)
    played.wait(4.0)
    go_on(played)
    document = played.role.job(job)
    assert document["state"] == "done", document["message"]
    assert document["ledger"]["samples_applied"] == 80
    assert "shard-a-0" not in {one["shard"] for one in document["blocks"]}
    assert states(played)["shard-a-0"] == "drained"
    assert set(states(played).values()) == {"drained", "free"}


@pytest.mark.parametrize("before", ["it moves", "it has moved"])
def test_a_coordinator_started_again_remembers_what_is_drained_and_who_moves(before: str, tmp_path: Any) -> None:
    store = SqliteJobStore(tmp_path)
    played = PlayedCluster(store)
    for node in "ab":
        played.add(Role.SHARD, f"shard-{node}-0", f"shard-{node}-1")
        played.add(Role.FORWARD, f"forward-{node}-0")
    job = run_until(played, 21)
    drain(played, "a")
    everybody = tuple(played.roles)
    if before == "it has moved":
        played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN and len(played.leases) >= 23
        played.play_held()
    played.restart_coordinator()
    assert played.role.members.drained == {"a"}
    played.sent.clear()
    played.hold = lambda worker, lease: False
    played.come_back(*everybody)
    check_done(played, job)
    assert {one["shard"] for one in played.role.job(job)["blocks"]} == {"shard-b-0", "shard-b-1"}
    assert {name for name, state in states(played).items() if state == "drained"} == {
        "shard-a-0",
        "shard-a-1",
        "forward-a-0",
    }
    assert len(sent(played, StartTraining)) == (2 if before == "it moves" else 1)
    store.close()


def test_without_room_for_the_last_cut_the_layers_go_back_to_the_one_before() -> None:
    played = two_nodes()
    job = run_until(played, 21)
    played.refuse_save = lambda block, version: "No space left on device" if version == 6 else ""
    drain(played, "a")
    go_on(played)
    document = played.role.job(job)
    assert document["state"] == "done", document["message"]
    assert document["ledger"]["samples_applied"] == 80
    assert [(one["cut"], one["rewind"]) for one in document["recoveries"]] == [(4, 2), (4, 2)]
    assert {one["shard"] for one in document["blocks"]} == {"shard-b-0", "shard-b-1"}


def test_the_command_waits_until_no_process_of_the_node_works_for_a_job() -> None:
    from layerwise.cli.drain import wait_until_empty

    answers = [
        [{"name": "shard-a-0", "job": "toy-1"}, {"name": "shard-b-0", "job": None}],
        [{"name": "shard-a-0", "job": None}, {"name": "shard-b-0", "job": "toy-1"}],
    ]
    document = {"node": "a", "processes": [{"name": "shard-a-0"}]}
    slept: list[float] = []
    left = iter(answers)
    found = wait_until_empty(lambda: next(left), document, None, sleep=slept.append)
    assert found == [{"name": "shard-a-0", "job": None}]
    assert len(slept) == 1
    times = iter((0.0, 1.0, 5.0))
    with pytest.raises(DeadlineError, match="a is not empty yet, toy-1 is still there"):
        wait_until_empty(lambda: answers[0], document, 5.0, sleep=slept.append, clock=lambda: next(times))
