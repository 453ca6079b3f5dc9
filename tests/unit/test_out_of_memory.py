"""A process that runs out of memory is replaced like one that was killed, until it is clear that the job will never fit."""

from __future__ import annotations

import pytest

from layerwise.messages import Failure, Lease, LeaseKind, Role
from tests.unit.played_cluster import PlayedCluster, spec

PATIENT = {"heartbeat": 10_000.0, "lease": 5_000.0, "task": 5_000.0}
SENTENCE = "forward pass of 0:0-2 failed in layers 0-1 on shard shard-0: memory ran out (MemoryError)"


def training(num_microbatches: int = 20) -> tuple[PlayedCluster, str]:
    """A job whose first microbatches are closed and whose others are held back."""

    def hold(worker: str, lease: Lease) -> bool:
        return lease.kind is LeaseKind.TRAIN and len(played.leases) >= num_microbatches

    played = PlayedCluster()
    played.add(Role.SHARD, "shard-0", "shard-1")
    played.add(Role.FORWARD, "forward-0")
    played.hold = hold
    return played, played.submit(spec(timeouts=PATIENT))


def run_out(played: PlayedCluster, job: str, name: str) -> None:
    """The process says so, ends, and its supervisor starts it again."""
    role = played.roles[name]
    played.say(name, Failure(job=job, message=SENTENCE, memory=True))
    if name in played.roles:
        played.kill(name)
    played.add(role, name)


def log(played: PlayedCluster, job: str) -> list[str]:
    return [event.message for event in played.role.events(job, 0)]


@pytest.mark.parametrize("name", ["shard-0", "shard-1", "forward-0"])
def test_a_process_without_memory_is_replaced_and_the_job_ends_well(name: str) -> None:
    played, job = training()
    run_out(played, job, name)
    assert played.state(job) == "running"
    assert any(f"{name}" in line and f"was lost ({SENTENCE})" in line for line in log(played, job))
    played.hold = lambda worker, lease: False
    played.play_held()
    document = played.role.job(job)
    assert (document["state"], document["ledger"]["samples_applied"]) == ("done", 80), document["message"]


def test_the_process_that_runs_out_gets_no_work_before_it_has_ended() -> None:
    played, job = training()
    played.say("shard-1", Failure(job=job, message=SENTENCE, memory=True))
    assert {one["name"]: one["state"] for one in played.role.nodes(played.now)}["shard-1"] == "leaving"
    assert "waiting for a shard to take the place of shard-1" in played.role.job(job)["message"]


@pytest.mark.parametrize("name", ["shard-0", "forward-0"])
def test_a_job_that_never_fits_ends_with_a_sentence_that_names_the_memory(name: str) -> None:
    played, job = training()
    for _ in range(6):
        run_out(played, job, name)
        played.wait(1.0)
    assert played.state(job) == "running"
    run_out(played, job, name)
    document = played.role.job(job)
    assert document["state"] == "failed"
    assert document["message"].startswith(
        f"memory ran out 7 times before the next update, the last time in {name}: {SENTENCE}; use a smaller data.batch"
    )
