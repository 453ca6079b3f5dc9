"""How long a process that ticks was itself stopped or held up: what time limits must not count against others."""

from __future__ import annotations

import math

HELD_UP_SECONDS = 1.0
"""A tick that is later than this says that the process was held up, and not only busy."""


class HeldUp:
    """Knows when the next tick is due. Use it from one thread."""

    def __init__(self, tick_seconds: float) -> None:
        self._tick_seconds = tick_seconds
        self._due = math.inf

    def ticked(self, now: float) -> None:
        """The tick of ``now`` is over."""
        self._due = now + self._tick_seconds

    def missed(self, now: float) -> float:
        """Seconds that this process has missed until ``now``, told once; 0 when the next tick is not late.

        To be asked before anything is done with what others said, a message or a tick, whichever comes first.
        """
        late = now - self._due
        if late <= HELD_UP_SECONDS:
            return 0.0
        self._due = now
        return late
