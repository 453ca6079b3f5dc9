"""All jobs that the coordinator knows, and what is written of them into its store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import count

from layerwise.errors import NotFoundError
from layerwise.job import JobSpec, parse_job
from layerwise.server.job_record import JobEvent, JobRecord, JobState
from layerwise.server.memory_store import JobStore
from layerwise.server.run import Run


class JobBook:
    """The record of every job by its id, as ``store`` keeps it or soon will, and its job file as parsed.

    ``now`` is unix seconds. Not thread-safe.
    """

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._records: dict[str, JobRecord] = {record.job: record for record in store.load()}
        self._specs: dict[str, JobSpec] = {}

    # Reading ---------------------------------------------------------------------------------------------------------

    @property
    def records(self) -> Mapping[str, JobRecord]:
        """All jobs by their ids, oldest first."""
        return self._records

    def record(self, job: str) -> JobRecord:
        """What is known of a job; ``NotFoundError`` when there is none."""
        record = self._records.get(job)
        if record is None:
            known = ", ".join(list(self._records)[-5:]) or "none"
            raise NotFoundError(f"no job {job!r} here; the newest are: {known}")
        return record

    def spec(self, record: JobRecord) -> JobSpec:
        """The job file of a job, parsed once."""
        if record.job not in self._specs:
            self._specs[record.job] = parse_job(record.spec_json, source=f"job {record.job}")
        return self._specs[record.job]

    def events(self, job: str, offset: int, limit: int) -> tuple[JobEvent, ...]:
        """At most ``limit`` events of a job from ``offset`` on; ``NotFoundError`` when there is no such job."""
        self.record(job)
        return self._store.events(job, offset, limit)

    def new_id(self, name: str) -> str:
        """An id for one more job of that name."""
        return next(job for number in count(1) if (job := f"{name}-{number}") not in self._records)

    def unused_directory(self, directory: str) -> str:
        """``directory``, with a number if another job has it."""
        used = {record.directory for record in self._records.values()}
        candidates = (directory if number == 1 else f"{directory}-{number}" for number in count(1))
        return next(one for one in candidates if one not in used)

    # Writing ---------------------------------------------------------------------------------------------------------

    def put(self, record: JobRecord) -> None:
        """Write a job; replaces what was known of it."""
        self._records[record.job] = record
        self._store.put(record)

    def enter(self, record: JobRecord, spec: JobSpec) -> None:
        """Write a job whose job file is new here: ``spec``."""
        self._specs[record.job] = spec
        self.put(record)

    def note(self, job: str, level: str, message: str, now: float) -> None:
        """Append a line to a job's log."""
        record = self._records[job]
        self._store.add_event(job, JobEvent(sequence=record.num_events, time=now, level=level, message=message))
        self.put(replace(record, num_events=record.num_events + 1))

    def close(self, record: JobRecord, state: JobState, message: str, level: str, now: float) -> None:
        """A job that no run drives has ended in ``state``; ``message`` says why, in its log as well."""
        self.put(replace(record, state=state, message=message, finished=now))
        self.note(record.job, level, message, now)

    def adopt(self, record: JobRecord, now: float) -> str:
        """Enter a job that only its directory remembers; gives its id. What is known already is the job of that directory.

        If that one has failed or was cancelled, what the directory holds stands: a coordinator that was killed may not have noted the
        last cuts.
        """
        known = next((one for one in self._records.values() if one.directory == record.directory), None)
        if known is None:
            if record.job in self._records:
                record = replace(record, job=self.new_id(record.name))
            self.put(record)
            return record.job
        if known.state.final and known.state is not JobState.DONE:
            fresh = tuple(one for one in record.warnings if one not in known.warnings)
            next_life = max(known.next_life, record.next_life)
            warnings = (*known.warnings, *fresh)
            rollbacks = max(known.rollbacks, record.rollbacks, key=len)
            self.put(replace(known, cuts=record.cuts, next_life=next_life, warnings=warnings, rollbacks=rollbacks))
            for warning in fresh:
                self.note(known.job, "warning", warning, now)
        return known.job

    def follow(self, run: Run) -> None:
        """Take over what a run has noted, and the job as it now is; the store gets that only when it must outlive the coordinator."""
        for event in run.events:
            self._store.add_event(run.job, event)
        run.events.clear()
        known = self._records[run.job]
        if known is not run.record:
            self._records[run.job] = run.record
            if _must_be_stored(known, run.record):
                self._store.put(run.record)


def _must_be_stored(known: JobRecord, record: JobRecord) -> bool:
    return (
        known.state != record.state
        or known.cuts != record.cuts
        or known.next_life != record.next_life
        or known.placement != record.placement
        or known.drops != record.drops
        or known.rollbacks != record.rollbacks
        or known.evaluations != record.evaluations
        or known.moving != record.moving
    )
