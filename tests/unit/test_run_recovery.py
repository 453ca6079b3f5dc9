"""A run that loses shards, links and its coordinator, and goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from layerwise.applied import AppliedSet
from layerwise.ids import ATTEMPTS_OF_GENERATION, Attempt
from layerwise.messages import (
    Assignment,
    AttemptClosed,
    AttemptsClosed,
    BlockReport,
    CutDurable,
    Failure,
    Lease,
    LeaseKind,
    LinkDown,
    Message,
    Outcome,
    Probe,
    ReleaseCut,
    Reroute,
    Role,
    StartTraining,
    Stop,
    Unassign,
)
from layerwise.server.assembly import TOGETHER_SECONDS
from layerwise.server.recovery import MOST_RECOVERIES
from layerwise.server.setbacks import LINK_SECONDS
from tests.unit.played_cluster import PlayedCluster, spec

ACCUMULATE = {"async": {"accumulation": 4}}
PATIENT = {"heartbeat": 10_000.0, "lease": 5_000.0, "task": 5_000.0}


def cluster(*, shards: int = 2, forward: int = 1) -> PlayedCluster:
    played = PlayedCluster()
    played.add(Role.SHARD, *(f"shard-{index}" for index in range(shards)))
    played.add(Role.FORWARD, *(f"forward-{index}" for index in range(forward)))
    return played


def run_until(played: PlayedCluster, num_microbatches: int, **changes: Any) -> str:
    """A job whose first microbatches are closed and whose others are held back."""
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN and len(played.leases) >= num_microbatches
    timeouts = {**PATIENT, **changes.pop("timeouts", {})}
    return played.submit(spec(timeouts=timeouts, **changes))


def go_on(played: PlayedCluster) -> None:
    """Nothing is held back any more."""
    played.hold = lambda worker, lease: False
    played.play_held()


def sent(played: PlayedCluster, kind: type[Message]) -> list[tuple[str, Any]]:
    return [(peer, message) for peer, message in played.sent if isinstance(message, kind)]


def kinds(played: PlayedCluster, peer: str) -> list[str]:
    return [type(message).__name__ for name, message in played.sent if name == peer]


def log(played: PlayedCluster, job: str) -> list[str]:
    return [event.message for event in played.role.events(job, 0)]


def lives(played: PlayedCluster, job: str) -> list[tuple[str, int]]:
    return [(one["shard"], one["life"]) for one in played.role.job(job)["blocks"]]


def check_done(played: PlayedCluster, job: str) -> None:
    """All 80 samples are applied, nothing was leased twice under one name, and everybody is free."""
    document = played.role.job(job)
    assert document["state"] == "done", document["message"]
    assert document["ledger"] == {
        "samples_leased": 80,
        "samples_applied": 80,
        "samples_dropped": 0,
        "num_dropped": 0,
        "dropped": [],
    }
    attempts = [attempt for _, attempt in played.leases]
    assert len(set(attempts)) == len(attempts)
    assert {node["state"] for node in played.role.nodes(played.now)} == {"free"}


# A lost shard ---------------------------------------------------------------------------------------------------------


def test_a_shard_started_again_under_its_name_takes_its_place_at_once_in_a_new_life_at_the_newest_cut() -> None:
    played = cluster()
    job = run_until(played, 21)
    played.kill("shard-1")
    assert played.role.job(job)["message"] == "waiting for a shard to take the place of shard-1"
    played.sent.clear()
    played.add(Role.SHARD, "shard-1")
    ((_, assignment),) = sent(played, Assignment)
    assert (assignment.block, assignment.cut, assignment.generation) == (1, 4, 3)
    assert [(one.shard, one.life) for one in assignment.route] == [("shard-0", 1), ("shard-1", 3)]
    ((_, start),) = sent(played, StartTraining)
    done, held = (AppliedSet.from_json(json.loads(text)) for text in (start.done_json, start.held_json))
    assert (done.watermark, held.watermark) == (16, 21)
    go_on(played)
    check_done(played, job)
    assert lives(played, job) == [("shard-0", 1), ("shard-1", 3)]


@pytest.mark.parametrize("lost_first", [True, False], ids=["no route yet", "a new route"])
def test_what_the_first_shard_tells_last_of_a_route_counts_though_training_rests(lost_first: bool) -> None:
    played = cluster()
    job = run_until(played, 21)
    first, second, *_ = (attempt for _, lease in played.held for attempt in lease.attempts)
    lost = f"samples {second.microbatch} are dropped: an image is broken"
    closed = (
        AttemptClosed(attempt=first, number=100, outcome=Outcome.APPLIED, loss=21.0),
        AttemptClosed(attempt=second, number=101, outcome=Outcome.DROPPED, loss=None, reason="an image is broken"),
    )
    training = played.role.runs[job].training
    assert training is not None
    assert training.loss.recent == 1.0
    played.kill("shard-1")
    if not lost_first:
        played.silent.add("shard-0")
        played.add(Role.SHARD, "shard-1")
    played.say("shard-0", AttemptsClosed(job=job, closed=closed, active_seconds=100.0))
    assert training.loss.recent == 2.0  # of an epoch's 20 microbatches
    assert lost in log(played, job)


def test_survivors_keep_their_layers_and_hear_of_the_new_route_before_training_starts_again() -> None:
    played = cluster(shards=4, forward=2)
    played.add(Role.BACKWARD, "backward-0")
    workers = {"shards": 4, "forward": 2, "backward": {"attached": True, "detached": 1}}
    job = run_until(played, 21, cluster=workers, **ACCUMULATE)
    before = sent(played, Assignment)[0][1]
    played.kill("shard-2")
    played.sent.clear()
    played.add(Role.SHARD, "shard-2")
    for name in ("shard-0", "shard-1", "shard-3", "forward-0", "forward-1", "backward-0"):
        assert kinds(played, name)[0] == "Reroute", name
        assert "Assignment" not in kinds(played, name)
    rerouted = dict(sent(played, Reroute))
    assert {one.generation for one in rerouted.values()} == {5}
    assert all(one.generation > before.generation for one in rerouted.values())
    assert {peer: one.block for peer, one in rerouted.items()} == {
        "shard-0": 0,
        "shard-1": 1,
        "shard-3": 3,
        "forward-0": -1,
        "forward-1": -1,
        "backward-0": 0,
    }
    assert [one.life for one in rerouted["shard-0"].route] == [1, 2, 5, 4]
    assert {one.durable for one in rerouted.values()} == {4}
    order = [type(message).__name__ for _, message in played.sent]
    assert order.index("StartTraining") > max(place for place, kind in enumerate(order) if kind == "Reroute")
    go_on(played)
    check_done(played, job)


def test_the_place_is_kept_three_seconds_for_a_process_of_the_same_name_then_any_free_shard_takes_it() -> None:
    played = cluster(shards=3)
    job = run_until(played, 21)
    played.kill("shard-1")
    played.wait(3.0)
    assert lives(played, job) == [("shard-0", 1), ("shard-1", 2)]
    assert played.role.runs[job].vacancies()
    played.wait(0.1)
    assert lives(played, job) == [("shard-0", 1), ("shard-2", 3)]
    assert "shard shard-2 takes the place of block 1" in log(played, job)
    go_on(played)
    check_done(played, job)


def test_the_first_shard_is_replaced_like_any_other_and_then_hears_which_cuts_are_durable() -> None:
    played = cluster()
    job = run_until(played, 21)
    played.kill("shard-0")
    played.sent.clear()
    played.add(Role.SHARD, "shard-0")
    assert kinds(played, "shard-0")[:2] == ["Welcome", "Assignment"]
    assert kinds(played, "shard-1")[0] == "Reroute"
    go_on(played)
    check_done(played, job)
    assert [one.version for _, one in sent(played, CutDurable)] == [8, 10]


def test_layers_that_a_restored_block_lacks_are_leased_again_as_attempts_never_used_before() -> None:
    played = cluster()
    job = run_until(played, 21)
    used = {attempt for _, attempt in played.leases}
    played.kill("shard-1")
    played.leases.clear()
    played.hold = lambda worker, lease: False
    played.add(Role.SHARD, "shard-1")
    again = [attempt for _, attempt in played.leases]
    plan = played.jobs[job].plan
    assert [plan.index(one.microbatch) for one in again] == list(range(16, 40))
    assert used.isdisjoint(again)
    assert {one.attempt for one in again} == {3 * ATTEMPTS_OF_GENERATION + 1}


def test_without_any_cut_a_lost_block_begins_again_and_the_others_keep_what_they_have() -> None:
    played = cluster()
    job = run_until(played, 6)
    played.kill("shard-1")
    played.sent.clear()
    played.add(Role.SHARD, "shard-1")
    ((_, assignment),) = sent(played, Assignment)
    assert (assignment.cut, assignment.block) == (0, 1)
    assert played.blocks["shard-0"].applied.watermark == 6
    go_on(played)
    check_done(played, job)


def test_all_shards_lost_at_once_are_all_restored() -> None:
    played = cluster()
    job = run_until(played, 21)
    played.kill("shard-0")
    played.kill("shard-1")
    played.sent.clear()
    played.add(Role.SHARD, "shard-0")
    assert sent(played, Assignment) == []
    played.add(Role.SHARD, "shard-1")
    assert {peer: one.cut for peer, one in sent(played, Assignment)} == {"shard-0": 4, "shard-1": 4}
    go_on(played)
    check_done(played, job)
    assert [(one["block"], one["rewind"]) for one in played.role.job(job)["recoveries"]] == [(0, 0), (1, 0)]


def test_a_shard_lost_while_another_gets_ready_starts_a_further_generation() -> None:
    played = cluster(shards=3)
    job = run_until(played, 21, cluster={"shards": 3})
    played.kill("shard-1")
    played.silent.add("shard-1")
    played.add(Role.SHARD, "shard-1")
    assert played.role.job(job)["message"] == "getting ready to go on"
    played.kill("shard-2")
    played.sent.clear()
    played.add(Role.SHARD, "shard-2")
    played.wake("shard-1")
    generations = {one.generation for _, one in sent(played, Assignment) + sent(played, Reroute)}
    assert generations == {5}
    assert {peer for peer, _ in sent(played, Assignment)} == {"shard-1", "shard-2"}
    go_on(played)
    check_done(played, job)


def test_nothing_is_leased_while_a_place_is_empty() -> None:
    played = cluster(forward=2)
    job = run_until(played, 9, cluster={"forward": 2})
    played.kill("shard-1")
    played.sent.clear()
    played.kill("forward-0")
    played.add(Role.FORWARD, "forward-0")
    played.wait(1.0)
    assert sent(played, Lease) == []
    assert played.role.runs[job].recovering
    go_on(played)
    played.add(Role.SHARD, "shard-1")
    check_done(played, job)


def test_a_forward_worker_lost_while_shards_get_ready_is_not_waited_for_if_another_is_there() -> None:
    played = cluster(forward=2)
    job = run_until(played, 9, cluster={"forward": 2})
    played.kill("shard-1")
    played.silent.add("forward-1")
    played.add(Role.SHARD, "shard-1")
    assert played.role.runs[job].recovering
    played.kill("forward-1")
    played.wait(1.0)
    assert not played.role.runs[job].recovering
    go_on(played)
    check_done(played, job)


def test_the_recovery_is_in_the_document_and_in_the_log() -> None:
    played = cluster()
    job = run_until(played, 29)
    played.report("shard-0", "shard-1")
    assert played.role.job(job)["steps"] == 7
    played.kill("shard-1")
    lost_at = played.now
    played.now += 2.5
    played.add(Role.SHARD, "shard-1")
    (made,) = played.role.job(job)["recoveries"]
    samples = made.pop("samples")
    assert made == {"time": lost_at, "block": 1, "shard": "shard-1", "cut": 4, "rewind": 3, "seconds": 2.5}
    assert samples > 0
    lines = log(played, job)
    assert "shard shard-1 (block 1) was lost (its link broke and did not come back)" in lines
    assert "assigning block 1 at version 4" in lines
    assert f"block 1 goes back 3 updates, from version 7 to 4; {samples} samples are leased again" in lines
    assert lines[-1].startswith("training goes on at version")
    go_on(played)
    assert played.role.job(job)["recoveries"] == [made]


def test_losses_and_seconds_of_before_are_kept() -> None:
    played = cluster()
    job = run_until(played, 21)
    before = played.role.job(job)
    played.kill("shard-1")
    played.add(Role.SHARD, "shard-1")
    after = played.role.job(job)
    assert after["train_loss"] == before["train_loss"] == 1.0
    assert after["seconds"] == before["seconds"] == 21.0


def test_with_a_new_first_shard_the_seconds_never_shrink() -> None:
    played = cluster()
    job = run_until(played, 21)
    played.kill("shard-0")
    played.now += 4.0
    played.add(Role.SHARD, "shard-0")
    assert played.role.job(job)["seconds"] == 21.0 + 4.0


def test_a_cut_committed_while_a_place_is_empty_is_the_one_that_is_restored() -> None:
    played = cluster()
    job = run_until(played, 12)
    played.hold = lambda worker, lease: len(played.leases) >= 18
    played.silent.add("shard-0")  # it has not written the manifest of version 4 yet
    played.play_held()
    assert played.role.job(job)["cuts"] == []
    played.kill("shard-1")
    played.wake("shard-0")
    assert [cut["version"] for cut in played.role.job(job)["cuts"]] == [4]
    played.sent.clear()
    played.add(Role.SHARD, "shard-1")
    assert [(peer, one.cut) for peer, one in sent(played, Assignment)] == [("shard-1", 4)]
    go_on(played)
    check_done(played, job)


def test_an_evaluation_that_a_lost_shard_broke_off_is_made_after_the_recovery() -> None:
    played = cluster()
    played.hold = lambda worker, lease: lease.kind is LeaseKind.EVALUATE and lease.version == 4
    job = played.submit(spec(train={"evaluate_every": 4}, timeouts=PATIENT))
    assert "evaluating version 4" in played.role.job(job)["message"]
    played.kill("shard-1")
    played.hold = lambda worker, lease: False
    played.add(Role.SHARD, "shard-1")
    check_done(played, job)
    assert [one["version"] for one in played.role.job(job)["evaluations"]] == [4, 8, 10]


def test_a_shard_lost_during_the_last_evaluation_does_not_cost_it() -> None:
    played = cluster()
    played.hold = lambda worker, lease: lease.kind is LeaseKind.EVALUATE
    job = played.submit(spec(timeouts=PATIENT))
    assert "evaluating version 10" in played.role.job(job)["message"]
    played.kill("shard-1")
    go_on(played)
    played.add(Role.SHARD, "shard-1")
    check_done(played, job)
    assert [one["version"] for one in played.role.job(job)["evaluations"]] == [10]


def test_a_shard_lost_while_the_model_is_measured_is_replaced_and_the_measurement_begins_again() -> None:
    played = cluster()
    played.silent.add("shard-0")
    job = played.submit(spec(timeouts=PATIENT))
    played.kill("shard-0")
    played.silent.clear()
    played.add(Role.SHARD, "shard-0")
    assert [peer for peer, _ in sent(played, Probe)] == ["shard-0", "shard-0"]
    check_done(played, job)


def test_a_shard_lost_while_processes_get_ready_for_the_first_time_is_replaced() -> None:
    played = cluster()
    played.silent.add("forward-0")
    job = played.submit(spec(timeouts=PATIENT))
    played.kill("shard-1")
    played.add(Role.SHARD, "shard-1")
    played.wake("forward-0")
    check_done(played, job)


def test_a_stop_that_was_asked_for_before_a_shard_was_lost_is_carried_out_after_the_recovery() -> None:
    played = cluster()
    job = run_until(played, 21)
    played.cancel(job)
    played.kill("shard-0")
    played.sent.clear()
    go_on(played)
    played.add(Role.SHARD, "shard-0")
    assert [peer for peer, _ in sent(played, Stop)] == ["shard-0"]
    document = played.role.job(job)
    assert document["state"] == "cancelled"
    assert document["steps"] == document["cuts"][-1]["version"] == 6
    assert document["ledger"]["samples_leased"] == document["ledger"]["samples_applied"] == 48


def test_a_cancel_while_a_place_is_empty_is_carried_out_after_the_recovery() -> None:
    played = cluster()
    job = run_until(played, 21)
    played.kill("shard-1")
    played.cancel(job)
    assert played.state(job) == "stopping"
    go_on(played)
    played.add(Role.SHARD, "shard-1")
    document = played.role.job(job)
    assert (document["state"], document["steps"]) == ("cancelled", 6)


def test_a_cancelled_job_whose_place_stays_empty_ends_after_the_drain_limit() -> None:
    played = cluster()
    job = run_until(played, 21, timeouts={"drain": 5.0})
    played.kill("shard-1")
    played.cancel(job)
    played.wait(6.0)
    document = played.role.job(job)
    assert document["state"] == "cancelled"
    assert "so the cut at version 4 stands" in document["message"]


def test_a_job_whose_processes_do_not_get_ready_again_fails_by_name() -> None:
    played = cluster()
    job = run_until(played, 21, timeouts={"start": 10.0})
    played.kill("shard-1")
    played.silent.add("shard-1")
    played.add(Role.SHARD, "shard-1")
    played.wait(11.0)
    message = played.role.job(job)["message"]
    assert message.startswith("shard-1 did not get ready within 10 s")
    assert "go on from it with `layerwise resume toy-1`" in message


def test_a_free_shard_is_not_taken_from_the_place_of_another_job_that_expects_it() -> None:
    played = cluster(shards=4, forward=2)
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN
    jobs = [played.submit(spec(timeouts=PATIENT)) for _ in range(2)]
    played.kill("shard-1")
    played.wait(1.0)
    played.kill("shard-3")
    played.wait(1.0)
    played.add(Role.SHARD, "shard-3")
    assert lives(played, jobs[0])[1][0] == "shard-1"
    assert lives(played, jobs[1])[1] == ("shard-3", 3)
    played.add(Role.SHARD, "shard-1")
    assert lives(played, jobs[0])[1] == ("shard-1", 3)
    go_on(played)
    assert [played.state(job) for job in jobs] == ["done", "done"]


def test_a_run_that_does_not_get_on_between_recoveries_is_given_up_and_lets_everybody_go() -> None:
    played = cluster()
    job = run_until(played, 21)
    for _ in range(MOST_RECOVERIES):
        played.kill("shard-1")
        played.add(Role.SHARD, "shard-1")
        played.wait(1.0)
        assert played.state(job) == "running"
    played.kill("shard-1")
    played.add(Role.SHARD, "shard-1")
    document = played.role.job(job)
    assert document["state"] == "failed"
    assert document["message"].startswith("the run did not get on: 6 times in a row")
    assert "the newest durable cut is version 4" in document["message"]
    played.wait(1.0)
    assert {node["state"] for node in played.role.nodes(played.now)} == {"free"}


def test_recoveries_with_progress_in_between_are_not_limited() -> None:
    played = cluster()
    job = run_until(played, 9)
    for count in range(MOST_RECOVERIES + 3):
        enough = 9 + 4 * (count + 1)
        played.hold = lambda worker, lease, enough=enough: len(played.blocks["shard-0"].applied) >= min(enough, 39)  # type: ignore[misc]
        played.play_held()
        played.report("shard-0", "shard-1")
        played.kill("shard-1")
        played.add(Role.SHARD, "shard-1")
        played.wait(1.0)
    assert played.state(job) == "running"
    go_on(played)
    check_done(played, job)


# Where all layers must agree ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"mode": "synchronous"}, {"async": {"window": 1, "accumulation": 4}}], ids=["synchronous", "window 1"]
)
def test_what_equals_plain_training_goes_back_to_the_cut_on_all_blocks(changes: dict[str, Any]) -> None:
    played = cluster()
    job = run_until(played, 21, **changes)
    played.kill("shard-1")
    played.sent.clear()
    played.add(Role.SHARD, "shard-1")
    assigned = sent(played, Assignment)
    assert {peer: one.cut for peer, one in assigned} == {"shard-0": 4, "shard-1": 4}
    assert [one.life for one in assigned[0][1].route] == [3, 4]
    assert [peer for peer, _ in sent(played, Reroute)] == ["forward-0"]
    assert "assigning all blocks at version 4" in log(played, job)
    go_on(played)
    check_done(played, job)


def test_when_all_blocks_go_back_evaluations_of_later_versions_are_made_again() -> None:
    played = cluster()
    job = run_until(played, 29, mode="synchronous", train={"evaluate_every": 4}, checkpoint={"every": 4})
    assert [one["version"] for one in played.role.job(job)["evaluations"]] == [4]
    played.kill("shard-1")
    played.add(Role.SHARD, "shard-1")
    go_on(played)
    check_done(played, job)
    assert [one["version"] for one in played.role.job(job)["evaluations"]] == [4, 8, 10]


# Broken links ---------------------------------------------------------------------------------------------------------


def test_a_broken_link_between_living_shards_leads_to_a_new_route_that_keeps_all_layers() -> None:
    played = cluster()
    job = run_until(played, 21)
    played.say("shard-0", LinkDown(job=job, peer="shard-1", generation=1))
    played.say("shard-1", LinkDown(job=job, peer="shard-0", generation=1))
    played.sent.clear()
    played.wait(LINK_SECONDS)
    assert sent(played, Reroute) == []
    played.wait(0.1)
    assert [peer for peer, _ in sent(played, Reroute)] == ["shard-0", "shard-1", "forward-0"]
    assert sent(played, Assignment) == []
    assert {one.generation for _, one in sent(played, Reroute)} == {3}
    ((_, start),) = sent(played, StartTraining)
    assert AppliedSet.from_json(json.loads(start.done_json)).watermark == 21
    assert "the link between shard-0 and shard-1 broke; what was under way is begun again" in log(played, job)
    go_on(played)
    check_done(played, job)
    assert lives(played, job) == [("shard-0", 1), ("shard-1", 2)]


def test_a_broken_link_that_was_a_lost_shard_is_left_to_its_replacement() -> None:
    played = cluster()
    job = run_until(played, 21)
    played.say("shard-0", LinkDown(job=job, peer="shard-1", generation=1))
    played.kill("shard-1")
    played.sent.clear()
    played.wait(LINK_SECONDS + 0.5)
    assert sent(played, Reroute) == []
    played.add(Role.SHARD, "shard-1")
    played.wait(LINK_SECONDS + 0.5)
    assert len(sent(played, StartTraining)) == 1
    go_on(played)
    check_done(played, job)


def test_news_of_a_link_of_an_older_route_are_no_news() -> None:
    played = cluster()
    job = run_until(played, 21)
    played.kill("shard-1")
    played.add(Role.SHARD, "shard-1")
    played.sent.clear()
    played.say("shard-0", LinkDown(job=job, peer="shard-1", generation=1))
    played.wait(LINK_SECONDS + 0.5)
    assert sent(played, Reroute) == []


def test_a_link_that_breaks_before_training_begins_is_mended_once_it_has() -> None:
    played = cluster()
    played.silent.add("forward-0")
    job = played.submit(spec(timeouts=PATIENT))
    played.say("shard-0", LinkDown(job=job, peer="shard-1", generation=1))
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN
    played.wake("forward-0")
    assert played.state(job) == "running"
    played.wait(LINK_SECONDS + 0.5)
    assert len(sent(played, Reroute)) == 3
    go_on(played)
    check_done(played, job)


# Damaged cuts ---------------------------------------------------------------------------------------------------------


def test_a_cut_that_can_not_be_read_back_is_forgotten_and_the_one_before_is_used() -> None:
    played = cluster()
    job = run_until(played, 34)
    assert [cut["version"] for cut in played.role.job(job)["cuts"]] == [4, 8]
    played.damaged.add(8)
    played.kill("shard-1")
    played.sent.clear()
    played.add(Role.SHARD, "shard-1")
    assert [(peer, one.cut) for peer, one in sent(played, Assignment)] == [("shard-1", 8), ("shard-1", 4)]
    assert "the file of a layer in the cut at version 8 is torn; going on from the cut at version 4" in log(played, job)
    assert [cut["version"] for cut in played.role.job(job)["cuts"]] == [4]
    (made,) = played.role.job(job)["recoveries"]
    assert (made["cut"], made["rewind"]) == (4, 4)
    played.damaged.clear()
    go_on(played)
    check_done(played, job)
    assert [cut["version"] for cut in played.role.job(job)["cuts"]] == [8, 10]


def test_a_damaged_cut_that_two_shards_find_is_given_up_once() -> None:
    played = cluster()
    job = run_until(played, 34, mode="synchronous")
    played.damaged.add(8)
    played.kill("shard-1")
    played.sent.clear()
    played.add(Role.SHARD, "shard-1")
    assert [one.cut for _, one in sent(played, Assignment)] == [8, 8, 4, 4]
    go_on(played)
    check_done(played, job)


def test_without_a_cut_before_the_damaged_one_the_job_fails_with_one_sentence() -> None:
    played = cluster()
    job = run_until(played, 21)
    played.damaged.add(4)
    played.kill("shard-1")
    played.add(Role.SHARD, "shard-1")
    document = played.role.job(job)
    assert document["state"] == "failed"
    assert document["message"].startswith(
        "the file of a layer in the cut at version 4 is torn, and there is no cut before it"
    )
    # It said "begin again with `layerwise resume`", which then refused: no cut is sound.
    assert document["message"].endswith("; put the damaged file back and resume the job, or submit it again")
    played.wait(1.0)
    assert {node["state"] for node in played.role.nodes(played.now)} == {"free"}


def test_a_damaged_cut_found_when_a_job_is_resumed_is_passed_over_too() -> None:
    played = cluster()
    job = run_until(played, 34)
    played.say("shard-1", Failure(job=job, message="out of memory"))
    played.damaged.add(8)
    played.hold = lambda worker, lease: False
    played.held.clear()
    played.resume(job)
    check_done(played, job)


# The coordinator --------------------------------------------------------------------------------------------------------


def restarted(
    num_microbatches: int = 21, *, shards: int = 2, forward: int = 1, **changes: Any
) -> tuple[PlayedCluster, str]:
    """A job in mid-training whose coordinator was started again; the processes have not found it yet."""
    played = cluster(shards=shards, forward=forward)
    job = run_until(played, num_microbatches, **changes)
    played.restart_coordinator()
    played.sent.clear()
    return played, job


def test_a_restarted_coordinator_takes_its_processes_back_and_no_layer_goes_back() -> None:
    played, job = restarted()
    assert played.state(job) == "running"
    assert "the coordinator was started again; waiting for the processes of the run" in log(played, job)
    played.come_back("forward-0", "shard-1")
    assert sent(played, Reroute) == []
    played.come_back("shard-0")
    assert [peer for peer, _ in sent(played, Reroute)] == ["shard-0", "shard-1", "forward-0"]
    assert sent(played, Assignment) == sent(played, Unassign) == []
    ((_, start),) = sent(played, StartTraining)
    assert AppliedSet.from_json(json.loads(start.done_json)).watermark == 21
    go_on(played)
    check_done(played, job)
    assert lives(played, job) == [("shard-0", 1), ("shard-1", 2)]


def test_a_restarted_coordinator_interrupts_nobody_before_the_last_worker_is_back() -> None:
    played, job = restarted(forward=2, cluster={"forward": 2})
    played.come_back("shard-0", "forward-1", "shard-1")
    assert sent(played, Reroute) == []
    played.wait(TOGETHER_SECONDS / 2)
    assert sent(played, Reroute) == []
    played.come_back("forward-0")
    assert {peer for peer, _ in sent(played, Reroute)} == {"shard-0", "shard-1", "forward-0", "forward-1"}
    assert len(sent(played, Reroute)) == 4
    go_on(played)
    check_done(played, job)


def test_a_worker_that_died_with_the_coordinator_is_waited_for_no_longer_once_it_is_there_anew() -> None:
    played, job = restarted(forward=2, cluster={"forward": 2})
    played.add(Role.FORWARD, "forward-2")  # it has nothing to do while the other two may come back
    played.come_back("shard-0", "forward-1", "shard-1")
    assert sent(played, Reroute) == sent(played, Assignment) == []
    played.add(Role.FORWARD, "forward-0")
    assert [peer for peer, _ in sent(played, Reroute)] == ["shard-0", "shard-1", "forward-1"]
    assert len(sent(played, Assignment)) == 1
    go_on(played)
    check_done(played, job)


def test_where_nothing_is_leased_ahead_a_restarted_coordinator_waits_for_nobody() -> None:
    played, job = restarted(5, forward=2, cluster={"forward": 2}, **{"async": {"window": 1}})
    played.come_back("shard-0", "forward-1", "shard-1")
    assert {peer for peer, _ in sent(played, Assignment)} == {"shard-0", "shard-1"}
    go_on(played)
    check_done(played, job)


def test_a_short_start_limit_does_not_fail_a_run_whose_processes_train_on() -> None:
    played, job = restarted(forward=2, cluster={"forward": 2}, timeouts={"start": 0.5})
    played.come_back("shard-0", "forward-1", "shard-1")
    played.wait(TOGETHER_SECONDS / 2 + 0.1)
    assert played.state(job) == "running"
    played.wait(TOGETHER_SECONDS)
    go_on(played)
    check_done(played, job)


def test_a_worker_that_does_not_come_back_to_a_restarted_coordinator_is_not_waited_for_long() -> None:
    played, job = restarted(forward=2, cluster={"forward": 2})
    played.come_back("shard-0", "forward-1", "shard-1")
    played.wait(TOGETHER_SECONDS + 0.1)
    assert [peer for peer, _ in sent(played, Reroute)] == ["shard-0", "shard-1", "forward-1"]
    go_on(played)
    check_done(played, job)


def test_what_was_trained_while_nobody_coordinated_counts() -> None:
    played, job = restarted(12)
    played.play_held()  # nobody hears of it
    assert played.role.runs[job].training is None
    played.come_back("shard-0", "shard-1", "forward-0")
    assert played.role.job(job)["ledger"]["samples_applied"] == 2 * len(played.jobs[job].done)
    go_on(played)
    check_done(played, job)


def test_a_cut_taken_while_nobody_coordinated_becomes_durable_afterwards() -> None:
    played, job = restarted(15)
    played.play_held()  # version 4 is reached
    assert played.blocks["shard-0"].version >= 4
    assert played.role.job(job)["cuts"] == []
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN
    played.come_back("shard-0", "shard-1", "forward-0")
    assert [cut["version"] for cut in played.role.job(job)["cuts"]] == [4]
    go_on(played)
    check_done(played, job)


def test_a_shard_that_died_with_the_coordinator_is_restored_and_the_others_kept() -> None:
    played, job = restarted()
    played.add(Role.SHARD, "shard-1")
    played.come_back("shard-0", "forward-0")
    assert {peer: one.cut for peer, one in sent(played, Assignment)} == {"shard-1": 4}
    assert {peer for peer, _ in sent(played, Reroute)} == {"shard-0", "forward-0"}
    go_on(played)
    check_done(played, job)


def test_the_places_of_a_restarted_coordinator_are_kept_three_seconds_too() -> None:
    played, job = restarted()
    played.add(Role.SHARD, "shard-9")
    played.come_back("shard-0", "forward-0")
    played.wait(3.1)
    assert lives(played, job) == [("shard-0", 1), ("shard-9", 3)]
    played.sent.clear()
    played.come_back("shard-1")
    assert [(peer, one.job) for peer, one in sent(played, Unassign)] == [("shard-1", job)]
    go_on(played)
    check_done(played, job)


def test_a_shard_that_says_it_holds_another_life_is_told_to_leave_and_then_takes_the_place_anew() -> None:
    played, job = restarted()
    played.blocks["shard-1"].place = played.jobs[job].route[0]  # life 1: not the one that was given out last
    played.come_back("shard-0", "forward-0", "shard-1")
    assert kinds(played, "shard-1")[:3] == ["Welcome", "Unassign", "Assignment"]
    go_on(played)
    check_done(played, job)


def test_a_forward_worker_that_does_not_come_back_is_replaced_by_a_free_one() -> None:
    played, job = restarted()
    played.come_back("shard-0", "shard-1")
    assert played.role.runs[job].training is None
    played.add(Role.FORWARD, "forward-5")
    played.wait(TOGETHER_SECONDS + 0.1)
    go_on(played)
    check_done(played, job)
    assert played.role.job(job)["forward_workers"] == ["forward-5"]


def test_a_backward_worker_comes_back_to_its_block_and_hears_of_the_route() -> None:
    played = cluster()
    played.add(Role.BACKWARD, "backward-0", "backward-1")
    job = run_until(played, 21, cluster={"backward": {"attached": False, "detached": 2}})
    played.restart_coordinator()
    played.sent.clear()
    played.come_back("backward-1", "shard-0", "shard-1", "forward-0", "backward-0")
    blocks = {peer: one.block for peer, one in sent(played, Reroute)}
    assert blocks == {"shard-0": 0, "shard-1": 1, "forward-0": -1, "backward-0": 0, "backward-1": 1}
    go_on(played)
    check_done(played, job)


def test_a_shard_that_no_one_replaces_after_a_restart_fails_the_job_in_time() -> None:
    played, job = restarted(timeouts={"start": 10.0})
    played.come_back("shard-0", "forward-0")
    played.wait(10.5)
    document = played.role.job(job)
    assert document["state"] == "failed"
    assert document["message"] == (
        "shard shard-1 (block 1) was lost (it has not come back yet), and no other took its place within 10 s; "
        "the newest durable cut is version 4: go on from it with `layerwise resume toy-1`"
    )


def test_a_stop_asked_for_before_the_restart_is_carried_out_after_it() -> None:
    played = cluster()
    job = run_until(played, 21)
    played.cancel(job)
    played.restart_coordinator()
    played.sent.clear()
    assert played.state(job) == "stopping"
    go_on(played)
    played.come_back("shard-0", "shard-1", "forward-0")
    played.report("shard-0", "shard-1")
    assert [peer for peer, _ in sent(played, Stop)] == ["shard-0"]
    document = played.role.job(job)
    assert (document["state"], document["steps"]) == ("cancelled", 6)


def test_a_second_restart_before_all_are_back_loses_nothing() -> None:
    played, job = restarted()
    played.come_back("shard-0")
    played.restart_coordinator()
    played.come_back("shard-1", "shard-0", "forward-0")
    go_on(played)
    check_done(played, job)
    assert lives(played, job) == [("shard-0", 1), ("shard-1", 2)]


def test_a_restart_while_a_replacement_gets_ready_leaves_both_shards_where_they_are() -> None:
    played = cluster()
    job = run_until(played, 21)
    played.kill("shard-1")
    played.silent.add("forward-0")
    played.add(Role.SHARD, "shard-1")  # restored, and the forward worker has not answered
    played.restart_coordinator()
    played.wake("forward-0")
    played.sent.clear()
    played.come_back("shard-0", "shard-1", "forward-0")
    assert sent(played, Assignment) == []
    go_on(played)
    check_done(played, job)
    assert lives(played, job) == [("shard-0", 1), ("shard-1", 3)]


def test_no_attempt_s_name_is_used_twice_over_lost_shards_restarts_and_resumes() -> None:
    played, job = restarted(21)
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN and len(played.leases) >= 24
    played.come_back("shard-0", "shard-1", "forward-0")
    played.kill("shard-0")
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN and len(played.leases) >= 28
    played.add(Role.SHARD, "shard-0")
    played.say("shard-1", Failure(job=job, message="out of memory"))
    played.hold = lambda worker, lease: False
    played.held.clear()
    played.resume(job)
    check_done(played, job)


def test_a_shard_s_report_of_a_route_before_does_not_hide_how_far_the_restored_block_is() -> None:
    played = cluster()
    job = run_until(played, 29)
    played.report("shard-0", "shard-1")
    old = played._report(played.blocks["shard-1"])
    assert isinstance(old, BlockReport)
    played.kill("shard-1")
    played.add(Role.SHARD, "shard-1")
    assert played.role.job(job)["steps"] == 4
    played.report("shard-0", "shard-1")
    assert [block["version"] for block in played.role.job(job)["blocks"]] == [7, 4]


def test_copies_that_survivors_tell_of_again_are_released_again() -> None:
    played = cluster()
    job = run_until(played, 21)
    played.kill("shard-1")
    played.sent.clear()
    played.add(Role.SHARD, "shard-1")
    released = [(peer, one.version) for peer, one in sent(played, ReleaseCut)]
    assert released == [("shard-0", 4), ("shard-1", 4)]
    go_on(played)
    check_done(played, job)


def test_a_microbatch_that_only_a_survivor_has_is_leased_before_all_others() -> None:
    played = cluster()
    job = run_until(played, 21)
    ahead = Attempt(played.jobs[job].plan.microbatch(30), 1)
    played.apply("shard-0", ahead)
    played.kill("shard-1")
    played.leases.clear()
    played.hold = lambda worker, lease: False
    played.add(Role.SHARD, "shard-1")
    plan = played.jobs[job].plan
    order = [plan.index(attempt.microbatch) for _, attempt in played.leases]
    assert order[:6] == [16, 17, 18, 19, 20, 30]
    check_done(played, job)


def test_a_disk_that_refuses_is_warned_of_once_and_its_job_waits_for_as_long_as_it_lasts() -> None:
    played = cluster()
    job = run_until(played, 12)
    report = BlockReport(
        job=job,
        block=1,
        layers=(),
        open_attempts=0,
        store_bytes=0,
        forward_queue=0,
        backward_queue=0,
        compute_seconds=0.0,
        log_bytes=0,
    )
    for _ in range(3):
        played.say("shard-1", replace(report, shortage="no room for the event log in /data: free some"))
        played.wait(2_500.0)
    assert not any("nothing has moved" in line for line in log(played, job))
    assert log(played, job).count("shard-1: no room for the event log in /data: free some") == 1
    assert played.state(job) == "running"
    played.say("shard-1", report)
    assert log(played, job)[-1] == "shard-1: the event log can be written again"


def test_a_job_that_is_cancelled_while_its_coordinator_waits_for_its_processes_stops_with_a_cut() -> None:
    played = cluster()
    job = run_until(played, 21)
    for name in ("shard-0", "shard-1", "forward-0"):
        played.silent.add(name)
    played.restart_coordinator()
    played.role.cancel(job, played.now)
    document = played.role.job(job)
    assert document["state"] == "stopping"
    assert "cancelled before training began" not in document["message"]
