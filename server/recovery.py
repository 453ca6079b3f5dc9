"""What a run has lost and got back: how far layers went back, and how long that took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_RECOVERIES = 6
"""New routes without a new update in between, or losses of a block's shard before training began, after which the run is given up, if
they went on for `LEAST_SECONDS`."""
LEAST_SECONDS = 5.0
"""So long from the first to the last of them: who was held up hears at once of all that happened meanwhile, and most of it is over."""
MOST_SECONDS = 2.0
"""So much of it counts at the most from one to the next: it may be during just that time that nothing was heard."""


@dataclass(slots=True)
class FailuresInARow:
    """The same thing over and over, for ``seconds`` by now."""

    times: int = 0
    seconds: float = 0.0
    last: float = 0.0

    def again(self, now: float) -> None:
        """Once more."""
        if self.times:
            self.seconds += min(now - self.last, MOST_SECONDS)
        self.times, self.last = self.times + 1, now

    @property
    def goes_on(self) -> bool:
        """Whether there is no hope left that it ends."""
        return self.times > MOST_RECOVERIES and self.seconds >= LEAST_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class LostBlock:
    """A block whose shard was lost at ``time`` (unix seconds), when its layers had reached ``version``."""

    block: int
    shard: str
    version: int
    time: float


class Recovery:
    """Counts the recoveries of one run. Not thread-safe."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        """One object for each restored block, as in the job document."""
        self._lost: dict[int, LostBlock] = {}
        self._highest = -1
        self._gone_back: int | None = None
        self.in_a_row = FailuresInARow()
        """New routes that brought no update beyond those made before."""

    def lose(self, block: int, shard: str, version: int, now: float) -> None:
        """The shard of ``block``, whose layers had reached ``version``, is gone."""
        self._lost.setdefault(block, LostBlock(block=block, shard=shard, version=version, time=now))

    def begin(self, version: int, now: float) -> None:
        """A new route is given out, ``version`` is what all layers had reached.

        Updates that are made again are none: a shard that ends in each next one would go back to the same cut for ever.
        """
        reached = version if self._gone_back is None else self._gone_back
        if reached > self._highest:
            self.in_a_row = FailuresInARow()
        self.in_a_row.again(now)
        self._highest = max(self._highest, reached)

    def go_back(self, version: int) -> None:
        """With the next route all layers go back to ``version`` on purpose: what they had reached counts no more."""
        self._gone_back, self._highest = version, -1

    def end(self, restored: Mapping[int, int], samples: int, now: float) -> list[tuple[str, dict[str, Any]]]:
        """Training goes on with the ``restored`` blocks at their versions; gives lines for the job's log, with their fields.

        ``samples`` are those that some layers have and others lack now: so many are leased again. The rewind in updates is
        from the last version that the lost shard had told of, which may be a second old.
        """
        lines = []
        for block, cut in restored.items():
            lost = self._lost.pop(block, None)
            if lost is None:
                continue
            rewind = max(lost.version - cut, 0)
            fields = {
                "block": block,
                "shard": lost.shard,
                "cut": cut,
                "rewind": rewind,
                "samples": samples,
                "seconds": now - lost.time,
            }
            self.made.append({"time": lost.time, **fields})
            updates = f"{rewind} update{'' if rewind == 1 else 's'}"
            reached = max(lost.version, cut)
            line = f"block {block} goes back {updates}, from version {reached} to {cut}; {samples} samples are leased again"
            lines.append((line, fields))
        self._lost.clear()
        self._gone_back = None
        return lines
