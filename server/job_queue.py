"""The jobs that wait, and what the first of them waits for."""

from __future__ import annotations

from dataclasses import replace

from layerwise.errors import BusyError, NotAllowedError
from layerwise.job import JobSpec, parse_job
from layerwise.server.job_book import JobBook
from layerwise.server.job_record import JobRecord, JobState
from layerwise.server.placement import Shortage
from layerwise.server.resharding import with_shards

MAX_QUEUED = 1000
"""Jobs that may wait at the same time: a script that submits without end must not fill the store."""


class JobQueue:
    """Those jobs of ``book`` that are queued: strictly in the order of submission, so that a large one is not passed for ever.

    ``now`` is unix seconds. Not thread-safe.
    """

    def __init__(self, book: JobBook) -> None:
        self._book = book
        self._next_number = max((record.number for record in book.records.values()), default=0) + 1
        self._waiting_for: dict[str, str] = {}
        self._lacking_since: tuple[str, float] | None = None

    @property
    def first(self) -> JobRecord | None:
        """The job that starts next."""
        return next(iter(self._waiting()), None)

    def places(self) -> dict[str, tuple[int, str]]:
        """By job that waits: its place, 1 for the one that starts next, and what it waits for."""
        places: dict[str, tuple[int, str]] = {}
        for before, record in enumerate(self._waiting()):
            reason = self._waiting_for.get(record.job, "")
            if before:
                reason = f"{before} {'job is' if before == 1 else 'jobs are'} before it"
            places[record.job] = (before + 1, reason)
        return places

    def check_room(self) -> None:
        """``BusyError`` when as many jobs wait as may."""
        waiting = sum(record.state is JobState.QUEUED for record in self._book.records.values())
        if waiting >= MAX_QUEUED:
            raise BusyError(
                f"{waiting} jobs wait already, and at most {MAX_QUEUED} may; submit again when some have ended, or "
                f"cancel some"
            )

    def submit(self, spec: JobSpec, directory: str, now: float) -> str:
        """Put a new job at the end; gives its id. If another job has ``directory``, its own gets a number.

        Raises:
            BusyError: too many jobs wait already.
        """
        self.check_room()
        record = JobRecord(
            job=self._book.new_id(spec.name),
            number=self._take_number(),
            name=spec.name,
            state=JobState.QUEUED,
            spec_json=spec.to_json(),
            directory=self._book.unused_directory(directory),
            created=now,
        )
        self._book.enter(record, spec)
        self._book.note(record.job, "info", f"submitted as {record.job}", now)
        return record.job

    def resume(self, job: str, now: float, *, shards: int = 0) -> None:
        """Put a failed or cancelled job at the end again; on so many ``shards`` (0: as many as before).

        Raises:
            NotFoundError: there is no such job.
            NotAllowedError: it is not over, or it is done.
            ConfigError: it can't be split among so many shards.
            BusyError: too many jobs wait already.
        """
        self.check_room()
        record = self._book.record(job)
        if not record.state.final:
            raise NotAllowedError(f"job {job} is {record.state}; only a failed or cancelled job can be resumed")
        if record.state is JobState.DONE:
            raise NotAllowedError(f"job {job} is done; submit it again, with more steps, to train on")
        record = replace(
            record,
            number=self._take_number(),
            state=JobState.QUEUED,
            message="",
            finished=None,
            resume_count=record.resume_count + 1,
        )
        notes: list[str] = []
        if shards:
            record, notes = with_shards(record, shards)
        spec = parse_job(record.spec_json, source=f"job {job}") if shards else self._book.spec(record)
        cut = record.durable_cut
        what = f"from the cut at version {cut.version}" if cut is not None else "from the beginning"
        self._book.enter(record, spec)
        self._book.note(job, "info", "; ".join((f"resumed {what}", *notes)), now)

    def wait(self, record: JobRecord, spec: JobSpec, shortage: Shortage, now: float) -> bool:
        """The first job lacks processes. False: it waits no more, since not even a whole cluster would do, and that for too long."""
        self._waiting_for = {record.job: shortage.reason}
        if not shortage.lacking:
            self._lacking_since = None
            return True
        if self._lacking_since is None or self._lacking_since[0] != record.job:
            self._lacking_since = (record.job, now)
            self._book.note(record.job, "info", f"waiting: {shortage.reason}", now)
        limit = spec.timeouts.start
        if now - self._lacking_since[1] <= limit:
            return True
        self._lacking_since = None
        message = f"{shortage.reason}, and no more came within {limit:g} s: start them, or ask for fewer in cluster:"
        self._book.close(record, JobState.FAILED, message, "error", now)
        return False

    def end_waiting(self) -> None:
        """No job waits any more."""
        self._waiting_for, self._lacking_since = {}, None

    def excuse(self, seconds: float, now: float) -> None:
        """For so long nobody could present itself: no time limit counts that."""
        if self._lacking_since is not None:
            job, since = self._lacking_since
            self._lacking_since = (job, min(since + seconds, now))

    def _waiting(self) -> list[JobRecord]:
        waiting = (record for record in self._book.records.values() if record.state is JobState.QUEUED)
        return sorted(waiting, key=lambda record: record.number)

    def _take_number(self) -> int:
        number = self._next_number
        self._next_number += 1
        return number
