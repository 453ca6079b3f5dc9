"""How long a hop takes: a payload of one activation's size to the next shard, answered by a small message."""

from __future__ import annotations

import statistics
from typing import Any

from layerwise.messages import Echo, Echoed, Tensors
from layerwise.roles import Connect, Effect, Send

ROUNDS = 5
SILENCE_SECONDS = 5.0
"""A peer that does not answer for so long leaves the hop unmeasured; the job starts all the same."""


class HopProbe:
    """Pure: one measurement, one echo at a time. ``seconds`` is there when `done`; 0 when the peer did not answer.

    The first echo opens the link and warms the buffers, so it does not count.
    """

    def __init__(self, *, job: str, peer: str, address: str, payload: Any) -> None:
        self.job = job
        self.done = not peer
        self.seconds = 0.0
        self._peer = peer
        self._address = address
        self._payload = payload
        self._sent_at = 0.0
        self._times: list[float] = []

    def begin(self, now: float) -> list[Effect]:
        """Open the link and send the first echo."""
        return [Connect(self._peer, self._address), *self._send(now)]

    def on_echoed(self, peer: str, message: Echoed, now: float) -> list[Effect]:
        """The answer to one echo."""
        if self.done or peer != self._peer or message.round != len(self._times):
            return []
        self._times.append(now - self._sent_at)
        if len(self._times) <= ROUNDS:
            return self._send(now)
        self.done, self.seconds = True, statistics.median(self._times[1:])
        return []

    def on_lost(self, peer: str) -> None:
        """The link is gone: the hop stays unmeasured."""
        if peer == self._peer:
            self.done = True

    def on_tick(self, now: float) -> None:
        """Give up on a silent peer."""
        if now - self._sent_at > SILENCE_SECONDS:
            self.done = True

    def _send(self, now: float) -> list[Effect]:
        self._sent_at = now
        payload = Tensors((self._payload,))
        return [Send(self._peer, Echo(job=self.job, round=len(self._times), payload=payload))]
