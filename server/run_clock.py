"""How long a run has trained, and whether anything in it still moves."""

from __future__ import annotations


class RunClock:
    """Seconds from a run's first admission to its last close, over all its routes, without the pauses for evaluations.

    The first shard tells how long it has been active; a pause counts once a close comes after it, since only then did it delay training.
    """

    def __init__(self) -> None:
        self._before = 0.0
        self._active = 0.0
        self._paused = 0.0
        self._pause_to_count = 0.0

    @property
    def seconds(self) -> float:
        """So far."""
        return max(self._before + self._active - self._paused, 0.0)

    def reach(self, active_seconds: float) -> None:
        """The first shard's newest close was so long after its first admission."""
        if active_seconds > self._active:
            self._active = active_seconds
            self._paused += self._pause_to_count
            self._pause_to_count = 0.0

    def pause(self, seconds: float) -> None:
        """Training stood for so long; it counts if it goes on after that."""
        self._pause_to_count += seconds

    def begin_anew(self, waited: float) -> None:
        """There is a new first shard, whose clock begins at its first admission; ``waited``, the time without one, counts as well."""
        self._before += self._active + max(waited, 0.0)
        self._active = 0.0


class StallWatch:
    """Warns once when nothing has moved for ``lease`` seconds, and gives up after four times ``task`` seconds more.

    Three times that long while cuts are written. The time in which a disk is full does not count: that is said by others.
    """

    def __init__(self, *, lease: float, task: float, now: float) -> None:
        self._lease, self._limit = lease, lease + 4 * task
        self.moved_at = now
        self._short = now
        self._warned = False

    def moved(self, now: float) -> None:
        """Something did."""
        self.moved_at = now
        self._warned = False

    def wait_for_room(self, now: float) -> None:
        """Somebody waits for room on a disk."""
        self._short = now

    def excuse(self, seconds: float, now: float) -> None:
        """For so long nothing that moved could be heard of."""
        self.moved_at = min(self.moved_at + seconds, now)
        self._short = min(self._short + seconds, now)

    def silence(self, now: float) -> float:
        """Seconds since anything moved that count."""
        return now - max(self.moved_at, self._short)

    def is_to_warn(self, now: float) -> bool:
        """Whether it is long enough to say so; once in each silence."""
        if self._warned or self.silence(now) <= self._lease:
            return False
        self._warned = True
        return True

    def has_stalled(self, now: float, *, saving: bool) -> bool:
        """Whether it is too long to go on; ``saving``: cuts are being written."""
        return self.silence(now) > (3 * self._limit if saving else self._limit)
