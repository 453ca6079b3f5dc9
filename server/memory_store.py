"""What a job store does, and one that forgets everything with its process."""

from __future__ import annotations

from typing import Protocol

from layerwise.errors import NotFoundError
from layerwise.server.job_record import JobEvent, JobRecord


class JobStore(Protocol):
    """Keeps jobs and their events. Writes take effect in order: a crash may lose the newest, never some between."""

    def load(self) -> tuple[JobRecord, ...]:
        """All jobs, oldest first."""
        ...

    def put(self, record: JobRecord) -> None:
        """Write a job, its durable cuts and its placement; replaces what was known of it."""
        ...

    def add_event(self, job: str, event: JobEvent) -> None:
        """Append to a job's log."""
        ...

    def events(self, job: str, offset: int, limit: int) -> tuple[JobEvent, ...]:
        """At most ``limit`` events from sequence ``offset`` on; ``NotFoundError`` when there is no such job."""
        ...

    def drained(self) -> frozenset[str]:
        """The nodes that get no new work."""
        ...

    def put_drained(self, nodes: frozenset[str]) -> None:
        """Write which those are."""
        ...


class MemoryJobStore:
    """A `JobStore` in memory: for the simulated world and for clusters that nobody comes back to."""

    def __init__(self) -> None:
        self._jobs: dict[str, JobRecord] = {}
        self._events: dict[str, list[JobEvent]] = {}
        self._drained: frozenset[str] = frozenset()

    def load(self) -> tuple[JobRecord, ...]:
        """All jobs, oldest first."""
        return tuple(self._jobs.values())

    def put(self, record: JobRecord) -> None:
        """Write a job."""
        self._jobs[record.job] = record
        self._events.setdefault(record.job, [])

    def add_event(self, job: str, event: JobEvent) -> None:
        """Append to a job's log."""
        self._events.setdefault(job, []).append(event)

    def events(self, job: str, offset: int, limit: int) -> tuple[JobEvent, ...]:
        """At most ``limit`` events from sequence ``offset`` on."""
        if job not in self._jobs:
            raise NotFoundError(f"no job {job!r} here")
        return tuple(self._events[job][offset : offset + limit])

    def drained(self) -> frozenset[str]:
        """The nodes that get no new work."""
        return self._drained

    def put_drained(self, nodes: frozenset[str]) -> None:
        """Write which those are."""
        self._drained = nodes
