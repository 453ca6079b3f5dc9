"""A run whose blocks have standby copies, and which loses shards."""

from __future__ import annotations

import pytest

from layerwise.messages import Assignment, CutDurable, Failure, Role
from tests.unit.test_run_recovery import ACCUMULATE, check_done, cluster, go_on, log, run_until, sent

BEFORE = 20
"""Microbatches of the first five updates; the cut at version 4 is durable then."""


def test_a_lost_block_begins_at_the_copy_that_is_newer_than_the_durable_cut() -> None:
    played = cluster()
    job = run_until(played, BEFORE, **ACCUMULATE)
    assert played.stand_by("shard-1", "shard-0") == 5
    assert [block["standby_version"] for block in played.role.job(job)["blocks"]] == [0, 5]
    played.kill("shard-1")
    played.sent.clear()
    played.add(Role.SHARD, "shard-1")
    ((_, assignment),) = sent(played, Assignment)
    assert (assignment.block, assignment.cut) == (1, 5)
    source = assignment.standby
    assert (source.holder, source.life, [file.layer for file in source.files]) == ("shard-0", 2, [2, 3])
    assert source.address == assignment.route[0].address
    assert [one.version for _, one in sent(played, CutDurable)] == [4], "nothing waits for a cut that never comes"
    go_on(played)
    check_done(played, job)
    (made,) = played.role.job(job)["recoveries"]
    assert (made["block"], made["cut"], made["rewind"]) == (1, 5, 0)
    lines = log(played, job)
    assert "assigning block 1 at version 5, from its copy in the memory of shard-0" in lines


def test_an_older_copy_than_the_durable_cut_is_not_used() -> None:
    played = cluster()
    job = run_until(played, 12, **ACCUMULATE)
    played.stand_by("shard-1", "shard-0")
    played.hold = lambda worker, lease: len(played.leases) >= BEFORE
    played.play_held()
    played.kill("shard-1")
    played.sent.clear()
    played.add(Role.SHARD, "shard-1")
    ((_, assignment),) = sent(played, Assignment)
    assert (assignment.cut, assignment.standby.holder) == (4, "")
    go_on(played)
    check_done(played, job)


@pytest.mark.parametrize("name", ["shard-0", "shard-1"])
def test_a_copy_whose_keeper_is_lost_too_does_not_count(name: str) -> None:
    """Block 1 was copied into the memory of shard-0: it matters who dies."""
    played = cluster()
    job = run_until(played, BEFORE, **ACCUMULATE)
    played.stand_by("shard-1", "shard-0")
    played.kill(name)
    played.kill("shard-0" if name == "shard-1" else "shard-1")
    played.sent.clear()
    played.add(Role.SHARD, "shard-0", "shard-1")
    assert {(one.cut, one.standby.holder) for _, one in sent(played, Assignment)} == {(4, "")}
    go_on(played)
    check_done(played, job)


def test_a_copy_that_can_not_be_had_is_given_up_for_the_cut() -> None:
    played = cluster()
    job = run_until(played, BEFORE, **ACCUMULATE)
    played.stand_by("shard-1", "shard-0")
    played.kill("shard-1")
    played.silent.add("shard-1")
    played.add(Role.SHARD, "shard-1")
    played.silent.clear()
    played.sent.clear()
    failure = Failure(job=job, message="the standby copy of version 5 can't be fetched from shard-0: gone", standby=5)
    played.say("shard-1", failure)
    ((_, assignment),) = sent(played, Assignment)
    assert (assignment.cut, assignment.standby.holder) == (4, "")
    played.say("shard-1", failure)
    assert len(sent(played, Assignment)) == 1, "said twice"
    go_on(played)
    check_done(played, job)
    assert any(line.endswith("gone; going on from what else there is") for line in log(played, job))


def test_without_a_durable_cut_a_copy_saves_the_block_from_the_beginning() -> None:
    played = cluster()
    job = run_until(played, 8, checkpoint={"every": None}, **ACCUMULATE)
    played.stand_by("shard-0", "shard-1")
    played.kill("shard-0")
    played.sent.clear()
    played.add(Role.SHARD, "shard-0")
    ((_, assignment),) = sent(played, Assignment)
    assert (assignment.block, assignment.cut, assignment.standby.holder) == (0, 2, "shard-1")
    go_on(played)
    check_done(played, job)
