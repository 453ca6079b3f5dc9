"""The job store on disk: SQLite in WAL mode, written by a thread of its own in batches."""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from layerwise import disk
from layerwise.errors import ConfigError, CorruptError, DeadlineError, NotFoundError, RetryableError
from layerwise.fault_points import Operation, points
from layerwise.messages import Role
from layerwise.server.job_record import CutRecord, JobEvent, JobRecord, JobState, PlacementRecord
from layerwise.server.waiting_writes import Batch, WaitingWrites, Write
from layerwise.threads import VitalThread

FILE = "jobs.sqlite3"
MAX_WAITING = 10_000
"""Lines of jobs' logs that may wait for the disk; more are dropped. Of each job the newest record waits, whatever happens."""
FLUSH_SECONDS = 30.0
BUSY_SECONDS = 10.0
RETRY_SECONDS = 1.0
_PASSING = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_BUSY,
}
"""Errors of SQLite that are the disk's, which may have room again or be writable again later."""

log = logging.getLogger(__name__)

MIGRATIONS = (
    """
    CREATE TABLE jobs (
        job TEXT PRIMARY KEY, number INTEGER NOT NULL, name TEXT NOT NULL, state TEXT NOT NULL, message TEXT NOT NULL,
        warnings TEXT NOT NULL, created REAL NOT NULL, started REAL, finished REAL, directory TEXT NOT NULL,
        spec TEXT NOT NULL, settings TEXT NOT NULL, profile TEXT NOT NULL, blocks TEXT NOT NULL,
        next_life INTEGER NOT NULL, resume_count INTEGER NOT NULL, evaluations TEXT NOT NULL, document TEXT NOT NULL
    ) STRICT;
    CREATE TABLE events (
        job TEXT NOT NULL REFERENCES jobs (job) ON DELETE CASCADE, sequence INTEGER NOT NULL, time REAL NOT NULL,
        level TEXT NOT NULL, message TEXT NOT NULL, fields TEXT NOT NULL, PRIMARY KEY (job, sequence)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE cuts (
        job TEXT NOT NULL REFERENCES jobs (job) ON DELETE CASCADE, version INTEGER NOT NULL, time REAL NOT NULL,
        num_bytes INTEGER NOT NULL, ledger TEXT NOT NULL, PRIMARY KEY (job, version)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE placement (
        job TEXT NOT NULL REFERENCES jobs (job) ON DELETE CASCADE, process TEXT NOT NULL, role TEXT NOT NULL,
        block INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL, life INTEGER NOT NULL,
        PRIMARY KEY (job, process)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE lives (
        job TEXT NOT NULL REFERENCES jobs (job) ON DELETE CASCADE, life INTEGER NOT NULL, process TEXT NOT NULL,
        block INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL, PRIMARY KEY (job, life)
    ) STRICT, WITHOUT ROWID;
    """,
    """
    ALTER TABLE jobs ADD COLUMN drops TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE jobs ADD COLUMN rollbacks TEXT NOT NULL DEFAULT '[]';
    """,
    """
    ALTER TABLE jobs ADD COLUMN moving INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE drained (node TEXT PRIMARY KEY) STRICT;
    """,
)
"""``MIGRATIONS[v]`` takes a store from schema ``v`` to ``v + 1``; ``PRAGMA user_version`` says which one it has."""


class SqliteJobStore:
    """A `JobStore` in ``folder``. Writes return at once, always; a thread takes what has gathered to disk in one transaction.

    Any thread may call it. After `flush` everything before it is on disk, also after a power cut: each batch costs a sync.
    While the disk is full or refuses, writes gather
    and are tried again every ``retry_seconds``: jobs go on meanwhile, and only who waits for `flush` hears of it.
    What waits is bounded: of the lines of logs that are too many, the newest are lost, with a warning.

    Raises:
        ConfigError: the folder can't be used, or a newer layerwise wrote the store.
        CorruptError: the file is not a job store.
        RetryableError: the disk is full, or refuses.
    """

    def __init__(self, folder: str | Path, *, retry_seconds: float = RETRY_SECONDS) -> None:
        self._path = Path(folder) / FILE
        self._retry_seconds = retry_seconds
        try:
            disk.make_folder(self._path.parent, "job-store")
            with closing(self._open()) as connection:
                self._migrate(connection)
            disk.sync_folder(self._path.parent, "job-store")
        except OSError as error:
            raise ConfigError(f"--state {folder}: the folder can't be used: {error.strerror}") from error
        except sqlite3.DatabaseError as error:
            if _may_pass(error):
                raise RetryableError(f"the job store {self._path} can't be opened: {error}; make room there") from error
            raise CorruptError(f"{self._path} can't be used as a job store: {error}") from error
        self._error: Exception | None = None
        self._problem = ""
        self._closing = threading.Event()
        self._waiting = WaitingWrites(MAX_WAITING)
        self._thread = VitalThread(target=self._write_all, name="layerwise-job-store", daemon=True)
        self._thread.start()

    # Reading ---------------------------------------------------------------------------------------------------------

    def load(self) -> tuple[JobRecord, ...]:
        """All jobs, oldest first."""
        self.flush()
        with closing(self._open()) as connection:
            rows = connection.execute("SELECT * FROM jobs ORDER BY created, number").fetchall()
            return tuple(self._record(connection, row) for row in rows)

    def events(self, job: str, offset: int, limit: int) -> tuple[JobEvent, ...]:
        """At most ``limit`` events from sequence ``offset`` on; ``NotFoundError`` when there is no such job."""
        self.flush()
        with closing(self._open()) as connection:
            if connection.execute("SELECT 1 FROM jobs WHERE job = ?", (job,)).fetchone() is None:
                raise NotFoundError(f"no job {job!r} here")
            rows = connection.execute(
                "SELECT * FROM events WHERE job = ? AND sequence >= ? ORDER BY sequence LIMIT ?",
                (job, offset, limit),
            ).fetchall()
        return tuple(
            JobEvent(
                sequence=row["sequence"],
                time=row["time"],
                level=row["level"],
                message=row["message"],
                fields=json.loads(row["fields"]),
            )
            for row in rows
        )

    def drained(self) -> frozenset[str]:
        """The nodes that get no new work."""
        self.flush()
        with closing(self._open()) as connection:
            return frozenset(row["node"] for row in connection.execute("SELECT node FROM drained"))

    # Writing ---------------------------------------------------------------------------------------------------------

    def put(self, record: JobRecord) -> None:
        """Write a job, its durable cuts and its placement."""
        # All lives ever given stay on record, so a newer record takes the place of one that waits only if it has the same.
        self._enqueue(lambda connection: _put(connection, record), key=f"job {record.job}", variant=_lives(record))

    def add_event(self, job: str, event: JobEvent) -> None:
        """Append to a job's log."""
        values = (job, event.sequence, event.time, event.level, event.message, _json(dict(event.fields)))

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO events VALUES (?, ?, ?, ?, ?, ?)", values)

        self._enqueue(write)

    def put_drained(self, nodes: frozenset[str]) -> None:
        """Write which nodes get no new work."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM drained")
            connection.executemany("INSERT INTO drained VALUES (?)", [(node,) for node in sorted(nodes)])

        self._enqueue(write, key="drained")

    @property
    def num_waiting(self) -> int:
        """Writes that wait for the disk."""
        return len(self._waiting)

    def flush(self) -> None:
        """Wait until everything written so far is on disk.

        Raises:
            DeadlineError: the disk takes too long.
            RetryableError: a write failed; nothing after it was written.
        """
        written = threading.Event()
        self._check()
        self._waiting.tell(written.set)
        if not written.wait(FLUSH_SECONDS):
            why = f": {self._problem}" if self._problem else ""
            raise DeadlineError(
                f"the job store {self._path} did not take what was written within {FLUSH_SECONDS:g} s{why}"
            )
        self._check()

    def tell(self, hear: Callable[[Exception | None], None]) -> None:
        """Call ``hear`` when everything written so far is on disk, or with the error for which it never will be; on another thread.

        Raises:
            RetryableError: a write failed; nothing after it was written.
        """
        self._check()
        self._waiting.tell(lambda: hear(self._error))

    def close(self) -> None:
        """Write what waits, end the thread."""
        self._closing.set()
        self._waiting.close()
        self._thread.join()

    # Inside ----------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _enqueue(self, write: Write, *, key: str = "", variant: str = "") -> None:
        self._check()
        if not self._waiting.put(write, key=key, variant=variant) and self._waiting.num_dropped == 1:
            log.warning("the job store %s: %d lines wait for the disk; newer ones are lost", self._path, MAX_WAITING)

    def _write_all(self) -> None:
        with closing(self._open()) as connection:
            ended = False
            while not ended:
                batch = self._waiting.take()
                ended = batch.last
                self._write_batch(connection, batch)

    def _write_batch(self, connection: sqlite3.Connection, batch: Batch) -> None:
        """One transaction, tried until the disk takes it; on any other error the store takes nothing more.

        Then everybody who asks hears why.
        """
        while self._error is None:
            try:
                self._commit(connection, batch)
            except Exception as error:  # whatever it is: a thread that ended unheard would let everybody wait
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                if _may_pass(error) and self._wait_for_the_disk(error):
                    continue
                self._error = RetryableError(
                    f"the job store {self._path} can't be written: {error}; free the disk and start the coordinator "
                    "again"
                )
                self._error.__cause__ = error
            else:
                self._problem = ""
                if lost := self._waiting.take_dropped():
                    log.warning("the job store %s: %d lines of jobs' logs were lost meanwhile", self._path, lost)
                break
        for hear in batch.heard_by:
            hear()

    def _commit(self, connection: sqlite3.Connection, batch: Batch) -> None:
        self._point("begin")
        connection.execute("BEGIN IMMEDIATE")
        for write in batch.writes:
            write(connection)
        self._point("commit")
        connection.execute("COMMIT")
        self._point("committed")

    def _wait_for_the_disk(self, error: Exception) -> bool:
        """Wait a little before the next try; False when the store is being closed."""
        if not self._problem:
            log.warning("the job store %s can't be written: %s; it is tried again until it can", self._path, error)
        self._problem = str(error)
        return not self._closing.wait(self._retry_seconds)

    def _point(self, kind: str) -> None:
        """SQLite writes by itself; faults can be planned around its transactions."""
        if points.watcher is not None:
            points.watcher.before(Operation(what="job-store", kind=kind, path=str(self._path)))

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None)
        connection.row_factory = sqlite3.Row
        # FULL: else a commit is on the disk at the next checkpoint only, and a power cut takes back what `flush` has promised.
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    def _migrate(self, connection: sqlite3.Connection) -> None:
        schema = connection.execute("PRAGMA user_version").fetchone()[0]
        if schema > len(MIGRATIONS):
            raise ConfigError(
                f"{self._path} has schema {schema}, and this layerwise knows up to {len(MIGRATIONS)}: "
                "a newer one wrote it; use that one, or another --state folder"
            )
        for number in range(schema, len(MIGRATIONS)):
            connection.executescript(f"BEGIN; {MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;")

    def _record(self, connection: sqlite3.Connection, row: sqlite3.Row) -> JobRecord:
        job = (row["job"],)
        cuts = connection.execute("SELECT * FROM cuts WHERE job = ? ORDER BY version", job).fetchall()
        places = connection.execute("SELECT * FROM placement WHERE job = ? ORDER BY block, process", job).fetchall()
        last = connection.execute("SELECT max(sequence) FROM events WHERE job = ?", job).fetchone()[0]
        return JobRecord(
            job=row["job"],
            number=row["number"],
            name=row["name"],
            state=JobState(row["state"]),
            message=row["message"],
            warnings=tuple(json.loads(row["warnings"])),
            created=row["created"],
            started=row["started"],
            finished=row["finished"],
            directory=row["directory"],
            spec_json=row["spec"],
            settings_json=row["settings"],
            profile_json=row["profile"],
            blocks=tuple((start, stop) for start, stop in json.loads(row["blocks"])),
            next_life=row["next_life"],
            resume_count=row["resume_count"],
            num_events=0 if last is None else last + 1,
            cuts=tuple(
                CutRecord(
                    version=cut["version"],
                    time=cut["time"],
                    num_bytes=cut["num_bytes"],
                    ledger=json.loads(cut["ledger"]),
                )
                for cut in cuts
            ),
            placement=tuple(
                PlacementRecord(
                    process=one["process"],
                    role=Role(one["role"]),
                    block=one["block"],
                    start=one["start"],
                    stop=one["stop"],
                    life=one["life"],
                )
                for one in places
            ),
            evaluations=tuple(json.loads(row["evaluations"])),
            drops=tuple(json.loads(row["drops"])),
            rollbacks=tuple(json.loads(row["rollbacks"])),
            moving=bool(row["moving"]),
            document=json.loads(row["document"]),
        )


def _may_pass(error: Exception) -> bool:
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", 0) & 0xFF in _PASSING  # the low byte of an extended code
    return isinstance(error, OSError)


def _put(connection: sqlite3.Connection, record: JobRecord) -> None:
    row: dict[str, Any] = {
        "job": record.job,
        "number": record.number,
        "name": record.name,
        "state": str(record.state),
        "message": record.message,
        "warnings": _json(record.warnings),
        "created": record.created,
        "started": record.started,
        "finished": record.finished,
        "directory": record.directory,
        "spec": record.spec_json,
        "settings": record.settings_json,
        "profile": record.profile_json,
        "blocks": _json(record.blocks),
        "next_life": record.next_life,
        "resume_count": record.resume_count,
        "evaluations": _json([dict(one) for one in record.evaluations]),
        "drops": _json([dict(one) for one in record.drops]),
        "rollbacks": _json([dict(one) for one in record.rollbacks]),
        "moving": int(record.moving),
        "document": _json(dict(record.document)),
    }
    updates = ", ".join(f"{name} = excluded.{name}" for name in row if name != "job")
    connection.execute(
        f"INSERT INTO jobs ({', '.join(row)}) VALUES ({', '.join(f':{name}' for name in row)}) "
        f"ON CONFLICT (job) DO UPDATE SET {updates}",
        row,
    )
    connection.execute("DELETE FROM cuts WHERE job = ?", (record.job,))
    connection.executemany(
        "INSERT INTO cuts VALUES (?, ?, ?, ?, ?)",
        [(record.job, cut.version, cut.time, cut.num_bytes, _json(dict(cut.ledger))) for cut in record.cuts],
    )
    connection.execute("DELETE FROM placement WHERE job = ?", (record.job,))
    connection.executemany(
        "INSERT INTO placement VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (record.job, one.process, str(one.role), one.block, one.start, one.stop, one.life)
            for one in record.placement
        ],
    )
    connection.executemany(
        "INSERT OR REPLACE INTO lives VALUES (?, ?, ?, ?, ?, ?)",
        [
            (record.job, one.life, one.process, one.block, one.start, one.stop)
            for one in record.placement
            if one.role is Role.SHARD
        ],
    )


def _lives(record: JobRecord) -> str:
    return str(sorted((one.life, one.process) for one in record.placement if one.role is Role.SHARD))


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
