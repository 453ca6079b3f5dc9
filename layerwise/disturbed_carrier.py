"""A carrier whose incoming frames suffer the faults that were planned for them; it exists in chaos runs only.

It stands between a stream and the link above it, which must make good whatever happens here::

    stream ── bytes ──► reader ── frames ──► planned faults ──► link (each message once, in order)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from layerwise.carrier import Carrier
from layerwise.faults import FrameFault, FrameFaultKind, FrameFaults
from layerwise.messages import Heartbeat, Hello, Welcome
from layerwise.proto.frames import Frame
from layerwise.streams import BrokenStreamError

HOLD_SECONDS = 0.25
"""How long a frame is held back at most, when no other one comes that could overtake it. It is handed on then; a later one is held instead."""

IDLE = (Hello, Welcome, Heartbeat)
"""Messages that come with or without a job."""

Take = Callable[[Frame, int], None]


@dataclass(frozen=True, slots=True)
class _Held:
    """A frame, or a copy of one, that is to come behind the next one, but no later than ``until`` (loop's clock)."""

    frame: Frame
    num_bytes: int
    fault: FrameFault
    until: float


class DisturbedCarrier(Carrier):
    """A `Carrier` of frames from ``sender``, with ``faults``. Event loop's thread only."""

    def __init__(self, *arguments: Any, sender: str, faults: FrameFaults, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._sender = sender
        self._faults = faults
        self._held: _Held | None = None

    async def _read(self, take: Take) -> None:
        reading: asyncio.Task[bytes | None] | None = None
        try:
            while True:
                # A read that was given up would end the stream, so it stays while a held frame's time runs out.
                reading = reading or asyncio.create_task(self._stream.read())
                done, _ = await asyncio.wait((reading,), timeout=self._hold_seconds())
                if self._hold_seconds() == 0.0:
                    self._let_go(take)
                if not done:
                    continue
                data, reading = reading.result(), None
                if data is None:
                    break
                if self._carries:
                    self.received_bytes += len(data)
                    await self._disturb(self._reader.read(data), len(data), take)
            self._let_go(take)
        finally:
            self._give_up_held()
            if reading is not None:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    async def _disturb(self, frame: Frame, num_bytes: int, take: Take) -> None:
        """Hand a frame on, as its fault says. A farewell is the link's end and comes last, as it was sent."""
        fault = self._faults.next_fault(self._sender) if _counts(frame) else None
        if frame.header.lost:
            self._let_go(take)
        if not frame.messages and not frame.payload_bytes:
            self._hand_on(frame, num_bytes, take)  # it only acknowledges, and overtakes nothing
            return
        if fault is not None and self._held is not None and _holds(fault):
            self._faults.put_back(fault)  # one frame at a time: this one overtakes the one that is held
            fault = None
        if fault is not None and fault.kind is FrameFaultKind.DROP:
            self._faults.record(fault, self._sender)
            raise BrokenStreamError(f"a planned fault broke the stream at frame {fault.frame} from {self._sender}")
        if fault is not None and fault.kind is FrameFaultKind.DELAY:
            self._faults.record(fault, self._sender)
            await asyncio.sleep(fault.seconds)
        if fault is None or fault.kind is not FrameFaultKind.REORDER:
            self._hand_on(frame, num_bytes, take)
        self._let_go(take, overtaken=True)
        if fault is not None and _holds(fault):
            self._held = _Held(frame, num_bytes, fault, asyncio.get_running_loop().time() + HOLD_SECONDS)

    def _hold_seconds(self) -> float | None:
        """How much longer a frame is held; ``None``: none is."""
        if self._held is None:
            return None
        return max(self._held.until - asyncio.get_running_loop().time(), 0.0)

    def _let_go(self, take: Take, *, overtaken: bool = False) -> None:
        """Hand on what is held. What nothing has overtaken is only late, so that a later frame suffers the fault."""
        held, self._held = self._held, None
        if held is None:
            return
        if not self._carries or (held.fault.kind is FrameFaultKind.REORDER and not overtaken):
            self._faults.put_back(held.fault)
        else:
            self._faults.record(held.fault, self._sender)
        self._hand_on(held.frame, held.num_bytes, take)

    def _give_up_held(self) -> None:
        """The stream ends before the held frame could be handed on: it suffers as if it had been lost with the stream."""
        if self._held is not None:
            self._faults.put_back(self._held.fault)
            self._held = None

    def _hand_on(self, frame: Frame, num_bytes: int, take: Take) -> None:
        if self._carries:  # the link may leave this stream at each of them
            take(frame, num_bytes)


def _counts(frame: Frame) -> bool:
    """Whether the frame carries something of a job: a message, or a part of one."""
    return any(not isinstance(message, IDLE) for _, message in frame.messages) or frame.payload_bytes > 0


def _holds(fault: FrameFault) -> bool:
    """Whether the frame, or a copy of it, comes behind the next one."""
    return fault.kind in (FrameFaultKind.REORDER, FrameFaultKind.DUPLICATE)
