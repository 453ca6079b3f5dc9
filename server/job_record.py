"""What the coordinator remembers of a job, one value each: the job, its events, its durable cuts, who works for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from layerwise.messages import Role


class JobState(StrEnum):
    """``queued → preparing → running → stopping → done | cancelled | failed``; the first four may fail at any time."""

    QUEUED = "queued"
    PREPARING = "preparing"
    RUNNING = "running"
    STOPPING = "stopping"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def final(self) -> bool:
        """Nothing more happens by itself."""
        return self in (JobState.DONE, JobState.CANCELLED, JobState.FAILED)

    @property
    def active(self) -> bool:
        """Processes work for it."""
        return self in (JobState.PREPARING, JobState.RUNNING, JobState.STOPPING)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """One line of a job's log. ``sequence`` counts from 0 for each job; ``level`` is "info", "warning" or "error"."""

    sequence: int
    time: float
    level: str
    message: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as clients see them."""
        return {"time": self.time, "level": self.level, "message": self.message, "fields": dict(self.fields)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CutRecord:
    """A durable cut: all layers at ``version``, on disk in the job's directory. ``ledger``: what was closed by then."""

    version: int
    time: float
    num_bytes: int
    ledger: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in the job document."""
        return {"version": self.version, "time": self.time, "bytes": self.num_bytes}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRecord:
    """One process that works for a job. ``block`` is -1 for a forward worker; ``life`` is 0 for all but shards."""

    process: str
    role: Role
    block: int
    start: int = 0
    stop: int = 0
    life: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A job as the store keeps it. Times are unix seconds. ``number`` orders the queue; a resumed job gets a new one.

    ``settings_json``, ``profile_json`` and ``blocks`` are empty until the job was prepared once; a resume uses them
    again. ``next_life`` is the next life that a placed block gets. ``moving``: training stops at the next update, to go on
    with other processes. ``drops`` are the microbatches that were given up, as in the ledger of the job document,
    ``rollbacks`` those of `layerwise.server.rollback`. ``document`` is the last job document.
    """

    job: str
    number: int
    name: str
    state: JobState
    spec_json: str
    directory: str
    created: float
    message: str = ""
    warnings: tuple[str, ...] = ()
    started: float | None = None
    finished: float | None = None
    settings_json: str = ""
    profile_json: str = ""
    blocks: tuple[tuple[int, int], ...] = ()
    next_life: int = 1
    resume_count: int = 0
    num_events: int = 0
    cuts: tuple[CutRecord, ...] = ()
    placement: tuple[PlacementRecord, ...] = ()
    evaluations: tuple[Mapping[str, Any], ...] = ()
    drops: tuple[Mapping[str, Any], ...] = ()
    rollbacks: tuple[Mapping[str, Any], ...] = ()
    moving: bool = False
    document: Mapping[str, Any] = field(default_factory=dict)

    @property
    def durable_cut(self) -> CutRecord | None:
        """The newest durable cut."""
        return self.cuts[-1] if self.cuts else None
