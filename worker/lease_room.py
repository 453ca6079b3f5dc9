"""How many leases of a job a forward worker holds: some to load, more for the next seconds of training."""

from __future__ import annotations

PREFETCH = 8
"""Leases beyond the window: they cover the coordinator's answer and the loading."""
LEASE_SECONDS = 5.0
"""Leases are held for so many seconds of training ahead: the time that a coordinator may be away unnoticed."""
MAX_AHEAD = 1024
"""Leases that are held and not loaded, at most."""
RATE_SECONDS = 0.5
"""The rate of training is measured over this time."""


class LeaseRoom:
    """The room for one job's leases; it grows with the rate at which this worker's microbatches close. Not thread-safe.

    There is none before `open`: the job's data are not there yet.
    """

    def __init__(self, prefetch: int) -> None:
        self.capacity = 0
        """How many microbatches may be loaded or on their way."""
        self._prefetch = prefetch
        self._ahead = False
        self._rate = 0.0
        self._closed = 0
        self._counted_at = 0.0

    @property
    def size(self) -> int:
        """How many leases to hold, those for later among them."""
        return self.capacity + (min(int(self._rate * LEASE_SECONDS), MAX_AHEAD) if self._ahead else 0)

    def open(self, window: int, *, ordered: bool) -> None:
        """At most ``window`` microbatches of the job are in flight; where they are ``ordered`` none are leased ahead."""
        self.capacity = window + self._prefetch
        self._ahead = not ordered

    def count(self, now: float) -> None:
        """Another microbatch has closed: how many do so in a second?"""
        self._closed += 1
        if not self._counted_at:
            self._closed, self._counted_at = 0, now
        elif now - self._counted_at >= RATE_SECONDS:
            self._rate = self._closed / (now - self._counted_at)
            self._closed, self._counted_at = 0, now
