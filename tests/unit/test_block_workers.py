"""Who may take a block's work: those that the coordinator names, from the moment that it does."""

from __future__ import annotations

from layerwise.messages import (
    Abort,
    Closed,
    DetachedTask,
    Forward,
    Grant,
    Outcome,
    PushGradient,
    Role,
    Workers,
)
from layerwise.roles import Effect
from layerwise.server.assembly import TOGETHER_SECONDS
from tests.unit.played_cluster import PlayedCluster, spec
from tests.unit.test_shard_role import Bench, push, request, sent


def names(bench: Bench, *workers: str) -> list[Effect]:
    return bench.hears("coordinator", Workers(job="job", names=workers))


def begun() -> Bench:
    bench = Bench(0)
    names(bench, "forward-0")
    bench.start()
    return bench


def detached(*workers: str) -> Bench:
    """The middle block, whose backward passes only workers do, and one of which waits."""
    bench = Bench(1, attached=False)
    names(bench, *workers)
    bench.forward("shard-0", 0, 0)
    bench.work()
    bench.boundary(0, 0)
    return bench


def test_a_stranger_is_granted_nothing() -> None:
    bench = begun()
    assert bench.offer(0, "stranger") == []
    assert bench.role.num_refused == 1
    assert [peer for peer, _ in sent(bench.offer(0), Grant)] == ["forward-0"]


def test_an_offer_that_came_before_the_name_is_granted_with_it() -> None:
    bench = begun()
    bench.offer(0, "forward-1")
    assert [peer for peer, _ in sent(names(bench, "forward-0", "forward-1"), Grant)] == ["forward-1"]


def test_the_offer_of_a_stranger_that_is_gone_is_not_kept() -> None:
    bench = begun()
    bench.offer(0, "forward-1")
    bench.role.on_lost("forward-1", 1.0)
    assert names(bench, "forward-0", "forward-1") == []


def test_what_was_offered_before_anybody_was_named_waits() -> None:
    bench = Bench(0)
    bench.offer(0, "stranger")
    bench.offer(1, "forward-0")
    names(bench, "forward-0")
    done = bench.role.first
    assert done is not None
    bench.start()
    assert [entry.peer for entry in done.admission.open_numbers()] == ["forward-0"]


def test_a_worker_that_was_replaced_loses_what_it_had_not_sent_and_is_told() -> None:
    bench = begun()
    ((_, grant),) = sent(bench.offer(0), Grant)
    assert isinstance(grant, Grant)
    effects = names(bench, "forward-1")
    assert [peer for peer, _ in sent(effects, Abort)] == ["shard-1"]
    assert bench.forward("forward-0", 0, grant.number) == []
    bench.closed_by(1, 0, grant.number, Outcome.ABORTED)
    ((peer, closed),) = sent(bench.closed_by(2, 0, grant.number, Outcome.ABORTED), Closed)
    assert isinstance(closed, Closed)
    assert (peer, closed.outcome) == ("forward-0", Outcome.ABORTED)
    assert bench.offer(1) == []


def test_what_a_replaced_worker_had_sent_whole_goes_on() -> None:
    bench = begun()
    bench.offer(0)
    bench.forward("forward-0", 0, 0)
    assert names(bench, "forward-1") == []
    assert [peer for peer, _ in sent(bench.work(), Forward)] == ["shard-1"]


def test_the_offer_of_a_worker_that_was_given_up_too_early_waits_for_its_return() -> None:
    bench = begun()
    for index in range(4):  # the window has room for three
        bench.offer(index)
        bench.forward("forward-0", index, index)
    names(bench)
    names(bench, "forward-0")
    first = bench.role.first
    assert first is not None
    assert first.admission.waiting == ("forward-0",)


def test_a_stranger_gets_no_backward_pass() -> None:
    bench = detached("backward-0")
    for _ in range(3):
        assert bench.hears("stranger", request("stranger", 6)) == []
    assert bench.role.num_refused == 3
    assert [peer for peer, _ in sent(bench.ask("backward-0"), DetachedTask)] == ["backward-0"]


def test_the_pass_of_a_replaced_worker_is_for_the_next_at_once() -> None:
    bench = detached("backward-0", "backward-1")
    ((_, task),) = sent(bench.ask("backward-0"), DetachedTask)
    assert isinstance(task, DetachedTask)
    bench.hears("backward-1", request("backward-1", 6))
    names(bench, "backward-1")
    assert [peer for peer, _ in sent(bench.work(), DetachedTask)] == ["backward-1"]
    bench.hears("backward-0", push(task, 3))
    assert bench.work() == []
    assert isinstance(push(task, 3), PushGradient)
    assert bench.hears("backward-0", request("backward-0", 6)) == []


def test_only_the_coordinator_names_workers() -> None:
    bench = begun()
    assert bench.hears("forward-1", Workers(job="job", names=("forward-1",))) == []
    assert bench.offer(0, "forward-1") == []


def told(played: PlayedCluster) -> dict[str, tuple[str, ...]]:
    """What each shard was last told."""
    return {peer: one.names for peer, one in played.sent if isinstance(one, Workers)}


def running() -> PlayedCluster:
    played = PlayedCluster()
    played.hold = lambda worker, lease: True
    played.add(Role.SHARD, "shard-0", "shard-1")
    played.add(Role.BACKWARD, "backward-0", "backward-1")
    played.add(Role.FORWARD, "forward-0", "forward-1")
    played.submit(spec(cluster={"forward": 2, "backward": {"detached": 2}}))
    return played


def test_each_shard_is_told_of_its_own_workers() -> None:
    assert told(running()) == {
        "shard-0": ("forward-0", "forward-1", "backward-0"),
        "shard-1": ("backward-1",),
    }


def test_shards_hear_of_who_left_and_who_joined() -> None:
    played = running()
    played.kill("forward-0")
    assert told(played)["shard-0"] == ("forward-1", "backward-0")
    played.add(Role.FORWARD, "forward-2")
    assert told(played)["shard-0"] == ("forward-1", "backward-0", "forward-2")
    assert told(played)["shard-1"] == ("backward-1",)


def test_nobody_is_told_the_same_twice() -> None:
    played = running()
    played.sent.clear()
    played.wait(0.1)
    assert told(played) == {}


def test_a_shard_in_a_lost_one_s_place_is_told() -> None:
    played = running()
    played.kill("shard-0")
    played.sent.clear()
    played.add(Role.SHARD, "shard-0")
    assert told(played) == {"shard-0": ("forward-0", "forward-1", "backward-0")}


def test_a_coordinator_that_was_started_again_names_those_that_are_back() -> None:
    played = running()
    played.restart_coordinator()
    played.sent.clear()
    played.come_back("shard-0", "shard-1", "backward-0", "backward-1", "forward-0")
    played.wait(TOGETHER_SECONDS + 0.1)
    assert told(played)["shard-0"] == ("backward-0", "forward-0")
    played.come_back("forward-1")
    assert told(played)["shard-0"] == ("backward-0", "forward-0", "forward-1")
