"""What carries a link at the moment: one stream, its two loops, and what waits to be written on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from layerwise.link import Link, Packet
from layerwise.proto.frames import Frame, FrameHeader, FrameReader, FrameWriter
from layerwise.streams import BrokenStreamError, DialedStream, Stream


class Carrier:
    """One stream that carries a link, from when it is opened until it breaks or the link leaves it.

    ``before_write`` runs before messages are packed into a frame, ``on_written`` gets each frame's size. Frames are
    packed when the stream has room, so messages queued in between share one. Event loop's thread only.
    """

    def __init__(
        self,
        name: str,
        link: Link,
        stream: Stream,
        reader: FrameReader,
        *,
        linger_seconds: float,
        before_write: Callable[[], None],
        on_written: Callable[[int], None],
    ) -> None:
        self.dialed = isinstance(stream, DialedStream)
        self.received_bytes = 0
        """Received since the last frame that left; every frame acknowledges."""
        self.sent_bytes = 0
        """Handed to the stream since it was opened."""
        self._name = name
        self._link = link
        self._stream = stream
        self._reader = reader
        self._writer = FrameWriter()
        self._linger_seconds = linger_seconds
        self._before_write = before_write
        self._on_written = on_written
        self._wake = asyncio.Event()
        self._frame_due = False
        self._asks = False
        self._named = False
        self._carries = True
        self._farewell: FrameHeader | None = None
        self._ended = False
        self._broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._patience: asyncio.TimerHandle | None = None

    def push(self, packets: list[Packet]) -> None:
        """Queue packets of the link; one without a message makes a frame due, which acknowledges."""
        for packet in packets:
            if packet.sequence:
                self._writer.add(packet.sequence, packet.message)
            else:
                self._frame_due = True
        self._wake.set()

    @property
    def open_bytes(self) -> int:
        """Announced bytes of the message that has not arrived whole."""
        return self._reader.open_bytes

    def ask(self) -> None:
        """Ask the peer for a sign of life: it answers with a frame at once."""
        self._asks = self._frame_due = True
        self._wake.set()

    def give_up(self, reason: str) -> None:
        """End the stream as a broken one: nothing comes out of it any more."""
        if not self._broken.done():
            self._broken.set_result(reason)

    def end_when_stuck(self, seconds: float, moved: int = -1) -> None:
        """The link has left: let the stream end when nothing has left on it for ``seconds``, whatever is queued."""
        if self._ended:
            return
        if moved == self.sent_bytes:
            self.give_up(f"nothing has left on this stream for {seconds:g} s")
            return
        self._patience = asyncio.get_running_loop().call_later(seconds, self.end_when_stuck, seconds, self.sent_bytes)

    def release(self, farewell: Packet | None = None) -> None:
        """The link leaves this stream: for another one, or with a ``farewell`` that follows what is queued."""
        self._carries = False
        if farewell is not None:
            self._farewell = FrameHeader(
                sender=farewell.sender,
                receiver=farewell.receiver,
                acknowledged=farewell.acknowledged,
                lost=farewell.lost,
            )
        self._wake.set()

    async def run(self, take: Callable[[Frame, int], None]) -> None:
        """Move frames both ways until the stream ends or the link has left it; ``take`` gets each frame and its size.

        Raises:
            BrokenStreamError: the stream broke, was refused, or was given up.
            RejectedError: the peer sent what can't be understood.
        """
        reading = asyncio.create_task(self._read(take), name=f"layerwise read {self._name}")
        writing = asyncio.create_task(self._write(), name=f"layerwise write {self._name}")
        for task in (reading, writing):
            # gRPC cancels who serves a stream in mid-wait when it breaks; then nobody asks how these two have ended.
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        try:
            await asyncio.wait((reading, writing, self._broken), return_when=asyncio.FIRST_COMPLETED)
            if self._broken.done():
                raise BrokenStreamError(self._broken.result())
            if not reading.done():
                # Writing ended first: the peer has yet to read our last frames, or reading tells why the stream broke.
                await asyncio.wait((reading,), timeout=self._linger_seconds)
            for task in (reading, writing):
                if task.done():
                    task.result()
        finally:
            self._ended = True
            self._wake.set()
            if self._patience is not None:
                self._patience.cancel()
            reading.cancel()
            # gRPC can't take back a write that it has begun, and refuses to end the stream meanwhile.
            await asyncio.wait((writing,), timeout=self._linger_seconds)
            writing.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)

    async def _read(self, take: Callable[[Frame, int], None]) -> None:
        while (data := await self._stream.read()) is not None:
            if self._carries:
                self.received_bytes += len(data)
                take(self._reader.read(data), len(data))

    async def _write(self) -> None:
        writer, link = self._writer, self._link
        while not self._ended:
            if not self._carries and (writer.empty or self._farewell is None):
                break
            if writer.empty and not self._frame_due:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._before_write()
            header = FrameHeader(
                sender=link.incarnation,
                receiver=link.peer_incarnation,
                acknowledged=link.acknowledged,
                name="" if self._named else self._name,
                answer=self._asks,
            )
            data = writer.next_frame(header)
            self._named, self._frame_due, self._asks, self.received_bytes = True, False, False, 0
            self.sent_bytes += len(data)
            self._on_written(len(data))
            await self._stream.write(data)
        if self._ended:
            return
        if self._farewell is not None and self._named:
            await self._stream.write(writer.next_frame(self._farewell))
        await self._stream.finish()
