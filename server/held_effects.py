"""Effects that wait for the coordinator's disk, and those that must not overtake them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from layerwise.messages import Assignment, CommitCut, Reroute
from layerwise.roles import Connect, Disconnect, Effect, End, Send


def needs_disk(effect: Effect) -> bool:
    """Whether what the effect follows from must be on disk first.

    A life or a generation that somebody has heard of must never be given again. And a commit deletes older cuts: a record that
    still had them, and not the newer ones, would lead the next coordinator to what is gone.
    """
    return isinstance(effect, Send) and isinstance(effect.message, Assignment | Reroute | CommitCut)


class HeldEffects:
    """Holds back what `needs_disk`, and everything later for the same process: what one process is told stays in order.

    Each thing held has a number; those up to `newest` may go when all that was written before `newest` was asked for is on disk.
    Not thread-safe.
    """

    def __init__(self) -> None:
        self._held: deque[tuple[int, Send | Connect]] = deque()
        self._last: dict[str, int] = {}
        self._number = 0

    @property
    def newest(self) -> int:
        """The number of the newest effect that is held; 0 when none is."""
        return self._held[-1][0] if self._held else 0

    @property
    def peers(self) -> tuple[str, ...]:
        """Whom held effects are for."""
        return tuple(self._last)

    def admit(self, effects: Iterable[Effect], *, all_wait: bool = False) -> list[Effect]:
        """Take effects in, in order; gives those that may happen now. ``all_wait``: none may before the disk has answered."""
        now: list[Effect] = []
        for effect in effects:
            if isinstance(effect, End):
                now.append(effect)  # for no process but this one
            elif isinstance(effect, Disconnect):
                self.lose(effect.peer)  # what was meant for it can wait no longer
                now.append(effect)
            elif all_wait or needs_disk(effect) or effect.peer in self._last:
                self._number += 1
                self._last[effect.peer] = self._number
                self._held.append((self._number, effect))
            else:
                now.append(effect)
        return now

    def release(self, number: int) -> list[Effect]:
        """The disk has all that was written before ``number`` was the newest one: what may happen now, in order."""
        freed: list[Effect] = []
        while self._held and self._held[0][0] <= number:
            freed.append(self._held.popleft()[1])
        self._last = {peer: last for peer, last in self._last.items() if last > number}
        return freed

    def lose(self, peer: str) -> None:
        """The link to ``peer`` is gone, so that what it was to be told is for nobody: another process may take its name."""
        if self._last.pop(peer, 0):
            self._held = deque((number, effect) for number, effect in self._held if effect.peer != peer)
