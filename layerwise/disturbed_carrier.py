"""A carrier whose incoming frames suffer the faults that were planned for them; it exists in chaos runs only.

It stands between a stream and the link above it, which must make good whatever happens here::

    stream ── bytes ──► reader ── frames ──► planned faults ──► link (each message once, in order)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from layerwise.carrier import Carrier
from layerwise.faults import FrameFault, FrameFaultKind, FrameFaults
from layerwise.messages import Heartbeat, Hello, Welcome
from layerwise.proto.frames import Frame
from layerwise.streams import BrokenStreamError

HOLD_SECONDS = 0.1
"""How long a frame is held back at most, when no other one comes that could overtake it."""

IDLE = (Hello, Welcome, Heartbeat)
"""Messages that come with or without a job."""

Take = Callable[[Frame, int], None]


class DisturbedCarrier(Carrier):
    """A `Carrier` of frames from ``sender``, with ``faults``. Event loop's thread only."""

    def __init__(self, *arguments: Any, sender: str, faults: FrameFaults, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._sender = sender
        self._faults = faults
        self._held: list[tuple[Frame, int]] = []

    async def _read(self, take: Take) -> None:
        reading: asyncio.Task[bytes | None] | None = None
        try:
            while True:
                # A read that was given up would end the stream, so it stays while a held frame's time runs out.
                reading = reading or asyncio.create_task(self._stream.read())
                done, _ = await asyncio.wait((reading,), timeout=HOLD_SECONDS if self._held else None)
                if not done:
                    self._let_go(take)
                    continue
                data, reading = reading.result(), None
                if data is None:
                    break
                if self._carries:
                    self.received_bytes += len(data)
                    await self._disturb(self._reader.read(data), len(data), take)
            self._let_go(take)
        finally:
            if reading is not None:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    async def _disturb(self, frame: Frame, num_bytes: int, take: Take) -> None:
        """Hand a frame on, as its fault says. A farewell is the link's end and comes last, as it was sent."""
        fault = self._faults.next_fault(self._sender) if _counts(frame) else None
        if frame.header.lost:
            self._let_go(take)
        if fault is not None:
            self._faults.record(fault, self._sender)
            if fault.kind is FrameFaultKind.DROP:
                raise BrokenStreamError(f"a planned fault broke the stream at frame {fault.frame} from {self._sender}")
            if fault.kind is FrameFaultKind.DELAY:
                await asyncio.sleep(fault.seconds)
        held, self._held = self._held, []
        coming = held if fault is not None and fault.kind is FrameFaultKind.REORDER else [(frame, num_bytes), *held]
        if _stays(fault):
            self._held = [(frame, num_bytes)]
        self._hand_on(coming, take)

    def _let_go(self, take: Take) -> None:
        held, self._held = self._held, []
        self._hand_on(held, take)

    def _hand_on(self, frames: list[tuple[Frame, int]], take: Take) -> None:
        for frame, num_bytes in frames:
            if self._carries:  # the link may leave this stream at each of them
                take(frame, num_bytes)


def _counts(frame: Frame) -> bool:
    """Whether the frame carries something of a job: a message, or a part of one."""
    return any(not isinstance(message, IDLE) for _, message in frame.messages) or frame.payload_bytes > 0


def _stays(fault: FrameFault | None) -> bool:
    """Whether the frame, or a copy of it, comes behind the next one."""
    return fault is not None and fault.kind in (FrameFaultKind.REORDER, FrameFaultKind.DUPLICATE)
