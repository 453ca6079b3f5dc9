from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.buffers import BufferPool
from layerwise.errors import LayerwiseError, MalformedMessageError
from layerwise.ids import Attempt, Microbatch
from layerwise.messages import Forward, Message, StartTraining, Stop, Tensors
from layerwise.proto import WIRE_VERSION, WireVersionError
from layerwise.proto import layerwise_pb2 as pb2
from layerwise.proto.frames import CHUNK_BYTES, MAX_FRAME_BYTES, FrameHeader, FrameReader, FrameWriter, encode_message

torch.set_num_threads(1)

HEADER = FrameHeader(sender=7, receiver=9, acknowledged=300, name="shard:1")


def forward(*items: torch.Tensor | None) -> Forward:
    attempt = Attempt(Microbatch(0, 0, 4), 1)
    return Forward(
        job="j",
        attempt=attempt,
        number=1,
        life=1,
        needed_from=0,
        inputs=Tensors(items, single=False),
        targets=Tensors((torch.arange(4),)),
    )


def frames_of(messages: list[Message], first_sequence: int = 1) -> list[bytes]:
    writer = FrameWriter()
    for sequence, message in enumerate(messages, first_sequence):
        writer.add(sequence, encode_message(message))
    frames = []
    while not writer.empty:
        frames.append(writer.next_frame(HEADER))
    return frames


def read_all(frames: list[bytes]) -> list[tuple[int, Any]]:
    reader = FrameReader(BufferPool())
    return [one for frame in frames for one in reader.read(frame).messages]


def test_small_messages_share_a_frame() -> None:
    messages: list[Message] = [Stop(job=str(one)) for one in range(100)]
    frames = frames_of(messages)
    assert len(frames) == 1
    assert read_all(frames) == list(enumerate(messages, 1))


def test_the_header_comes_back() -> None:
    assert FrameReader(BufferPool()).read(frames_of([Stop(job="j")])[0]).header == HEADER


def test_a_large_message_is_cut_into_chunks_and_put_together() -> None:
    tensor = torch.randn(900_000)
    frames = frames_of([forward(tensor, None, tensor[:5])])
    assert len(frames) == 4
    assert all(len(frame) < CHUNK_BYTES + 1000 for frame in frames)
    [(_, message)] = read_all(frames)
    assert torch.equal(message.inputs.items[0], tensor)
    assert message.inputs.items[1] is None
    assert torch.equal(message.inputs.items[2], tensor[:5])


def test_messages_after_a_large_one_fill_its_last_frame() -> None:
    messages: list[Message] = [forward(torch.randn(300_000)), Stop(job="a"), forward(torch.randn(10)), Stop(job="b")]
    frames = frames_of(messages)
    assert len(frames) == 2
    assert [sequence for sequence, _ in read_all(frames)] == [1, 2, 3, 4]


def test_tensors_start_at_aligned_addresses() -> None:
    [(_, message)] = read_all(frames_of([forward(torch.ones(3, dtype=torch.uint8), torch.randn(3), torch.randn(17))]))
    assert all(item.data_ptr() % 64 == 0 for item in message.inputs.items)


def test_any_protobuf_library_can_read_a_frame() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).t()
    frame = pb2.Frame.FromString(frames_of([forward(tensor)])[0])
    assert frame.header.wire_version == WIRE_VERSION
    assert (frame.header.sender, frame.header.receiver, frame.header.acknowledged) == (7, 9, 300)
    assert (frame.header.payload_sequence, frame.header.payload_offset) == (1, 0)
    packet = frame.header.packets[0]
    assert packet.envelope.forward.inputs.items[0].strides == [1, 3]
    assert frame.payload[:24] == tensor.t().contiguous().numpy().tobytes()
    assert packet.payload_bytes == len(frame.payload)


def test_a_frame_written_by_a_protobuf_library_can_be_read() -> None:
    frames = frames_of([forward(torch.randn(4)), Stop(job="j")])
    rewritten = [pb2.Frame.FromString(frame).SerializeToString() for frame in frames]
    assert [sequence for sequence, _ in read_all(rewritten)] == [1, 2]


@given(st.lists(st.one_of(st.integers(0, 3_000_000), st.none()), max_size=6))
def test_any_mixture_of_sizes_arrives_in_order(sizes: list[int | None]) -> None:
    messages: list[Message] = [
        Stop(job="j") if size is None else forward(torch.full((size,), index, dtype=torch.uint8))
        for index, size in enumerate(sizes)
    ]
    arrived = read_all(frames_of(messages))
    assert [sequence for sequence, _ in arrived] == list(range(1, len(messages) + 1))
    for index, (size, (_, message)) in enumerate(zip(sizes, arrived, strict=True)):
        if size is not None:
            assert message.inputs.items[0].shape == (size,)
            assert bool((message.inputs.items[0] == index).all())


def test_a_message_too_large_apart_from_its_tensors_is_not_sent() -> None:
    with pytest.raises(MalformedMessageError, match="StartTraining is too large to send"):
        encode_message(StartTraining(job="j", done_json="x" * (3 << 20)))


def header_of(**changes: Any) -> pb2.FrameHeader:
    return pb2.FrameHeader(**({"wire_version": WIRE_VERSION, "sender": 7} | changes))


def frame_of(payload: bytes = b"", **changes: Any) -> bytes:
    return pb2.Frame(header=header_of(**changes), payload=payload).SerializeToString()


STOP = pb2.Envelope(stop=pb2.Stop(job="j"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "do not begin with a header"),
        (b"\x00\x01\x02", "do not begin with a header"),
        (b"\x0a", "cut off"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\x01", "cut off or too large"),
        (b"\x0a\x05\x08\x01", "header of 5 bytes is cut off after 2"),
        (b"\x0a\x02\xff\xff", "not readable"),
        (b"\x0a\x04\x3a\x02\x12\x7f", "not readable"),
        (frame_of() + b"\x1a\x00", "0x1a where the payload should begin"),
        (frame_of() + b"\x12\x05abc", "5 bytes of payload were announced, 3 are there"),
        (frame_of() + b"\x12\x02abc", "2 bytes of payload were announced, 3 are there"),
        (frame_of(sender=0), "no sender"),
        (frame_of(packets=[pb2.Packet(envelope=STOP)]), "no sequence"),
        (frame_of(b"abc"), "bytes of payload belong to no packet"),
        (frame_of(b"abc", payload_sequence=4), "for packet 4 at byte 0, expected packet 0"),
        (frame_of(b"", payload_sequence=4), "for packet 4"),
        (
            frame_of(
                b"abc", payload_sequence=1, packets=[pb2.Packet(sequence=1, envelope=STOP, payload_bytes=1 << 50)]
            ),
            "announces 1125899906842624 bytes of tensors, the limit is",
        ),
        (frame_of(packets=[pb2.Packet(sequence=1, envelope=STOP, payload_bytes=4)]), "begins without any"),
        (
            frame_of(b"abc", payload_sequence=1, packets=[pb2.Packet(sequence=1, envelope=STOP, payload_bytes=3)]),
            "3 bytes more than its tensors",
        ),
        (
            frame_of(
                b"abc",
                payload_sequence=1,
                packets=[pb2.Packet(sequence=1, envelope=STOP, payload_bytes=9), pb2.Packet(sequence=2, envelope=STOP)],
            ),
            "packet 1 is open, yet packet 2 follows",
        ),
        (frame_of(bytes(CHUNK_BYTES + 1), payload_sequence=1), "the limit is 1048576"),
    ],
)
def test_a_bad_frame_is_refused_with_what_is_wrong(data: bytes, words: str) -> None:
    with pytest.raises(MalformedMessageError, match=words):
        FrameReader(BufferPool()).read(data)


def test_another_wire_version_is_refused_as_such() -> None:
    with pytest.raises(WireVersionError, match=f"wire version 99 was received, this process speaks {WIRE_VERSION}"):
        FrameReader(BufferPool()).read(frame_of(wire_version=99))


def test_a_missing_chunk_is_noticed() -> None:
    frames = frames_of([forward(torch.randn(900_000))])
    reader = FrameReader(BufferPool())
    reader.read(frames[0])
    with pytest.raises(MalformedMessageError, match="at byte 2097152, expected packet 1 at byte 1048576"):
        reader.read(frames[2])


def test_a_message_between_chunks_is_refused() -> None:
    reader = FrameReader(BufferPool())
    reader.read(frames_of([forward(torch.randn(900_000))])[0])
    with pytest.raises(MalformedMessageError, match="expected packet 1 at byte 1048576"):
        reader.read(frames_of([Stop(job="j")], first_sequence=2)[0])


def test_an_announced_size_takes_no_more_memory_than_the_limit() -> None:
    class CountingPool(BufferPool):
        taken = 0

        def take(self, num_bytes: int) -> Any:
            CountingPool.taken += num_bytes
            return super().take(num_bytes)

    packets = [pb2.Packet(sequence=1, envelope=STOP, payload_bytes=1 << 21)]
    with pytest.raises(MalformedMessageError, match="the limit is 1048576"):
        FrameReader(CountingPool(), max_message_bytes=1 << 20).read(frame_of(b"x", payload_sequence=1, packets=packets))
    assert CountingPool.taken == 0


SAMPLE = frames_of([forward(torch.randn(3, 4).t(), None), Stop(job="j"), forward(torch.randn(2))])[0]


@given(st.integers(0, len(SAMPLE) - 1))
def test_a_truncated_frame_is_refused(length: int) -> None:
    with pytest.raises(MalformedMessageError):
        FrameReader(BufferPool()).read(SAMPLE[:length])


@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(LayerwiseError):
        FrameReader(BufferPool()).read(data)


@given(st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_corrupted_frame_is_refused_or_decodes_to_proper_messages(changes: list[tuple[int, int]]) -> None:
    data = bytearray(SAMPLE)
    for place, value in changes:
        data[place] = value
    try:
        frame = FrameReader(BufferPool()).read(bytes(data))
    except LayerwiseError:
        return
    for _, message in frame.messages:
        if isinstance(message, Forward):
            for item in (*message.inputs.items, *message.targets.items):
                if item is not None:
                    assert math.prod(item.shape) * item.element_size() <= MAX_FRAME_BYTES
                    item.clone()


def test_many_corruptions_leave_nothing_behind() -> None:
    generator = random.Random(1)
    pool = BufferPool(max_idle_bytes=1 << 20)
    for _ in range(500):
        data = bytearray(SAMPLE)
        for _ in range(generator.randint(1, 8)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        try:
            FrameReader(pool, max_message_bytes=1 << 20).read(bytes(data))
        except LayerwiseError:
            continue
    assert pool.idle_bytes <= 1 << 20
