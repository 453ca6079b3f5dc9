"""What becomes of a commit that the first shard is at while the route, or the coordinator, changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerwise.cuts import durable_cuts
from layerwise.fences import Fence, raise_fence
from layerwise.messages import Assignment, CommitCut, CutCommitted, LeaseKind, Message, Role
from layerwise.roles import Effect
from layerwise.server.adopted_job import look_at_directories
from layerwise.server.coordinator_role import CoordinatorRole
from layerwise.server.held_effects import needs_disk
from layerwise.server.job_record import JobEvent, JobRecord
from layerwise.server.memory_store import MemoryJobStore
from tests.unit.played_cluster import PlayedCluster, spec
from tests.unit.test_adopted_job import write_cut
from tests.unit.test_run_recovery import check_done, cluster, go_on, log, run_until, sent


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


# A store that lags --------------------------------------------------------------------------------------------------


class LaggingStore(MemoryJobStore):
    """Writes that nobody waits for are lost with the power."""

    def __init__(self) -> None:
        super().__init__()
        self._synced: tuple[dict[str, JobRecord], dict[str, list[JobEvent]]] = ({}, {})

    def flush(self) -> None:
        self._synced = (dict(self._jobs), {job: list(events) for job, events in self._events.items()})

    def cut_power(self) -> None:
        jobs, events = self._synced
        self._jobs, self._events = dict(jobs), {job: list(one) for job, one in events.items()}


class LaggingCluster(PlayedCluster):
    """The store has written what the coordinator's shell waits for, and no more; the power ends the coordinator."""

    def __init__(self) -> None:
        self.lagging = LaggingStore()
        super().__init__(self.lagging)
        self.add(Role.SHARD, "shard-0", "shard-1")
        self.add(Role.FORWARD, "forward-0")

    def perform(self, effects: list[Effect]) -> None:
        if any(needs_disk(effect) for effect in effects):
            self.lagging.flush()
        super().perform(effects)

    def restart_coordinator(self) -> None:
        self._inbox.clear()
        self.lagging.cut_power()
        look_at_directories(self.store, self.now)
        self.role = CoordinatorRole(self.store, now=self.now)


def test_what_a_commit_deletes_is_forgotten_on_a_disk_that_lags_before_it_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = unanswered(monkeypatch, 8)
    played = LaggingCluster()
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN and len(played.leases) >= 40
    job = played.submit(spec(checkpoint={"every": 2, "keep": 2}))
    assert [(one.version, one.keep) for one in asked] == [(8, (6, 8))]
    played.restart_coordinator()
    assert [cut["version"] for cut in played.role.job(job)["cuts"]] == [6]


@pytest.mark.parametrize("lost", [("shard-1",), ("shard-0", "shard-1")])
def test_a_block_begins_at_the_newest_cut_on_disk_though_the_record_lags(
    lost: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From an older one, its fence would shut the newer cut out for good."""
    played = LaggingCluster()
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN and len(played.leases) >= 33
    job = played.submit(spec(checkpoint={"every": 4, "keep": 1, "path": str(tmp_path)}))
    for _, commit in sent(played, CommitCut):
        write_cut(tmp_path, commit.version, commit.manifest_json, commit.keep)
    [there] = durable_cuts(tmp_path)[-1:]
    played.restart_coordinator()
    document = played.role.job(job)
    assert (document["state"], [cut["version"] for cut in document["cuts"]][-1]) == ("running", there)
    assert "noted were" in log(played, job)[-2] + log(played, job)[-1]
    for name in lost:
        del played.roles[name]
        played._forget(name)
    played.sent.clear()
    played.come_back(*({"shard-0", "forward-0"} - set(lost)))
    played.add(Role.SHARD, *lost)
    begun = [
        (message.cut, message.route[message.block].life) for name, message in sent(played, Assignment) if name in lost
    ]
    assert [cut for cut, _ in begun] == [there] * len(lost)
    raise_fence(tmp_path, Fence(life=begun[-1][1], start=2, stop=4, version=begun[-1][0]))
    assert durable_cuts(tmp_path)[-1] == there


def test_lives_are_above_those_that_the_directory_knows_though_the_record_lags(tmp_path: Path) -> None:
    played = LaggingCluster()
    played.hold = lambda worker, lease: lease.kind is LeaseKind.TRAIN and len(played.leases) >= 33
    job = played.submit(spec(checkpoint={"every": 4, "keep": 1, "path": str(tmp_path)}))
    for _, commit in sent(played, CommitCut):
        write_cut(tmp_path, commit.version, commit.manifest_json, commit.keep)
    raise_fence(tmp_path, Fence(life=70, start=0, stop=2, version=durable_cuts(tmp_path)[-1]))
    played.restart_coordinator()
    assert played.role.record(job).next_life == 71
