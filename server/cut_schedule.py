"""At which versions every layer copies itself."""

from __future__ import annotations

from collections.abc import Iterable


class CutSchedule:
    """Cuts at the multiples of each of ``intervals`` (updates) and at ``final``, the version at which training ends."""

    def __init__(self, *, final: int, intervals: Iterable[int] = ()) -> None:
        self.final = final
        self._intervals = tuple(sorted(set(intervals)))
        if any(interval < 1 for interval in self._intervals):
            raise ValueError(f"cut intervals must be at least 1 update, got {self._intervals}")

    def __contains__(self, version: int) -> bool:
        return version == self.final or (
            0 < version < self.final and any(version % interval == 0 for interval in self._intervals)
        )

    def next_after(self, version: int) -> int | None:
        """The lowest cut above ``version`` (``None`` after the final one)."""
        if version >= self.final:
            return None
        return min([self.final, *((version // interval + 1) * interval for interval in self._intervals)])

    def following(self, version: int, count: int) -> tuple[int, ...]:
        """The next ``count`` cuts above ``version``, fewer at the end."""
        versions: list[int] = []
        found = self.next_after(version)
        while found is not None and len(versions) < count:
            versions.append(found)
            found = self.next_after(found)
        return tuple(versions)

    def stop_at(self, version: int) -> None:
        """Training ends at ``version`` already."""
        self.final = min(self.final, version)
