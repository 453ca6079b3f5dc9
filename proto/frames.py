"""Frames: what one message of a link's stream holds.

The outside of a frame is written and read by hand, so that a megabyte of tensor bytes is copied once on each side:
joined from views of the tensors when it leaves, placed into a pooled buffer when it arrives. The header is protobuf's
work. The bytes are those of `Frame` in ``layerwise.proto``; any protobuf library can read them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from layerwise.buffers import BufferPool, Bytes
from layerwise.errors import MalformedMessageError, RejectedError
from layerwise.messages import Message
from layerwise.proto import layerwise_pb2 as pb2
from layerwise.proto.convert import message_from_proto, message_to_proto
from layerwise.version import WIRE_VERSION

CHUNK_BYTES = 1 << 20
"""The most payload in one frame."""
MAX_ENVELOPE_BYTES = 2 << 20
"""The most that a message may have apart from its tensors' bytes."""
MAX_FRAME_BYTES = 4 << 20
"""The most that a frame may have; gRPC refuses larger ones unread."""
MAX_MESSAGE_BYTES = 1 << 30
"""The most tensor bytes of one message."""
MAX_FRAME_PACKETS = 4096
"""The most messages that begin in one frame, which is also the most that a link may have unacknowledged."""
_FULL_HEADER = 1 << 18

# Tags of the fields that are written by hand: number << 3 | 2 (length-delimited) or 0 (varint).
_HEADER, _PAYLOAD, _PACKETS = b"\x0a", b"\x12", b"\x3a"
_SEQUENCE, _ENVELOPE, _PAYLOAD_BYTES = b"\x08", b"\x12", b"\x18"


class WireVersionError(RejectedError):
    """The other side speaks another wire version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedMessage:
    """A message ready to leave: its envelope's bytes, and views of its tensors' memory, which must stay as it is."""

    envelope: bytes
    pieces: list[memoryview]
    payload_bytes: int

    @property
    def size(self) -> int:
        """Bytes on the wire, nearly."""
        return len(self.envelope) + self.payload_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameHeader:
    """What a frame says about its link; ``name`` (in the first frame of a stream) and ``lost`` are mostly empty.

    ``answer``: the receiver is to send a frame at once.
    """

    sender: int
    receiver: int
    acknowledged: int
    name: str = ""
    lost: str = ""
    answer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A frame as read: the messages that it completes, with their sequences, and how many payload bytes it brought."""

    header: FrameHeader
    messages: list[tuple[int, Message]]
    payload_bytes: int


def encode_message(message: Message) -> EncodedMessage:
    """Make ``message`` ready to leave; copies no tensor that lies densely in host memory.

    Raises:
        MalformedMessageError: it can't travel, or is too large.
    """
    envelope, pieces, payload_bytes = message_to_proto(message)
    data = envelope.SerializeToString()
    if len(data) > MAX_ENVELOPE_BYTES or payload_bytes > MAX_MESSAGE_BYTES:
        raise MalformedMessageError(
            f"{type(message).__name__} is too large to send: {len(data)} bytes (limit {MAX_ENVELOPE_BYTES})"
            f" and {payload_bytes} bytes of tensors (limit {MAX_MESSAGE_BYTES})"
        )
    return EncodedMessage(envelope=data, pieces=pieces, payload_bytes=payload_bytes)


def varint(value: int) -> bytes:
    """Protobuf's variable-length form of a non-negative number."""
    if value < 0x80:
        return _SHORT_VARINTS[value]
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_SHORT_VARINTS = [bytes((value,)) for value in range(0x80)]


class FrameWriter:
    """Packs messages into frames: many small ones together, a large one in chunks. One for each stream."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, EncodedMessage]] = deque()
        self._open_sequence = 0
        self._open_offset = 0
        self._open_left = 0
        self._pieces: deque[memoryview] = deque()

    @property
    def empty(self) -> bool:
        """Nothing is left to write."""
        return not self._waiting and not self._open_left

    def add(self, sequence: int, message: EncodedMessage) -> None:
        """Queue a message behind the others."""
        self._waiting.append((sequence, message))

    def next_frame(self, header: FrameHeader) -> bytes:
        """The next frame's bytes; without any message if there is none."""
        proto = pb2.FrameHeader(
            wire_version=WIRE_VERSION,
            sender=header.sender,
            receiver=header.receiver,
            acknowledged=header.acknowledged,
            name=header.name,
            lost=header.lost,
            answer=header.answer,
        )
        chunks: list[memoryview] = []
        packets: list[bytes] = []
        packets_bytes = 0
        room = CHUNK_BYTES
        if self._open_left:
            proto.payload_sequence, proto.payload_offset = self._open_sequence, self._open_offset
            room = self._fill(chunks, room)
        while self._waiting and not self._open_left and room > 0 and packets_bytes < _FULL_HEADER:
            sequence, message = self._waiting.popleft()
            packet = _packet_bytes(sequence, message)
            packets += (_PACKETS, varint(len(packet)), packet)
            packets_bytes += len(packet)
            if message.payload_bytes:
                self._open_sequence, self._open_offset, self._open_left = sequence, 0, message.payload_bytes
                self._pieces.extend(message.pieces)
                if not chunks:
                    proto.payload_sequence = sequence
                room = self._fill(chunks, room)
        start = proto.SerializeToString()
        parts: list[bytes | memoryview] = [_HEADER, varint(len(start) + sum(map(len, packets))), start, *packets]
        if chunks:
            parts += (_PAYLOAD, varint(CHUNK_BYTES - room), *chunks)
        return b"".join(parts)

    def _fill(self, chunks: list[memoryview], room: int) -> int:
        """Move bytes of the open message into ``chunks``; returns the room left."""
        while room and self._open_left:
            piece = self._pieces.popleft()
            if piece.nbytes > room:
                self._pieces.appendleft(piece[room:])
                piece = piece[:room]
            chunks.append(piece)
            room -= piece.nbytes
            self._open_left -= piece.nbytes
            self._open_offset += piece.nbytes
        return room


def _packet_bytes(sequence: int, message: EncodedMessage) -> bytes:
    start = _SEQUENCE + varint(sequence) + _ENVELOPE + varint(len(message.envelope)) + message.envelope
    return start + _PAYLOAD_BYTES + varint(message.payload_bytes) if message.payload_bytes else start


class FrameReader:
    """Reads the frames of one stream in order.

    At most one message is open (its payload incomplete), in one buffer of ``pool``.
    After an error the stream is of no more use.
    """

    def __init__(self, pool: BufferPool, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._pool = pool
        self._max_message_bytes = max_message_bytes
        self._open: pb2.Packet | None = None
        self._buffer: Bytes | None = None
        self._filled = 0

    @property
    def open_bytes(self) -> int:
        """Bytes taken for the message whose payload is incomplete."""
        return 0 if self._open is None else self._open.payload_bytes

    def read(self, data: bytes) -> Frame:
        """Decode one frame.

        Raises:
            MalformedMessageError: says what was wrong; nothing of the frame may be used.
            WireVersionError: the sender speaks another version.
        """
        header_bytes, payload = _split(data)
        try:
            header = pb2.FrameHeader.FromString(header_bytes)
        except DecodeError as error:
            raise MalformedMessageError(
                f"frame refused: its header of {len(header_bytes)} bytes is not readable"
            ) from error
        if header.wire_version != WIRE_VERSION:
            raise WireVersionError(
                f"wire version {header.wire_version} was received, this process speaks {WIRE_VERSION};"
                " install the same release of layerwise on all machines"
            )
        if header.sender == 0 and not header.lost:
            raise MalformedMessageError("frame refused: it has no sender incarnation")
        if len(header.packets) > MAX_FRAME_PACKETS:
            raise MalformedMessageError(
                f"frame refused: {len(header.packets)} messages in it, the limit is {MAX_FRAME_PACKETS}"
            )
        self._check_place(header, len(payload))
        return Frame(
            header=FrameHeader(
                sender=header.sender,
                receiver=header.receiver,
                acknowledged=header.acknowledged,
                name=header.name,
                lost=header.lost,
                answer=header.answer,
            ),
            messages=self._messages(header.packets, payload) if header.packets or payload else [],
            payload_bytes=len(payload),
        )

    def _check_place(self, header: pb2.FrameHeader, num_bytes: int) -> None:
        """Refuse a payload that does not go on where the last one ended."""
        expected = (0, 0)
        if self._open is not None:
            expected = (self._open.sequence, self._filled)
        elif num_bytes:
            expected = (next((packet.sequence for packet in header.packets if packet.payload_bytes), 0), 0)
        received = (header.payload_sequence, header.payload_offset)
        if received != expected or (self._open is not None and not num_bytes):
            raise MalformedMessageError(
                f"frame refused: payload of {num_bytes} bytes for packet {received[0]} at byte {received[1]},"
                f" expected packet {expected[0]} at byte {expected[1]}"
            )

    def _messages(self, packets: Iterable[pb2.Packet], payload: memoryview) -> list[tuple[int, Message]]:
        complete: list[tuple[int, Message]] = []
        if self._open is not None:
            payload = self._place(payload, complete)
        for packet in packets:
            if self._open is not None:
                raise MalformedMessageError(
                    f"frame refused: packet {self._open.sequence} is open, yet packet {packet.sequence} follows"
                )
            if packet.sequence == 0:
                raise MalformedMessageError("frame refused: a packet has no sequence")
            if not packet.payload_bytes:
                complete.append((packet.sequence, message_from_proto(packet.envelope)))
                continue
            if packet.payload_bytes > self._max_message_bytes:
                raise MalformedMessageError(
                    f"frame refused: packet {packet.sequence} announces {packet.payload_bytes} bytes of tensors,"
                    f" the limit is {self._max_message_bytes}"
                )
            self._open, self._filled = packet, 0
            if not payload:
                raise MalformedMessageError(
                    f"frame refused: packet {packet.sequence} begins without any of its payload"
                )
            self._buffer = self._pool.take(packet.payload_bytes)
            payload = self._place(payload, complete)
        if payload:
            raise MalformedMessageError(f"frame refused: {len(payload)} bytes of payload belong to no packet")
        return complete

    def _place(self, payload: memoryview, complete: list[tuple[int, Message]]) -> memoryview:
        """Copy what belongs to the open message into its buffer; returns the rest of the payload."""
        assert self._open is not None
        assert self._buffer is not None
        count = min(len(payload), self._open.payload_bytes - self._filled)
        self._buffer[self._filled : self._filled + count] = np.frombuffer(payload, np.uint8, count)
        self._filled += count
        if self._filled == self._open.payload_bytes:
            packet, buffer = self._open, self._buffer
            self._open = self._buffer = None
            complete.append((packet.sequence, message_from_proto(packet.envelope, buffer)))
        return payload[count:]


def _split(data: bytes) -> tuple[bytes, memoryview]:
    """The header's bytes and a view of the payload."""
    view = memoryview(data)
    if not data.startswith(_HEADER):
        raise MalformedMessageError(f"frame refused: {len(data)} bytes that do not begin with a header")
    start, length = _length(data, 1)
    end = start + length
    if end > len(data):
        raise MalformedMessageError(f"frame refused: its header of {length} bytes is cut off after {len(data) - start}")
    header = bytes(view[start:end])
    if end == len(data):
        return header, view[:0]
    if data[end] != _PAYLOAD[0]:
        raise MalformedMessageError(f"frame refused: byte {data[end]:#x} where the payload should begin")
    start, length = _length(data, end + 1)
    if start + length != len(data):
        raise MalformedMessageError(
            f"frame refused: {length} bytes of payload were announced, {len(data) - start} are there"
        )
    if length > CHUNK_BYTES:
        raise MalformedMessageError(f"frame refused: {length} bytes of payload, the limit is {CHUNK_BYTES}")
    return header, view[start:]


def _length(data: bytes, at: int) -> tuple[int, int]:
    """Read a varint at ``at``; returns where it ends and its value."""
    value = 0
    for position in range(at, min(at + 5, len(data))):
        value |= (data[position] & 0x7F) << 7 * (position - at)
        if data[position] < 0x80:
            return position + 1, value
    raise MalformedMessageError("frame refused: a length in it is cut off or too large")
