"""What waits for the disk, and who is to hear when it is there; nobody who writes ever waits."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass

Write = Callable[[sqlite3.Connection], None]
Hear = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The writes of one transaction, in order; ``heard_by`` are called when it is over. ``last``: no other follows."""

    writes: tuple[Write, ...]
    heard_by: tuple[Hear, ...]
    last: bool


class WaitingWrites:
    """Writes on their way to a thread that makes one transaction of all that has gathered. Any thread may call.

    A write with a ``key`` takes the place of the last one with that key if it waits still and is of the same ``variant``: of a
    record only the newest counts, and what is in one transaction happens at once. Of writes without a key at most ``most``
    wait; more are dropped, and counted.
    """

    def __init__(self, most: int) -> None:
        self.num_dropped = 0
        self._most = most
        self._changed = threading.Condition()
        self._writes: list[Write] = []
        self._keyed: dict[str, tuple[int, str]] = {}
        self._num_unkeyed = 0
        self._heard_by: list[Hear] = []
        self._closed = False

    def __len__(self) -> int:
        return len(self._writes)

    def put(self, write: Write, *, key: str = "", variant: str = "") -> bool:
        """Let ``write`` wait; False when it was dropped."""
        with self._changed:
            place, waits = self._keyed.get(key, (-1, ""))
            if key and place >= 0 and waits == variant:
                self._writes[place] = write
                return True
            if key:
                self._keyed[key] = (len(self._writes), variant)
            elif self._num_unkeyed >= self._most:
                self.num_dropped += 1
                return False
            else:
                self._num_unkeyed += 1
            self._writes.append(write)
            self._changed.notify()
        return True

    def take_dropped(self) -> int:
        """How many writes were dropped since the last call."""
        with self._changed:
            dropped, self.num_dropped = self.num_dropped, 0
            return dropped

    def tell(self, hear: Hear) -> None:
        """Call ``hear``, on the writing thread, when the transaction with all that waits now is over."""
        with self._changed:
            self._heard_by.append(hear)
            self._changed.notify()

    def close(self) -> None:
        """What waits now is the last batch."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self) -> Batch:
        """Everything that waits; blocks until there is something, or `close` was called."""
        with self._changed:
            self._changed.wait_for(lambda: self._writes or self._heard_by or self._closed)
            batch = Batch(writes=tuple(self._writes), heard_by=tuple(self._heard_by), last=self._closed)
            self._writes.clear()
            self._keyed.clear()
            self._num_unkeyed = 0
            self._heard_by.clear()
            return batch
