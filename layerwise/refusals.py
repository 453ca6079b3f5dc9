"""What a process was sent and did not act on: counted by reason, and said in the log, but not once for each frame."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import Any

LOG_SECONDS = 1.0
"""Between two sentences about the same reason: who floods a process must not flood its log."""
_LONGEST = 500

log = logging.getLogger(__name__)


class Refused(StrEnum):
    """Why; the label of ``layerwise_refused_frames_total``."""

    MALFORMED = "malformed"
    VERSION = "version"
    SILENT = "silent"
    NAME = "name"
    STREAMS = "streams"
    PEERS = "peers"
    MEMORY = "memory"
    HELLO = "hello"
    TENSOR = "tensor"
    UNEXPECTED = "unexpected"


class Refusals:
    """Counts for one process. Event loop's thread only; ``now`` is a monotonic clock in seconds."""

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._counts: Counter[Refused] = Counter(dict.fromkeys(Refused, 0))
        self._said: dict[Refused, float] = {}
        self._unsaid: Counter[Refused] = Counter()

    def __getitem__(self, reason: Refused) -> int:
        return self._counts[reason]

    def add(self, reason: Refused, sentence: str = "", *, count: int = 1) -> None:
        """Count a refusal; ``sentence`` (empty: it was said already) is logged unless one of its kind just was."""
        self._counts[reason] += count
        if not sentence:
            return
        now = self._now()
        if reason in self._said and now - self._said[reason] < LOG_SECONDS:
            self._unsaid[reason] += 1
            return
        self._said[reason] = now
        more = self._unsaid.pop(reason, 0)
        log.warning("%s%s", sentence[:_LONGEST], f" ({more} more of this kind since)" if more else "")

    def collect(self) -> list[Any]:
        """The Prometheus family."""
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(
            "layerwise_refused_frames", "Frames, streams and messages that were not acted on.", labels=["reason"]
        )
        for reason, count in self._counts.items():
            family.add_metric([reason], count)
        return [family]
