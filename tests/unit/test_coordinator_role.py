from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from layerwise.applied import AppliedSet
from layerwise.errors import ConfigError, NotAllowedError, NotFoundError
from layerwise.ids import ATTEMPTS_OF_GENERATION, Microbatch
from layerwise.messages import (
    Assignment,
    CommitCut,
    CutDurable,
    Failure,
    Heartbeat,
    Lease,
    LeaseKind,
    LeaseRequest,
    LeaseReturn,
    LinkDown,
    Message,
    Outcome,
    ReleaseCut,
    Reroute,
    Role,
    StartTraining,
    Stop,
    Unassign,
)
from layerwise.server.memory_store import MemoryJobStore
from tests.unit.played_cluster import PlayedCluster, spec


def cluster(*, shards: int = 2, forward: int = 1, **more: Any) -> PlayedCluster:
    played = PlayedCluster(**more)
    played.add(Role.SHARD, *(f"shard-{index}" for index in range(shards)))
    played.add(Role.FORWARD, *(f"forward-{index}" for index in range(forward)))
    return played


def sent(played: PlayedCluster, kind: type[Message]) -> list[tuple[str, Any]]:
    return [(peer, message) for peer, message in played.sent if isinstance(message, kind)]


def hold_training(worker: str, lease: Lease) -> bool:
    return lease.kind is LeaseKind.TRAIN


# A whole run ----------------------------------------------------------------------------------------------------------


def test_a_job_runs_to_its_last_durable_evaluated_cut_and_frees_its_processes() -> None:
    played = cluster()
    job = played.submit()
    document = played.role.job(job)
    assert (job, document["state"], document["steps"]) == ("toy-1", "done", 10)
    assert document["ledger"] == {
        "samples_leased": 80,
        "samples_applied": 80,
        "samples_dropped": 0,
        "num_dropped": 0,
        "dropped": [],
    }
    assert document["validation"] == {"version": 10, "loss": 0.25, "accuracy": 0.5}
    assert [cut["version"] for cut in document["cuts"]] == [8, 10]
    assert {node["state"] for node in played.role.nodes(played.now)} == {"free"}


def test_every_microbatch_of_the_plan_is_leased_once_and_in_position_order() -> None:
    played = cluster()
    played.submit()
    microbatches = [attempt.microbatch for _, attempt in played.leases]
    assert microbatches == sorted(microbatches)
    assert len(set(microbatches)) == len(microbatches) == 40


def test_a_cut_is_committed_with_all_files_and_told_durable_only_then() -> None:
    played = cluster()
    played.submit()
    commits = sent(played, CommitCut)
    assert [(peer, one.version, one.keep) for peer, one in commits] == [
        ("shard-0", 4, (4,)),
        ("shard-0", 8, (4, 8)),
        ("shard-0", 10, (8, 10)),
    ]
    assert [file.layer for file in commits[0][1].files] == [0, 1, 2, 3]
    manifest = json.loads(commits[-1][1].manifest_json)
    assert manifest["version"] == 10
    assert manifest["spec"]["name"] == "toy"
    assert [one.version for _, one in sent(played, CutDurable)] == [4, 8, 10]


def test_copies_of_cuts_that_nobody_evaluates_are_released_on_every_shard() -> None:
    played = cluster()
    played.submit()
    released = [(peer, one.version) for peer, one in sent(played, ReleaseCut) if one.version]
    assert released == [(shard, version) for version in (4, 8, 10) for shard in ("shard-0", "shard-1")]


def test_evaluation_pauses_leases_until_nothing_is_open_and_is_left_out_of_the_seconds() -> None:
    played = cluster()
    ranges: list[Microbatch] = []

    def hold_evaluation(worker: str, lease: Lease) -> bool:
        ranges.extend(lease.ranges)
        return lease.kind is LeaseKind.EVALUATE and lease.version == 4

    played.hold = hold_evaluation
    job = played.submit(spec(train={"evaluate_every": 4}))
    assert "evaluating version 4" in played.role.job(job)["message"]
    training = played.role.runs[job].training
    assert training is not None
    assert training.ledger.num_open == 0
    played.now += 5.0
    played.play_held()
    document = played.role.job(job)
    assert [(one["version"], one["seconds"]) for one in document["evaluations"]] == [(4, 5.0), (8, 0.0), (10, 0.0)]
    assert ranges[:3] == [Microbatch(0, 0, 4), Microbatch(0, 4, 8), Microbatch(0, 8, 10)]  # a window of microbatches
    assert document["seconds"] == 40.0 - 5.0


# Workers come and go --------------------------------------------------------------------------------------------------


def test_a_killed_forward_worker_costs_nothing_when_another_takes_its_place() -> None:
    played = cluster(forward=2)
    played.hold = lambda worker, lease: worker == "forward-0"
    job = played.submit()
    played.kill("forward-0")
    assert played.state(job) == "done"
    assert played.role.job(job)["ledger"]["samples_applied"] == 80
    (worker, attempt), *_ = played.leases
    assert worker == "forward-1"
    assert attempt.attempt == ATTEMPTS_OF_GENERATION + 2


def test_without_any_forward_worker_the_job_waits_and_goes_on_with_the_next_that_comes() -> None:
    played = cluster()
    played.hold = lambda worker, lease: worker == "forward-0"
    job = played.submit()
    played.kill("forward-0")
    assert played.state(job) == "running"
    played.add(Role.FORWARD, "forward-7")
    assert played.state(job) == "done"


def test_a_job_that_gets_no_forward_worker_again_fails_after_the_time_limit() -> None:
    played = cluster()
    played.hold = hold_training
    job = played.submit(spec(timeouts={"start": 10.0, "heartbeat": 1000.0}))
    played.kill("forward-0")
    played.wait(1.0)
    played.wait(11.0)
    document = played.role.job(job)
    assert document["state"] == "failed"
    assert "no forward worker is left, and none came within 10 s" in document["message"]


def test_a_worker_that_is_started_again_under_its_name_is_another_incarnation() -> None:
    played = cluster()
    played.hold = hold_training
    job = played.submit()
    played.hold = lambda worker, lease: False
    played.held.clear()
    played.add(Role.FORWARD, "forward-0")
    assert played.state(job) == "done"
    assert played.leases[0][1].attempt == ATTEMPTS_OF_GENERATION + 2
    assert [node["incarnation"] for node in played.role.nodes(played.now) if node["name"] == "forward-0"] == [2]


@pytest.mark.parametrize("name", ["shard-0", "forward-0"])
@pytest.mark.parametrize("hosts", [True, False])
def test_a_process_that_presents_itself_twice_on_one_link_keeps_its_place(name: str, hosts: bool) -> None:
    played = cluster()
    played.hold = hold_training
    job = played.submit()
    before, nodes = played.role.job(job), played.role.nodes(played.now)
    process = played.role.members.get(name)
    assert process is not None
    for _ in range(3):
        again = replace(process.hello, hosting=played.hosting(name) if hosts else ())
        assert played.role.on_message(name, again, played.now) == []
    assert (played.role.job(job), played.role.nodes(played.now)) == (before, nodes)


def test_a_worker_whose_link_broke_comes_back_into_its_place_without_being_assigned_anew() -> None:
    played = cluster(forward=2)
    played.hold = hold_training
    job = played.submit(spec(cluster={"forward": 2}))
    played.perform(played.role.on_lost("forward-1", played.now))
    played.sent.clear()
    played.come_back("forward-1")
    kinds = [type(message).__name__ for peer, message in played.sent if peer == "forward-1"]
    assert kinds == ["Welcome"]
    assert {node["job"] for node in played.role.nodes(played.now)} == {job}
    assert played.role.events(job, 0)[-1].message == "forward worker forward-1 is back"


def test_a_worker_that_comes_back_when_another_has_its_place_is_told_to_leave() -> None:
    played = cluster(forward=2)
    played.hold = hold_training
    job = played.submit()
    played.perform(played.role.on_lost("forward-0", played.now))
    played.sent.clear()
    played.come_back("forward-0")
    kinds = [type(message).__name__ for peer, message in played.sent if peer == "forward-0"]
    assert kinds == ["Welcome", "Unassign"]
    assert {node["name"]: node["job"] for node in played.role.nodes(played.now)} == {
        "forward-0": None,
        "forward-1": job,
        "shard-0": job,
        "shard-1": job,
    }


def test_a_silent_process_is_lost_after_the_job_s_heartbeat_limit() -> None:
    played = cluster()
    played.hold = hold_training
    job = played.submit(spec(timeouts={"heartbeat": 5.0}))
    played.now += 4.0
    for name in ("shard-0", "forward-0"):
        played.say(name, Heartbeat())
    played.wait(2.0)
    lines = [event.message for event in played.role.events(job, 0)]
    assert "shard shard-1 (block 1) was lost (no sign of life for 6 s)" in lines
    assert {node["name"] for node in played.role.nodes(played.now)} == {"shard-0", "forward-0"}


def test_time_in_which_the_coordinator_was_stopped_counts_against_nobody() -> None:
    """Its first tick comes before it has read what the others said meanwhile. It lost all of them, and gave the job up."""
    played = cluster()
    played.hold = hold_training
    job = played.submit(spec(timeouts={"heartbeat": 50.0, "lease": 10.0, "task": 5.0}))
    played.now += 400.0
    played.role.excuse(399.0, played.now)
    played.wait(0.0)
    assert played.state(job) == "running"
    assert {node["state"] for node in played.role.nodes(played.now)} == {"working"}
    for name in ("shard-0", "shard-1", "forward-0"):
        played.say(name, Heartbeat())
    played.wait(31.0)
    document = played.role.job(job)
    assert document["message"].startswith("nothing has moved for 32 s (training), so the run was given up")


def test_a_job_that_waits_for_another_shard_waits_longer_by_the_time_in_which_the_coordinator_was_stopped() -> None:
    played = PlayedCluster()
    played.add(Role.SHARD, "shard-0")
    played.add(Role.FORWARD, "forward-0")
    job = played.submit(spec(timeouts={"start": 10.0}))
    played.wait(1.0)
    played.now += 60.0
    played.role.excuse(59.0, played.now)
    played.wait(0.0)
    assert played.state(job) == "queued"
    played.add(Role.SHARD, "shard-1")
    assert played.state(job) != "queued"


def test_a_link_that_broke_is_mended_later_by_the_time_in_which_the_coordinator_was_stopped() -> None:
    played = cluster()
    played.hold = hold_training
    job = played.submit(spec())
    generation = played.role.runs[job].route[0].life
    played.say("shard-0", LinkDown(job=job, peer="shard-1", generation=generation))
    played.now += 60.0
    played.role.excuse(60.0, played.now)
    played.sent.clear()
    played.wait(0.5)
    assert not any(isinstance(message, Reroute) for _, message in played.sent)
    played.wait(1.0)
    assert any(isinstance(message, Reroute) for _, message in played.sent)


def test_a_lost_shard_s_place_waits_longer_by_the_time_in_which_the_coordinator_was_stopped() -> None:
    played = cluster()
    played.hold = hold_training
    job = played.submit(spec(timeouts={"start": 10.0}))
    played.kill("shard-1")
    played.now += 60.0
    played.role.excuse(59.0, played.now)
    played.wait(0.0)
    assert played.state(job) == "running"
    played.wait(8.0)
    assert played.state(job) == "running"
    played.wait(2.0)
    assert played.state(job) == "failed"


def test_samples_that_cannot_be_loaded_fail_the_job_with_the_worker_s_sentence() -> None:
    played = cluster()
    played.hold = hold_training
    job = played.submit()
    attempt = played.held[0][1].attempts[0]
    played.say("forward-0", LeaseReturn(job=job, attempt=attempt, reason="load-failed: file x.bin is gone"))
    assert played.state(job) == "failed"
    assert "file x.bin is gone" in played.role.job(job)["message"]


# Ends -----------------------------------------------------------------------------------------------------------------


def run_until(played: PlayedCluster, num_microbatches: int) -> str:
    """A job whose first microbatches are closed and whose others are held back."""
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN and len(played.leases) >= num_microbatches
    return played.submit()


def test_a_lost_shard_without_a_replacement_fails_the_job_with_one_sentence_that_says_how_to_resume() -> None:
    played = cluster()
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN and len(played.leases) >= 20
    job = played.submit(spec(timeouts={"start": 10.0, "heartbeat": 1000.0}))
    played.kill("shard-1")
    played.wait(10.0)
    assert played.state(job) == "running"
    played.wait(0.5)
    document = played.role.job(job)
    assert document["state"] == "failed"
    assert document["message"] == (
        "shard shard-1 (block 1) was lost (its link broke and did not come back), and no other took its place within "
        "10 s (at version 4); the newest durable cut is version 4: go on from it with `layerwise resume toy-1`"
    )
    assert [peer for peer, _ in sent(played, Unassign)] == ["shard-0", "forward-0"]


def test_resume_restores_the_newest_durable_cut_in_new_lives_and_leases_only_the_rest() -> None:
    played = cluster()
    job = run_until(played, 20)
    attempts = {attempt for _, attempt in played.leases}
    played.say("shard-1", Failure(job=job, message="out of memory"))
    assert played.state(job) == "failed"
    played.hold = lambda worker, lease: False
    played.held.clear()
    played.leases.clear()
    played.sent.clear()
    played.resume(job)
    assignment = sent(played, Assignment)[0][1]
    assert assignment.cut == 4
    assert [(one.shard, one.life) for one in assignment.route] == [("shard-0", 3), ("shard-1", 4)]
    done = AppliedSet.from_json(json.loads(sent(played, StartTraining)[0][1].done_json))
    assert done.watermark == 16
    document = played.role.job(job)
    assert (document["state"], document["resume_count"]) == ("done", 1)
    assert document["ledger"]["samples_applied"] == 80
    assert len(played.leases) == 40 - 16
    assert attempts.isdisjoint(attempt for _, attempt in played.leases)


@pytest.mark.parametrize("last", ["forward-0", "shard-0", "shard-1"])
def test_a_job_resumed_at_its_last_cut_has_that_evaluated_whoever_is_ready_last(last: str) -> None:
    played = cluster()
    played.hold = lambda worker, lease: lease.kind is LeaseKind.EVALUATE
    job = played.submit()
    played.say("shard-1", Failure(job=job, message="out of memory"))
    assert played.role.job(job)["cuts"][-1]["version"] == 10
    played.hold = lambda worker, lease: False
    played.silent.add(last)
    played.resume(job)
    played.wake(last)
    document = played.role.job(job)
    assert (document["state"], document["ledger"]["samples_applied"]) == ("done", 80)
    assert document["validation"] == {"version": 10, "loss": 0.25, "accuracy": 0.5}
    assert document["message"] == "done: 10 updates of every layer"


def test_a_worker_lost_while_the_job_stops_is_replaced_so_that_it_can_stop() -> None:
    played = cluster(forward=2)
    job = run_until(played, 9)
    played.role.runs[job].cancel(played.now)
    played.hold = lambda worker, lease: False
    played.kill("forward-0")
    played._play("shard-0", Stop(job=job))
    played.run()
    assert played.state(job) == "cancelled"


def test_cancel_stops_at_the_next_update_with_a_durable_cut_and_an_exact_ledger() -> None:
    played = cluster()
    job = run_until(played, 9)
    played.cancel(job)
    assert played.state(job) == "stopping"
    played.hold = lambda worker, lease: False
    played.play_held()
    document = played.role.job(job)
    assert document["state"] == "cancelled"
    assert document["cuts"][-1]["version"] == document["steps"] == 3
    assert "`layerwise resume toy-1`" in document["message"]


def test_a_stop_drains_longer_by_the_time_in_which_the_coordinator_was_stopped() -> None:
    played = cluster()
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN and len(played.leases) >= 20
    job = played.submit(spec(timeouts={"drain": 5.0, "heartbeat": 100.0}))
    played.cancel(job)
    played.now += 60.0
    played.role.excuse(59.0, played.now)
    played.wait(3.0)
    assert played.state(job) == "stopping"
    played.wait(2.0)
    assert played.state(job) == "cancelled"


def test_a_stop_that_does_not_drain_in_time_leaves_the_last_cut_standing() -> None:
    played = cluster()
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN and len(played.leases) >= 20
    job = played.submit(spec(timeouts={"drain": 5.0, "heartbeat": 100.0}))
    played.cancel(job)
    played.wait(6.0)
    document = played.role.job(job)
    assert document["state"] == "cancelled"
    assert "did not drain within 5 s, so the cut at version 4 stands" in document["message"]


def test_a_queued_job_is_cancelled_at_once_and_stays_cancelled() -> None:
    played = PlayedCluster()
    job = played.submit()
    played.cancel(job)
    played.cancel(job)
    assert played.state(job) == "cancelled"


def test_a_failure_of_a_role_fails_the_job_with_its_sentence() -> None:
    played = cluster()
    job = run_until(played, 3)
    played.say("shard-1", Failure(job=job, message="the loss of 0:0-2 is not finite, first in layer 2 (layer-2)."))
    message = played.role.job(job)["message"]
    assert message.startswith("the loss of 0:0-2 is not finite, first in layer 2 (layer-2) (at version 0)")
    assert played.role.events(job, 0)[-1].level == "error"


def test_a_model_that_cannot_be_built_fails_the_job_with_the_shard_s_sentence_alone() -> None:
    played = cluster()
    played.probe_error = "data.path: there is nothing at /nowhere"
    job = played.submit()
    assert played.role.job(job)["message"] == "data.path: there is nothing at /nowhere"


def test_a_cut_that_cannot_be_saved_is_a_warning_and_the_older_one_stands() -> None:
    played = cluster()
    played.refuse_save = lambda block, version: "the disk is full" if version == 8 and block == 1 else ""
    job = played.submit()
    document = played.role.job(job)
    assert (document["state"], [cut["version"] for cut in document["cuts"]]) == ("done", [4, 10])
    warnings = [event.message for event in played.role.events(job, 0) if event.level == "warning"]
    assert warnings == [
        "the cut at version 8 is given up: shard-1 could not save its block: the disk is full; "
        "the cut at version 4 stands"
    ]
    assert [one.version for _, one in sent(played, CutDurable)] == [4, 8, 10]


def test_a_job_whose_last_cut_cannot_be_saved_fails() -> None:
    played = cluster()
    played.refuse_save = lambda block, version: "the disk is full" if version == 10 else ""
    job = played.submit()
    document = played.role.job(job)
    assert document["state"] == "failed"
    assert "the last cut, at version 10, is not durable" in document["message"]
    assert "version 8: go on from it" in document["message"]


def test_a_shard_that_never_gets_ready_fails_the_job_by_name() -> None:
    played = cluster()
    played.silent.add("shard-0")
    job = played.submit(spec(timeouts={"start": 10.0, "heartbeat": 100.0}))
    played.wait(11.0)
    assert played.role.job(job)["message"] == "shard shard-0 did not measure the model within 10 s"


def test_a_run_in_which_nothing_moves_warns_and_is_given_up_in_the_end() -> None:
    played = cluster()
    played.hold = hold_training
    job = played.submit(spec(timeouts={"lease": 1.0, "task": 1.0, "heartbeat": 1000.0}))
    played.wait(2.0)
    assert played.role.events(job, 0)[-1].level == "warning"
    played.wait(4.0)
    assert "nothing has moved for 6 s" in played.role.job(job)["message"]


def test_dropped_microbatches_are_listed_and_the_run_still_ends() -> None:
    played = cluster()
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN and not played.leases
    job = played.submit(spec(train={"on_bad_sample": "drop", "max_dropped": 0.1}))
    (_, lease), *_ = played.held
    played.held.clear()
    played.leases.append(("forward-0", lease.attempts[0]))
    played.close(job, lease.attempts[0], Outcome.DROPPED)
    for attempt in lease.attempts[1:]:
        played.close(job, attempt)
    played.run()
    ledger = played.role.job(job)["ledger"]
    assert played.state(job) == "done"
    assert (ledger["samples_leased"], ledger["samples_applied"], ledger["samples_dropped"]) == (80, 78, 2)
    assert [(one["epoch"], one["start"]) for one in ledger["dropped"]] == [(0, 0)]


def test_a_manifest_waits_until_the_first_shard_has_told_what_closed() -> None:
    played = cluster()
    last = Microbatch(1, 38, 40)
    played.hold = lambda worker, lease: any(attempt.microbatch == last for attempt in lease.attempts)
    job = played.submit(spec(train={"on_bad_sample": "drop", "max_dropped": 0.1}))
    ((_, lease),) = played.held
    for attempt in lease.attempts:
        if attempt.microbatch != last:
            played.close(job, attempt)
    (attempt,) = (one for one in lease.attempts if one.microbatch == last)
    for shard in ("shard-0", "shard-1"):
        played.apply(shard, attempt, dropped=True)
    played.run()
    assert [one.version for _, one in sent(played, CommitCut)] == [4, 8], "all blocks have saved version 10"
    played.close(job, attempt, Outcome.DROPPED)
    played.run()
    assert played.state(job) == "done"
    (_, commit) = sent(played, CommitCut)[-1]
    ledger = json.loads(commit.manifest_json)["ledger"]
    assert commit.version == 10
    assert ledger == played.role.job(job)["ledger"]
    assert [one["start"] for one in ledger["dropped"]] == [38]


def test_documents_and_manifests_stay_small_however_many_microbatches_are_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("layerwise.server.sample_ledger.MOST_DROPPED", 3)
    played = cluster()
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN
    job = played.submit(spec(train={"on_bad_sample": "drop", "max_dropped": 1.0}))
    while played.held:
        held, played.held = played.held, []
        for _, lease in held:
            for attempt in lease.attempts:
                played.close(job, attempt, Outcome.DROPPED)
        played.run()
    document = played.role.job(job)
    ledger = document["ledger"]
    assert (document["state"], ledger["samples_dropped"], ledger["num_dropped"]) == ("done", 80, 40)
    assert [(one["epoch"], one["start"]) for one in ledger["dropped"]] == [(0, 0), (0, 2), (0, 4)]
    manifest = json.loads([one for _, one in sent(played, CommitCut)][-1].manifest_json)
    assert (len(manifest["ledger"]["dropped"]), manifest["ledger"]["num_dropped"]) == (3, 40)


def test_the_newest_evaluations_are_listed_and_all_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.server.evaluation_round.MOST_EVALUATIONS", 2)
    played = cluster()
    document = played.role.job(played.submit(spec(train={"evaluate_every": 4})))
    assert [(one["version"], one["number"]) for one in document["evaluations"]] == [(8, 2), (10, 3)]
    assert document["num_evaluations"] == 3
    assert document["validation"]["version"] == 10
    manifest = json.loads([one for _, one in sent(played, CommitCut)][-1].manifest_json)
    assert len(manifest["evaluations"]) <= 2


def test_a_cut_whose_manifest_can_not_be_sent_is_given_up_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sending it ended the coordinator, and the next one met the same cut again."""
    monkeypatch.setattr(
        "layerwise.server.cut_commits.why_too_large",
        lambda manifest, files: "its manifest has too many bytes" if json.loads(manifest)["version"] == 4 else "",
    )
    played = cluster()
    document = played.role.job(played.submit())
    assert document["state"] == "done"
    assert [one.version for _, one in sent(played, CommitCut)] == [8, 10]
    said = [event.message for event in played.role.events(document["job"], 0) if event.level == "warning"]
    assert said == ["the cut at version 4 is given up: its manifest has too many bytes; there is no durable cut yet"]


# The queue ------------------------------------------------------------------------------------------------------------


def test_jobs_run_side_by_side_where_processes_suffice_and_in_order_where_not() -> None:
    played = cluster(shards=4, forward=2)
    played.hold = hold_training
    jobs = [played.submit() for _ in range(3)]
    assert [played.state(job) for job in jobs] == ["running", "running", "queued"]
    document = played.role.job(jobs[2])
    assert document["queue_position"] == 1
    assert document["waiting_for"] == (
        "needs 2 shards; 0 of 4 are free (the others work for toy-1, toy-2); "
        "needs 1 forward worker; 0 of 2 are free (the others work for toy-1, toy-2)"
    )
    played.hold = lambda worker, lease: False
    played.play_held()
    assert [played.state(job) for job in jobs] == ["done", "done", "done"]


def test_a_small_job_does_not_pass_a_large_one_that_came_first() -> None:
    played = cluster(shards=2)
    large = played.submit(spec(cluster={"shards": 3}))
    small = played.submit(spec(cluster={"shards": 1}))
    assert played.role.job(large)["waiting_for"] == "needs 3 shards; 2 of 2 are free"
    assert played.role.job(small)["waiting_for"] == "1 job is before it"
    played.add(Role.SHARD, "shard-2")
    assert [played.state(job) for job in (large, small)] == ["done", "done"]


def test_a_job_that_needs_more_than_there_is_fails_in_the_end_and_lets_the_next_one_run() -> None:
    played = cluster()
    large = played.submit(spec(cluster={"shards": 3}, timeouts={"start": 30.0}))
    small = played.submit()
    for name in ("shard-0", "shard-1", "forward-0"):
        played.say(name, Heartbeat())
    played.now += 20.0
    for name in ("shard-0", "shard-1", "forward-0"):
        played.say(name, Heartbeat())
    played.wait(11.0)
    assert "needs 3 shards; 2 of 2 are free, and no more came within 30 s" in played.role.job(large)["message"]
    assert played.state(small) == "done"


def test_two_jobs_never_share_a_directory() -> None:
    played = PlayedCluster()
    directories = [played.role.job(played.submit())["directory"] for _ in range(3)]
    assert directories == ["runs/toy", "runs/toy-2", "runs/toy-3"]


def test_a_job_with_the_user_s_own_code_runs_only_where_that_is_allowed() -> None:
    played = cluster()
    job = played.submit(spec(model={"import": "mine.models:build"}))
    assert played.role.job(job)["waiting_for"] == (
        "needs 2 shards; 0 of 0 are free; 2 more would have to be started with --allow-import mine.models; "
        "needs 1 forward worker; 0 of 0 are free; 1 more would have to be started with --allow-import mine.models"
    )
    played.add(Role.SHARD, "shard-8", "shard-9", imports=("mine",))
    played.add(Role.FORWARD, "forward-9", imports=("mine.models",))
    assert played.state(job) == "done"


def test_detached_workers_are_given_blocks_in_turn() -> None:
    played = cluster()
    played.add(Role.BACKWARD, "backward-0", "backward-1", "backward-2")
    played.submit(spec(cluster={"backward": {"attached": False, "detached": 3}}))
    blocks = {peer: one.block for peer, one in sent(played, Assignment)}
    assert [blocks[f"backward-{index}"] for index in range(3)] == [0, 1, 0]


def test_a_block_without_a_backward_worker_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="got 1, expected at least 2, the number of shards"):
        PlayedCluster().submit(spec(cluster={"backward": {"attached": False, "detached": 1}}))


# The coordinator ------------------------------------------------------------------------------------------------------


def test_after_a_restart_running_jobs_wait_for_their_processes_and_queued_ones_for_their_turn() -> None:
    played = cluster()
    job = run_until(played, 20)
    waiting = played.submit()
    played.restart_coordinator()
    assert [played.state(one) for one in (job, waiting)] == ["running", "queued"]
    assert played.role.job(job)["message"] == "waiting for a shard to take the place of shard-0, shard-1"
    played.hold = lambda worker, lease: False
    played.come_back("shard-0", "shard-1", "forward-0")
    assert [played.state(one) for one in (job, waiting)] == ["done", "done"]


def test_after_a_restart_a_job_still_shows_how_far_it_was() -> None:
    store = MemoryJobStore()
    played = cluster(store=store)
    job = run_until(played, 20)
    played.wait(3.0)
    played.leases.clear()
    again = PlayedCluster(store)
    document = again.role.job(job)
    assert (document["steps"], document["ledger"]["samples_applied"]) == (4, 40)
    assert [block["shard"] for block in document["blocks"]] == ["shard-0", "shard-1"]


def test_lives_go_on_growing_after_a_restart_in_which_nobody_came_back() -> None:
    store = MemoryJobStore()
    played = cluster(store=store)
    run_until(played, 3)
    again = cluster(store=store)
    assert [one.life for one in sent(again, Assignment)[0][1].route] == [3, 4]


def test_a_job_that_had_not_begun_to_train_waits_in_the_queue_again_after_a_restart() -> None:
    played = cluster()
    played.silent.add("shard-0")
    job = played.submit()
    assert played.state(job) == "preparing"
    played.restart_coordinator()
    assert played.state(job) == "queued"
    played.silent.clear()
    played.add(Role.SHARD, "shard-0", "shard-1")
    played.add(Role.FORWARD, "forward-0")
    assert played.state(job) == "done"


def test_a_process_of_a_job_that_is_over_is_told_to_leave_it() -> None:
    played = cluster()
    job = run_until(played, 3)
    played.restart_coordinator()
    played.role.cancel(job, played.now)
    played.wait(1000.0)
    assert played.state(job) in ("failed", "cancelled")
    played.sent.clear()
    played.come_back("shard-0")
    assert [(peer, one.job) for peer, one in sent(played, Unassign)] == [("shard-0", job)]
    assert {node["state"] for node in played.role.nodes(played.now)} == {"free"}


def test_only_failed_and_cancelled_jobs_can_be_resumed() -> None:
    played = cluster()
    job = played.submit()
    with pytest.raises(NotAllowedError, match="is done"):
        played.resume(job)
    with pytest.raises(NotFoundError, match="the newest are: toy-1"):
        played.resume("toy-9")


def test_events_are_numbered_without_gaps_over_resumes() -> None:
    played = cluster()
    job = run_until(played, 20)
    played.cancel(job)
    played.hold = lambda worker, lease: False
    played.play_held()
    played.resume(job)
    events = played.role.events(job, 0)
    assert [event.sequence for event in events] == list(range(len(events)))
    assert played.role.events(job, 3, 2) == events[3:5]
    assert events[-1].message == "done: 10 updates of every layer"


def test_a_message_that_contradicts_the_plan_fails_the_job_and_not_the_coordinator() -> None:
    played = cluster()
    job = run_until(played, 3)
    attempt = played.held[0][1].attempts[0]
    wrong = type(attempt)(Microbatch(0, 1, 3))
    with pytest.raises(ValueError, match="not a microbatch of this plan"):
        played.close(job, wrong)
    played._answer("shard-0", Failure(job="other", message="not this job's business"))
    played.run()
    assert played.state(job) == "running"


def test_a_lease_request_before_training_begins_is_remembered() -> None:
    played = cluster()
    played.silent.add("shard-1")
    job = played.submit()
    played.say("forward-0", LeaseRequest(job=job, count=2))
    assert sent(played, Lease) == []
