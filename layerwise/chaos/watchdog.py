"""Notices a run that hangs. Pure: what was seen, and when, are arguments."""

from __future__ import annotations

from dataclasses import dataclass

from layerwise.sections import Timeouts

SILENT_SECONDS = 20.0
"""A run in which nothing moves for so long hangs, and has failed."""
PART_OF_LIMIT = 0.8
"""Of the time after which a job gives itself up: the watchdog has to come first, while everybody still is where it hangs."""

WAITING = ("waiting for a shard", "waiting:", "preparing", "getting ready")
"""So begin the phases that last until processes are there."""


def silent_seconds(timeouts: Timeouts) -> float:
    """How long nothing may move in a job with these time-outs: longer where a single pass may take longer."""
    limit = timeouts.lease + 4 * timeouts.task
    return min(max(SILENT_SECONDS, 2 * timeouts.task), PART_OF_LIMIT * limit)


def waiting_seconds(timeouts: Timeouts) -> float:
    """How long a process may be waited for, which on a busy machine takes its time to start."""
    return PART_OF_LIMIT * timeouts.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Stand:
    """How far a run is. What only speaks of it, like a line of its log, is no movement."""

    num_updates: int
    phase: str

    @property
    def waits(self) -> bool:
        """Whether it is processes that are waited for."""
        return self.phase.startswith(WAITING)


class Watchdog:
    """Barks when the stand has been the same for ``seconds``, or ``waiting`` seconds where processes are waited for."""

    def __init__(self, seconds: float, now: float, *, waiting: float = 0.0) -> None:
        self._seconds, self._waiting = seconds, max(seconds, waiting)
        self._stand: Stand | None = None
        self._moved_at = now

    def observe(self, stand: Stand, now: float, *, acted: bool = False) -> bool:
        """Look at the run; ``acted``: a fault has just begun or ended. Tells whether it hangs."""
        if acted or stand != self._stand:
            self._stand, self._moved_at = stand, now
        return self.silence(now) > (self._waiting if stand.waits else self._seconds)

    def silence(self, now: float) -> float:
        """Seconds since something moved."""
        return now - self._moved_at
