"""A lock that many may share or one may have alone."""

from __future__ import annotations

import threading

from layerwise.errors import DeadlineError


class _Shared:
    __slots__ = ("_lock",)

    def __init__(self, lock: SharedLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.acquire_shared()

    def __exit__(self, *_: object) -> None:
        self._lock.release_shared()


class _Exclusive:
    __slots__ = ("_lock",)

    def __init__(self, lock: SharedLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.acquire_exclusive()

    def __exit__(self, *_: object) -> None:
        self._lock.release_exclusive()


class SharedLock:
    """Readers share it, a writer has it alone. Waiting writers go first, so a stream of readers can't starve an update.

    Not reentrant. No wait is longer than ``timeout_seconds``: whoever holds a layer for so long has hung.
    """

    __slots__ = ("_condition", "_exclusive", "_readers", "_shared", "_timeout_seconds", "_waiting_writers", "_writing")

    def __init__(self, timeout_seconds: float = 600.0) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._readers = 0
        self._waiting_writers = 0
        self._writing = False
        self._timeout_seconds = timeout_seconds
        self._shared = _Shared(self)
        self._exclusive = _Exclusive(self)

    def acquire_shared(self) -> None:
        """Wait until nobody writes; ``DeadlineError`` after the time limit."""
        with self._condition:
            if (self._writing or self._waiting_writers) and not self._condition.wait_for(
                lambda: not self._writing and not self._waiting_writers, self._timeout_seconds
            ):
                raise DeadlineError(f"a layer was locked by an update for more than {self._timeout_seconds:g} s")
            self._readers += 1

    def release_shared(self) -> None:
        """The other half of `acquire_shared`."""
        with self._condition:
            self._readers -= 1
            if not self._readers and self._waiting_writers:
                self._condition.notify_all()

    def shared(self) -> _Shared:
        """Context manager: read."""
        return self._shared

    def acquire_exclusive(self) -> None:
        """Wait until nobody reads or writes; ``DeadlineError`` after the time limit."""
        with self._condition:
            if self._writing or self._readers:
                self._waiting_writers += 1
                try:
                    free = self._condition.wait_for(
                        lambda: not self._writing and not self._readers, self._timeout_seconds
                    )
                finally:
                    self._waiting_writers -= 1
                if not free:
                    self._condition.notify_all()  # readers that let this writer go first
                    raise DeadlineError(f"a layer was in use for more than {self._timeout_seconds:g} s")
            self._writing = True

    def release_exclusive(self) -> None:
        """The other half of `acquire_exclusive`."""
        with self._condition:
            self._writing = False
            self._condition.notify_all()

    @property
    def has_waiting_writer(self) -> bool:
        """Whether somebody waits to write: new readers wait behind it."""
        return self._waiting_writers > 0

    def exclusive(self) -> _Exclusive:
        """Context manager: write."""
        return self._exclusive
