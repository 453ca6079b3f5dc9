"""Validation samples that a forward worker loads and has on their way through the route."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from layerwise.ids import Microbatch

MAX_EVALUATIONS = 2
"""Evaluation microbatches on the way through the route."""


class ForwardEvaluations:
    """The ranges of validation samples that are leased for one version, few of them under way at a time. Called by `ForwardJob` only.

    A newer lease ends the version before.
    """

    def __init__(self) -> None:
        self.version = 0
        """The cut that is evaluated."""
        self._waiting: deque[Microbatch] = deque()
        self._under_way: set[Microbatch] = set()

    @property
    def under_way(self) -> list[Microbatch]:
        """Ranges that are being loaded or have no answer yet, in order."""
        return sorted(self._under_way)

    def lease(self, version: int, ranges: Iterable[Microbatch]) -> None:
        """Evaluate ``ranges`` at ``version``."""
        if version != self.version:
            # The coordinator is done with the version before, whatever became of its last samples.
            self.version = version
            self._waiting.clear()
            self._under_way.clear()
        self._waiting.extend(ranges)

    def begin(self) -> list[Microbatch]:
        """The ranges to load now: from here on they are under way."""
        begun = []
        while self._waiting and len(self._under_way) < MAX_EVALUATIONS:
            samples = self._waiting.popleft()
            self._under_way.add(samples)
            begun.append(samples)
        return begun

    def is_wanted(self, version: int, samples: Microbatch) -> bool:
        """Whether ``samples`` still have to go through the cut at ``version``."""
        return version == self.version and samples in self._under_way

    def end(self, version: int, start: int) -> bool:
        """The range that begins at ``start`` has its answer; False when the answer is about another version."""
        if version != self.version:
            return False
        self._under_way -= {samples for samples in self._under_way if samples.start == start}
        return True

    def begin_again(self) -> None:
        """The link is gone, and what was under way with it: it comes first on the next one."""
        self._waiting.extendleft(sorted(self._under_way, reverse=True))
        self._under_way.clear()
