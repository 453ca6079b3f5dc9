from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from layerwise.errors import ConfigError, CorruptError, DeadlineError, NotFoundError, RetryableError
from layerwise.fault_points import Operation, points
from layerwise.messages import Role
from layerwise.server.job_record import CutRecord, JobEvent, JobRecord, JobState, PlacementRecord
from layerwise.server.job_store import FILE, SqliteJobStore, _may_pass
from layerwise.server.memory_store import JobStore, MemoryJobStore

RECORD = JobRecord(
    job="toy-1",
    number=3,
    name="toy",
    state=JobState.RUNNING,
    spec_json='{"name":"toy"}',
    directory="/runs/toy",
    created=10.5,
    started=11.0,
    message="training",
    warnings=("sgd is risky",),
    settings_json="{}",
    profile_json="{}",
    blocks=((0, 2), (2, 4)),
    next_life=3,
    resume_count=1,
    num_events=2,
    cuts=(CutRecord(version=4, time=12.0, num_bytes=400, ledger={"samples_applied": 32}),),
    placement=(
        PlacementRecord(process="forward-0", role=Role.FORWARD, block=-1),
        PlacementRecord(process="shard-0", role=Role.SHARD, block=0, start=0, stop=2, life=1),
    ),
    evaluations=({"version": 4, "seconds": 0.5, "loss": 0.25},),
    moving=True,
    drops=({"epoch": 0, "start": 8, "stop": 12, "reason": "a torn file", "missing_from": None},),
    rollbacks=({"version": 4, "rate_factor": 0.5, "synchronous_until": 60},),
    document={"steps": 5},
)
EVENTS = tuple(
    JobEvent(sequence=sequence, time=10.0 + sequence, level="info", message=f"event {sequence}", fields={"n": sequence})
    for sequence in range(2)
)


def fill(store: JobStore) -> None:
    store.put(RECORD)
    for event in EVENTS:
        store.add_event("toy-1", event)


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[JobStore]:
    if request.param == "memory":
        yield MemoryJobStore()
        return
    sqlite = SqliteJobStore(tmp_path)
    yield sqlite
    sqlite.close()


def test_what_was_put_is_loaded_whole(store: JobStore) -> None:
    fill(store)
    assert store.load() == (RECORD,)


def test_drained_nodes_are_those_that_were_put_last(store: JobStore) -> None:
    assert store.drained() == frozenset()
    store.put_drained(frozenset({"a", "b"}))
    store.put_drained(frozenset({"b"}))
    assert store.drained() == {"b"}


def test_a_later_put_replaces_cuts_placement_and_state(store: JobStore) -> None:
    fill(store)
    later = replace(
        RECORD,
        state=JobState.DONE,
        finished=20.0,
        placement=(),
        cuts=(CutRecord(version=8, time=13.0, num_bytes=400),),
    )
    store.put(later)
    assert store.load() == (later,)


def test_events_are_read_from_an_offset_up_to_a_limit(store: JobStore) -> None:
    fill(store)
    assert store.events("toy-1", 0, 10) == EVENTS
    assert store.events("toy-1", 1, 10) == EVENTS[1:]
    assert store.events("toy-1", 0, 1) == EVENTS[:1]
    with pytest.raises(NotFoundError):
        store.events("toy-2", 0, 1)


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    first = SqliteJobStore(tmp_path)
    fill(first)
    first.close()
    second = SqliteJobStore(tmp_path)
    assert second.load() == (RECORD,)
    assert second.events("toy-1", 0, 10) == EVENTS
    second.close()


def test_the_number_of_events_is_what_the_log_says_whatever_the_record_said(tmp_path: Path) -> None:
    store = SqliteJobStore(tmp_path)
    fill(store)
    store.add_event("toy-1", replace(EVENTS[1], sequence=2))
    assert store.load()[0].num_events == 3
    store.close()


def test_every_life_ever_given_stays_on_record(tmp_path: Path) -> None:
    store = SqliteJobStore(tmp_path)
    store.put(RECORD)
    store.put(replace(RECORD, placement=(replace(RECORD.placement[1], process="shard-9", life=3),)))
    store.close()
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        assert connection.execute("SELECT life, process FROM lives").fetchall() == [(1, "shard-0"), (3, "shard-9")]


def test_a_store_of_a_newer_layerwise_is_refused_and_left_alone(tmp_path: Path) -> None:
    SqliteJobStore(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute("PRAGMA user_version = 99")
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(ConfigError, match="has schema 99, and this layerwise knows up to 3"):
        SqliteJobStore(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"not a database, but long enough to be read as one" * 20)
    with pytest.raises(CorruptError, match="can't be used as a job store"):
        SqliteJobStore(tmp_path)


def test_a_folder_that_cannot_be_made_is_a_mistake_of_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--state"):
        SqliteJobStore(tmp_path / "file" / "state")


def test_a_write_that_fails_is_told_to_everybody_who_comes_after(tmp_path: Path) -> None:
    store = SqliteJobStore(tmp_path)
    store.add_event("no such job", EVENTS[0])
    with pytest.raises(Exception, match="can't be written: FOREIGN KEY"):
        store.flush()
    with pytest.raises(Exception, match="can't be written"):
        store.put(RECORD)
    store.close()


def test_the_tables_are_strict(tmp_path: Path) -> None:
    SqliteJobStore(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        tables = connection.execute(
            "SELECT name, strict FROM pragma_table_list WHERE schema = 'main' AND type = 'table'"
        )
        strict = {name: flag for name, flag in tables if not name.startswith("sqlite_")}
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert strict == {"jobs": 1, "events": 1, "cuts": 1, "placement": 1, "lives": 1, "drained": 1}


def test_a_commit_waits_for_the_disk_and_so_does_the_name_of_a_new_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's own syncs can't be watched from here; that it is told to make one at each commit can."""
    seen: list[str] = []
    monkeypatch.setattr(points, "watcher", Watching(seen))
    store = SqliteJobStore(tmp_path / "new" / "state")
    with closing(store._open()) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
    assert seen == [
        f"make-folder {tmp_path}/new",
        f"sync-folder {tmp_path}",
        f"make-folder {tmp_path}/new/state",
        f"sync-folder {tmp_path}/new",
        f"sync-folder {tmp_path}/new/state",
    ]
    store.close()


class Watching:
    """A watcher that notes what happens to the store's folders."""

    def __init__(self, seen: list[str]) -> None:
        self._seen = seen

    def before(self, operation: Operation) -> None:
        pass

    def after(self, operation: Operation) -> None:
        if "folder" in operation.kind:
            self._seen.append(f"{operation.kind} {operation.path}")


def test_a_write_that_can_never_succeed_does_not_let_anybody_wait(tmp_path: Path) -> None:
    store = SqliteJobStore(tmp_path)
    store.put(replace(RECORD, document={"steps": object()}))
    with pytest.raises(Exception, match=r"can't be written: .*not JSON serializable"):
        store.flush()
    store.close()


class Refusals:
    """A watcher that refuses the store's commits until told otherwise, and says when each was tried."""

    def __init__(self) -> None:
        self.refuses = True
        self.tried = threading.Semaphore(0)

    def before(self, operation: Operation) -> None:
        if operation.point == "job-store.commit":
            self.tried.release()
            if self.refuses:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), operation.path)

    def after(self, operation: Operation) -> None:
        pass


def test_what_a_full_disk_refuses_is_written_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = Refusals()
    monkeypatch.setattr(points, "watcher", refusals)
    store = SqliteJobStore(tmp_path, retry_seconds=0.001)
    store.put(RECORD)
    for _ in range(3):
        assert refusals.tried.acquire(timeout=60)
    monkeypatch.setattr("layerwise.server.job_store.FLUSH_SECONDS", 0.01)
    with pytest.raises(DeadlineError, match=r"did not take what was written within 0\.01 s: .*No space left on device"):
        store.flush()
    monkeypatch.setattr("layerwise.server.job_store.FLUSH_SECONDS", 60.0)
    store.add_event(RECORD.job, JobEvent(sequence=0, time=1.0, level="info", message="meanwhile"))
    refusals.refuses = False
    assert [one.job for one in store.load()] == [RECORD.job]
    assert [event.message for event in store.events(RECORD.job, 0, 9)] == ["meanwhile"]
    store.close()


def test_a_store_that_is_closed_on_a_full_disk_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = Refusals()
    monkeypatch.setattr(points, "watcher", refusals)
    store = SqliteJobStore(tmp_path, retry_seconds=1e6)
    store.put(RECORD)
    assert refusals.tried.acquire(timeout=60)
    store.close()
    with pytest.raises(RetryableError, match="No space left on device"):
        store.put(RECORD)


def test_a_full_database_is_tried_again(tmp_path: Path) -> None:
    """SQLite's own limit on the file, which it reports as it reports a full disk."""
    assert _may_pass(_full(tmp_path))
    assert not _may_pass(sqlite3.IntegrityError("another"))


def _full(folder: Path) -> sqlite3.Error:
    with closing(sqlite3.connect(folder / "small", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE t (x)")
        connection.execute("PRAGMA max_page_count = 3")
        try:
            connection.execute("INSERT INTO t VALUES (zeroblob(100000))")
        except sqlite3.Error as error:
            return error
    raise AssertionError("it fits")
