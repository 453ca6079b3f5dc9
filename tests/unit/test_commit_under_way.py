"""What becomes of a commit that the first shard is at while the route, or the coordinator, changes."""

from __future__ import annotations

import pytest

from layerwise.messages import CommitCut, CutCommitted, LeaseKind, Message, Role
from tests.unit.played_cluster import PlayedCluster, spec
from tests.unit.test_run_recovery import check_done, cluster, go_on, log, run_until


def unanswered(monkeypatch: pytest.MonkeyPatch, version: int) -> list[CommitCut]:
    """The first time that a cut of ``version`` or a later one is to be committed, nobody answers; gives what was asked."""
    play, asked = PlayedCluster._play, list[CommitCut]()

    def answer(self: PlayedCluster, name: str, message: Message) -> None:
        if isinstance(message, CommitCut) and message.version >= version and not asked:
            asked.append(message)
        else:
            play(self, name, message)

    monkeypatch.setattr(PlayedCluster, "_play", answer)
    return asked


def replace_while_committing(played: PlayedCluster, answer: CutCommitted) -> None:
    """Shard 1 is lost and begins anew; before it is ready comes the first shard's answer to the commit of before."""
    played.kill("shard-1")
    played.silent.add("shard-1")
    played.add(Role.SHARD, "shard-1")
    played.say("shard-0", answer)
    played.wake("shard-1")


def test_a_cut_with_a_life_that_was_replaced_meanwhile_is_not_thought_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = unanswered(monkeypatch, 8)
    played = cluster()
    job = run_until(played, 33, checkpoint={"keep": 1})
    assert [one.version for one in asked] == [8]
    replace_while_committing(played, CutCommitted(job=job, version=8))
    # Block 1 began anew at version 4, so its files of version 8 do not count any more.
    assert [cut["version"] for cut in played.role.job(job)["cuts"]] == [4]
    go_on(played)
    check_done(played, job)


def test_a_commit_that_a_new_life_has_spoilt_does_not_cost_the_job_its_last_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = unanswered(monkeypatch, 10)
    played = cluster()
    job = run_until(played, 100)
    assert [one.version for one in asked] == [10]
    replace_while_committing(played, CutCommitted(job=job, version=10, error="layer 2 of life 2 was replaced"))
    go_on(played)
    check_done(played, job)
    assert not any("given up" in line for line in log(played, job))


def test_a_cut_that_a_commit_under_way_deletes_is_forgotten_on_disk_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next coordinator, which never hears of the commit, might go back to what is gone."""
    asked = unanswered(monkeypatch, 6)
    played = cluster()
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN and len(played.leases) >= 32
    job = played.submit(spec(checkpoint={"every": 2, "keep": 2}))
    assert [(one.version, one.keep) for one in asked] == [(6, (4, 6))]
    assert [cut.version for record in played.store.load() for cut in record.cuts] == [4]
    played.restart_coordinator()
    played.come_back("shard-0", "shard-1", "forward-0")
    assert [cut["version"] for cut in played.role.job(job)["cuts"]] == [6, 8]
    go_on(played)
    check_done(played, job)


def test_a_cut_that_could_not_be_committed_leaves_the_older_ones_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = unanswered(monkeypatch, 6)
    played = cluster()
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN and len(played.leases) >= 26
    job = played.submit(spec(checkpoint={"every": 2, "keep": 2}))
    assert [one.version for one in asked] == [6]
    played.say("shard-0", CutCommitted(job=job, version=6, error="no space left on device"))
    assert [cut.version for record in played.store.load() for cut in record.cuts] == [2, 4]
