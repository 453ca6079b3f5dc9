"""A job whose training diverges, as the coordinator drives it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from layerwise.ids import Attempt
from layerwise.messages import (
    Assignment,
    AttemptClosed,
    AttemptsClosed,
    CommitCut,
    Failure,
    LeaseKind,
    LeaseRequest,
    Message,
    Outcome,
    Role,
)
from layerwise.server.training import NOT_FINITE as DROPPED_FOR
from layerwise.server.training import Training
from tests.unit.played_cluster import PlayedCluster, spec

NOT_FINITE = "the loss of microbatch 0:32-40 is not finite: layer 2 is the first; lower the learning rate"


def cluster(num_shards: int = 2) -> PlayedCluster:
    played = PlayedCluster()
    played.add(Role.SHARD, *(f"shard-{index}" for index in range(num_shards)))
    played.add(Role.FORWARD, "forward-0")
    return played


def trained(played: PlayedCluster, num_leases: int, **train: object) -> str:
    """A job that holds all leases back after so many."""
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN and len(played.leases) >= num_leases
    return played.submit(spec(train={"on_divergence": "rollback", **train}))


def diverge(played: PlayedCluster, job: str, shard: str = "shard-1") -> None:
    life = played.blocks[shard].place.life
    played.say(shard, Failure(job=job, message=NOT_FINITE, diverged=life))


def go_on(played: PlayedCluster) -> None:
    played.hold = lambda worker, lease: False
    played.play_held()


def courses(played: PlayedCluster) -> list[tuple[int, int, float, int]]:
    """What the shards were assigned: cut, and the course."""
    return [
        (one.cut, one.course.version, one.course.rate_factor, one.course.synchronous_until)
        for name, one in played.sent
        if isinstance(one, Assignment) and name.startswith("shard")
    ]


def test_all_layers_go_back_in_new_lives_at_half_the_rate() -> None:
    played = cluster()
    job = trained(played, 24)
    before = played.role.job(job)
    assert [one["version"] for one in before["cuts"]] == [4]
    diverge(played, job)
    document = played.role.job(job)
    [rollback] = document["rollbacks"]
    # The cut at version 4 is too young to be from before the rise for sure.
    assert (rollback["version"], rollback["rate_factor"], rollback["synchronous_until"]) == (0, 0.5, 10)
    assert rollback["why"] == "the loss of microbatch 0:32-40 is not finite: layer 2 is the first"
    assert document["cuts"] == []
    assert courses(played)[-2:] == [(0, 0, 0.5, 10)] * 2
    assert min(one["life"] for one in document["blocks"]) > max(one["life"] for one in before["blocks"])
    assert "synchronously until version 10" in document["message"]
    warnings = [one.message for one in played.role.events(job, 0) if one.level == "warning"]
    assert any("all layers go back from version 4 to 0" in one for one in warnings)
    go_on(played)
    document = played.role.job(job)
    assert (document["state"], document["ledger"]["samples_applied"]) == ("done", 80)


def test_what_an_older_life_says_of_divergence_is_not_heard() -> None:
    played = cluster()
    job = trained(played, 24)
    diverge(played, job)
    for life in (1, 2):  # both blocks are in later lives by now
        played.say("shard-1", Failure(job=job, message=NOT_FINITE, diverged=life))
    assert len(played.role.job(job)["rollbacks"]) == 1


def test_a_third_divergence_fails_the_job() -> None:
    played = cluster()
    job = trained(played, 8)
    for _ in range(2):
        diverge(played, job)
        assert played.state(job) == "running"
    diverge(played, job)
    document = played.role.job(job)
    assert document["state"] == "failed"
    assert "diverges again, synchronously and with 0.25 of its learning rate: the loss of" in document["message"]


@pytest.mark.parametrize("policy", ["stop", "ignore"])
def test_without_rollback_a_loss_that_is_not_finite_fails_the_job(policy: str) -> None:
    played = cluster()
    job = trained(played, 8, on_divergence=policy)
    diverge(played, job)
    assert played.state(job) == "failed"


def tell_of_drops(played: PlayedCluster, job: str, first: int, last: int) -> None:
    """The first shard's last words of a route: microbatches were dropped, for their losses are not finite."""
    plan = played.jobs[job].plan
    closed = tuple(
        AttemptClosed(
            attempt=Attempt(plan.microbatch(index), 1),
            number=100 + index,
            outcome=Outcome.DROPPED,
            loss=None,
            reason=f"{DROPPED_FOR}: layer 2 is the first",
        )
        for index in range(first, last)
    )
    played.say("shard-0", AttemptsClosed(job=job, closed=closed, active_seconds=100.0))


def test_what_a_rollback_takes_back_is_not_counted_though_it_is_told_late() -> None:
    played = cluster()
    job = trained(played, 24)
    played.kill("shard-1")
    diverge(played, job, "shard-0")  # all go back once there is a second shard
    tell_of_drops(played, job, 24, 26)
    assert played.role.runs[job].record.drops == ()
    played.silent.add("shard-0")
    played.add(Role.SHARD, "shard-1")
    tell_of_drops(played, job, 26, 28)  # it has not heard yet that its layers are to be restored
    assert played.role.runs[job].record.drops == ()
    played.wake("shard-0")
    go_on(played)
    assert played.role.job(job)["ledger"]["samples_applied"] == 80


def test_a_divergence_that_shows_while_the_route_changes_is_answered() -> None:
    played = cluster()
    job = trained(played, 24, max_dropped=1.0)
    played.kill("shard-1")
    tell_of_drops(played, job, 24, 36)
    assert played.role.job(job)["rollbacks"] == []
    played.add(Role.SHARD, "shard-1")
    assert len(played.role.job(job)["rollbacks"]) == 1
    go_on(played)
    assert played.role.job(job)["ledger"]["samples_applied"] == 80


def test_a_rollback_waits_for_a_shard_that_is_lost() -> None:
    played = cluster()
    job = trained(played, 24)
    played.kill("shard-0")
    diverge(played, job)
    assert played.role.job(job)["rollbacks"] == []
    played.add(Role.SHARD, "shard-0")
    document = played.role.job(job)
    assert len(document["rollbacks"]) == 1
    assert courses(played)[-2:] == [(0, 0, 0.5, 10)] * 2
    go_on(played)
    assert played.state(job) == "done"


def test_a_run_that_goes_back_from_its_last_cut_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated seed 2965: with everything closed and saved, the next message of anybody ended the job."""
    played = cluster()
    monkeypatch.setattr(Training, "_all_reported", lambda training: False)
    job = played.submit(spec(train={"on_divergence": "rollback"}))
    document = played.role.job(job)
    assert (document["state"], document["ledger"]["samples_applied"]) == ("running", 80)
    played.silent = {"shard-0", "shard-1"}
    diverge(played, job)
    monkeypatch.undo()
    played.say("forward-0", LeaseRequest(job=job, count=1))
    assert played.state(job) == "running"
    played.wake("shard-0", "shard-1")
    assert played.state(job) == "done"
    assert len(played.role.job(job)["rollbacks"]) == 1


def test_the_course_is_remembered_by_a_restarted_coordinator_and_by_a_resume() -> None:
    played = cluster()
    job = trained(played, 24)
    diverge(played, job)
    played.restart_coordinator()
    played.come_back("shard-0", "shard-1", "forward-0")
    played.kill("shard-1")
    played.add(Role.SHARD, "shard-1")
    assert courses(played)[-1] == (0, 0, 0.5, 10)
    played.cancel(job)
    go_on(played)
    played.resume(job)
    go_on(played)
    assert played.state(job) == "done"
    assert {course[2] for course in courses(played)[-2:]} == {0.5}
    assert len(played.role.job(job)["rollbacks"]) == 1


def test_drops_for_losses_that_are_not_finite_are_forgiven_and_torn_files_are_not() -> None:
    played = cluster()
    job = trained(played, 8)
    record = played.role.record(job)
    torn = {"epoch": 0, "start": 40, "stop": 48, "reason": "the file is torn", "missing_from": None}
    spoilt = {"epoch": 0, "start": 48, "stop": 56, "reason": "its loss is not finite (nan)", "missing_from": None}
    run = played.role.runs[job]
    run.record = replace(record, drops=(torn, spoilt))
    diverge(played, job)
    assert played.role.record(job).drops == (torn,)
    assert json.loads(played.role.record(job).spec_json)["train"]["on_divergence"] == "rollback"


def test_a_cut_that_a_commit_under_way_deletes_is_not_gone_back_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated seed 6728: the commit was answered to nobody, and a later rollback chose what it had deleted."""
    played, play, asked = cluster(), PlayedCluster._play, list[CommitCut]()

    def answer(self: PlayedCluster, name: str, message: Message) -> None:
        if isinstance(message, CommitCut) and message.version > 4:
            asked.append(message)
        else:
            play(self, name, message)

    monkeypatch.setattr(PlayedCluster, "_play", answer)
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN and len(played.leases) >= 32
    job = played.submit(spec(checkpoint={"every": 2, "keep": 2}))
    assert [cut["version"] for cut in played.role.job(job)["cuts"]] == [4]
    assert [(commit.version, commit.keep) for commit in asked] == [(6, (4, 6))]
    played.kill("shard-1")
    played.add(Role.SHARD, "shard-1")
    assert [cut["version"] for cut in played.role.job(job)["cuts"]] == [4]
