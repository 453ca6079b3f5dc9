"""Real frames, damaged: whatever arrives decodes to proper messages or is refused, and takes no more memory than it may.

Damage is done on three levels: to the bytes (flips, cuts, splices, lengths), to the fields of the protobuf (extremes,
repeats, what is missing, what belongs elsewhere), and to the order of frames in a stream.
"""

from __future__ import annotations

import random
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message as ProtoMessage
from hypothesis import example, given, settings
from hypothesis import strategies as st

from layerwise import messages
from layerwise.buffers import BufferPool, Bytes
from layerwise.errors import LayerwiseError, MalformedMessageError
from layerwise.ids import Attempt, Microbatch
from layerwise.messages import Message, NamedTensors, Tensors
from layerwise.proto import WIRE_VERSION, WireVersionError
from layerwise.proto import layerwise_pb2 as pb2
from layerwise.proto.frames import CHUNK_BYTES, FrameHeader, FrameReader, FrameWriter, encode_message, varint
from tests.contract.test_messages import values

torch.set_num_threads(1)

LIMIT = 4 << 20
"""The most tensor bytes of a message in these tests."""
MESSAGES = typing.get_args(Message)
ATTEMPT = Attempt(Microbatch(1, 4, 8), 2)


class CountingPool(BufferPool):
    """Says how much was taken at most at once."""

    largest = 0

    def take(self, num_bytes: int) -> Bytes:
        self.largest = max(self.largest, num_bytes)
        return super().take(num_bytes)


def examples() -> list[Message]:
    """Messages with everything in them that makes decoding interesting."""
    tensors = Tensors((torch.arange(12.0).reshape(3, 4).t(), None, torch.tensor([True, False])), single=False)
    single = Tensors((torch.zeros(2, 0, 3, dtype=torch.int64),))
    large = Tensors((torch.zeros(CHUNK_BYTES // 4 + 100),))
    named = NamedTensors(("weight", "bias"), (torch.ones(1).expand(5, 3), None))
    state = messages.LayerState(layer=1, life=2, revision=3, version=4, parameters=named)
    common: dict[str, Any] = {"job": "j-1", "attempt": ATTEMPT, "number": 7, "life": 3}
    metric = messages.Metric(name="accuracy", total=2.0, count=4.0)
    closed = messages.AttemptClosed(
        attempt=ATTEMPT, number=1, outcome=messages.Outcome.DROPPED, loss=0.5, metrics=(metric,), missing_from=3
    )
    return [
        messages.Forward(**common, needed_from=2, inputs=tensors, targets=single),
        messages.Forward(**common, needed_from=2, inputs=large, targets=tensors),
        messages.BoundaryGradient(**common, gradients=tensors),
        messages.PushGradient(**common, layer=1, revision=2, read=3, gradients=named),
        messages.DetachedTask(
            **common, inputs=single, targets=None, gradients=tensors, buffers=((1, named), (2, named)),
            lacking=(1, 2, 3), input_gradient=True, states=(state, state),
        ),
        messages.BlockClosed(**common, block=1, outcome=messages.Outcome.APPLIED, loss=1.0, metrics=(metric,)),
        messages.AttemptsClosed(job="j-1", closed=(closed, closed), active_seconds=1.5),
        messages.Lease(job="j-1", kind=messages.LeaseKind.TRAIN, attempts=(ATTEMPT,) * 3, ranges=(Microbatch(0, 0, 4),)),
        messages.Hello(
            role=messages.Role.SHARD, name="shard-0", address="unix:/x", device="cpu", host="h", pid=3, version="1",
            allowed_imports=("a", "b"), join="j-1",
        ),
        messages.Stop(job="j-1"),
        messages.StartTraining(job="j-1", done_json='{"watermark": 3}'),
        messages.CutSaved(
            job="j-1", block=0, version=3,
            files=(messages.LayerFile(layer=0, life=1, name="layer-0", num_bytes=10, digest="ab"),),
        ),
        messages.TaskRequest(job="j-1", life=1, have=(messages.LayerRevision(layer=0, life=1, revision=1),) * 2),
        messages.Evaluated(job="j-1", version=1, start=0, stop=4, loss=metric, life=1, metrics=(metric,)),
    ]  # fmt: skip


def frames_of(*said: Message) -> list[bytes]:
    """The frames of one stream that carries these messages."""
    writer = FrameWriter()
    for sequence, message in enumerate(said, 1):
        writer.add(sequence, encode_message(message))
    frames = []
    while not writer.empty:
        frames.append(writer.next_frame(FrameHeader(sender=5, receiver=6, acknowledged=1, name="shard-0")))
    return frames


EXAMPLES = examples()
STREAMS = [frames_of(message) for message in EXAMPLES] + [frames_of(*EXAMPLES)]
FRAMES = [frame for frames in STREAMS for frame in frames]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor that a message holds."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from tensors_in(one)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name))


def check(*frames: bytes) -> int:
    """Read a stream of frames as a process would; gives how many messages came through."""
    pool = CountingPool()
    reader = FrameReader(pool, max_message_bytes=LIMIT)
    arrived, sentence = 0, "nothing was wrong"
    try:
        for data in frames:
            for sequence, message in reader.read(data).messages:
                arrived += 1
                assert sequence > 0
                assert isinstance(message, MESSAGES)
                for tensor in tensors_in(message):
                    assert tensor.untyped_storage().nbytes() <= 2 * LIMIT
                    assert tensor.numel() == 0 or tensor.reshape(-1)[-1] is not None  # its memory is there
    except (MalformedMessageError, WireVersionError) as error:
        sentence = str(error)
    assert 0 < len(sentence) < 5000
    assert pool.largest <= LIMIT
    return arrived


def test_the_examples_themselves_come_through() -> None:
    for frames in STREAMS:
        assert check(*frames) > 0


# --- bytes ----------------------------------------------------------------------------------------------------------


def flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def overwrite(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def cut(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 2, 8, 100, len(data)))]


def repeat(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    piece = data[start : start + rng.randrange(1, 64)]
    data[start:start] = piece * rng.choice((1, 2, 50))


def splice(data: bytearray, rng: random.Random) -> None:
    other = rng.choice(FRAMES)[: 1 << 16]
    start = rng.randrange(len(other))
    at = rng.randrange(len(data))
    data[at:at] = other[start : start + rng.randrange(1, 200)]


def lengthen(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(min(len(data), 400))
    data[at : at + 1] = varint(
        rng.choice((0, 1, 127, 128, 1 << 20, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 1))
    )


BYTES: tuple[Callable[[bytearray, random.Random], None], ...] = (flip, overwrite, cut, repeat, splice, lengthen)


@settings(max_examples=400)
@given(st.sampled_from(range(len(STREAMS))), st.integers(1, 6), st.randoms(use_true_random=False))
def test_bytes_damaged_anywhere(which: int, times: int, rng: random.Random) -> None:
    frames = [bytearray(frame) for frame in STREAMS[which]]
    for _ in range(times):
        frame = rng.choice(frames)
        if frame:
            rng.choice(BYTES)(frame, rng)
    check(*map(bytes, frames))


@settings(max_examples=100)
@given(st.sampled_from(range(len(STREAMS))), st.randoms(use_true_random=False))
def test_frames_out_of_order_lost_or_repeated(which: int, rng: random.Random) -> None:
    frames = [*STREAMS[which], *STREAMS[rng.randrange(len(STREAMS))]]
    rng.shuffle(frames)
    check(*(frames * rng.choice((1, 2)))[: rng.randrange(1, 2 * len(frames))])


@settings(max_examples=200)
@given(st.binary(max_size=300), st.sampled_from((b"", b"\x0a", b"\x0a\x20", b"\x0a\x00\x12\x05")))
def test_noise_behind_a_true_beginning(noise: bytes, beginning: bytes) -> None:
    check(beginning + noise)


# --- fields ---------------------------------------------------------------------------------------------------------

EXTREMES = {
    FieldDescriptor.CPPTYPE_INT32: (0, 1, -1, (1 << 31) - 1, -(1 << 31)),
    FieldDescriptor.CPPTYPE_INT64: (0, 1, -1, 3, 1 << 31, 1 << 40, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, -(1 << 63)),
    FieldDescriptor.CPPTYPE_UINT32: (0, 1, 99, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 1, 4, 1 << 20, LIMIT, LIMIT + 1, 1 << 40, 1 << 63, (1 << 64) - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: (0.0, -1.0, 1e308, float("inf"), float("nan")),
    FieldDescriptor.CPPTYPE_BOOL: (False, True),
    FieldDescriptor.CPPTYPE_ENUM: (0, 1, 2, 77, -1),
    FieldDescriptor.CPPTYPE_STRING: ("", "x", "float32", "int8", "bool", "complex128", "object", "\0\n", "y" * 5000),
}


def parts(proto: ProtoMessage) -> list[ProtoMessage]:
    """The message and every message inside it."""
    found = [proto]
    for field, value in proto.ListFields():
        if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            for one in value if field.is_repeated else (value,):
                found += parts(one)
    return found


def damage(part: ProtoMessage, rng: random.Random) -> None:
    """Change one field of one part, as its type allows."""
    field = rng.choice(list(part.DESCRIPTOR.fields))
    if rng.random() < 0.15:
        part.ClearField(field.name)
        return
    is_message = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
    if field.is_repeated:
        values = getattr(part, field.name)
        if is_message:
            for _ in range(rng.choice((1, 2, 300))):
                copy = values.add()
                if len(values) > 1:
                    copy.CopyFrom(values[rng.randrange(len(values) - 1)])
        else:
            values.extend(rng.choices(EXTREMES[field.cpp_type], k=rng.choice((1, 2, 100))))
    elif is_message:
        getattr(part, field.name).SetInParent()
    else:
        setattr(part, field.name, rng.choice(EXTREMES[field.cpp_type]))


def written(frame: pb2.Frame) -> bytes:
    """The bytes in the order that frames have."""
    header = frame.header.SerializeToString()
    start = b"\x0a" + varint(len(header)) + header
    return start + (b"\x12" + varint(len(frame.payload)) + frame.payload if frame.payload else b"")


@settings(max_examples=600)
@given(st.sampled_from(range(len(STREAMS))), st.integers(1, 4), st.randoms(use_true_random=False))
def test_fields_damaged_anywhere(which: int, times: int, rng: random.Random) -> None:
    frames = [pb2.Frame.FromString(data) for data in STREAMS[which]]
    for _ in range(times):
        frame = rng.choice(frames)
        if rng.random() < 0.1:
            frame.payload = frame.payload[: rng.randrange(len(frame.payload) + 1)]
        damage(rng.choice(parts(frame.header)), rng)
    check(*map(written, frames))


@settings(max_examples=300)
@given(st.sampled_from(MESSAGES).flatmap(values), st.randoms(use_true_random=False))
def test_any_message_damaged_anywhere(message: Message, rng: random.Random) -> None:
    frames = [pb2.Frame.FromString(data) for data in frames_of(message)]
    for frame in frames:
        damage(rng.choice(parts(frame.header)), rng)
    check(*map(written, frames))


HUGE = (0, 1, 2, 3, 7, 1 << 20, 1 << 31, 1 << 40, (1 << 61), (1 << 62) - 1, 1 << 62, (1 << 63) - 1, -1)
SIZES = st.lists(st.sampled_from(HUGE), max_size=5)


@settings(max_examples=600)
@given(
    st.sampled_from(("float32", "uint8", "bool", "complex128", "bfloat16")),
    SIZES, SIZES,
    st.sampled_from((0, 1, 4, 16, 1 << 20, 1 << 40)),
)  # fmt: skip
@example("uint8", [0, 1 << 62], [1, 1], 0)
@example("float32", [0, (1 << 63) - 1], [(1 << 62) - 1, (1 << 62) - 1], 0)
@example("float32", [1 << 40], [0], 4)
@example("uint8", [1] * 5, [(1 << 62) - 1] * 5, 1)
def test_every_shape_is_sound_or_refused(dtype: str, shape: list[int], strides: list[int], num_bytes: int) -> None:
    tensor = pb2.TensorHeader(dtype=dtype, shape=shape, strides=strides, num_bytes=num_bytes)
    gradients = pb2.Tensors(items=[tensor], single=True)
    attempt = pb2.Attempt(microbatch=pb2.Microbatch(stop=3), attempt=1)
    envelope = pb2.Envelope(boundary_gradient=pb2.BoundaryGradient(attempt=attempt, gradients=gradients))
    payload = bytes(min(num_bytes, 1 << 20))
    place = {"payload_sequence": 1} if payload else {}
    packet = pb2.Packet(sequence=1, envelope=envelope, payload_bytes=len(payload))
    check(
        written(
            pb2.Frame(
                header=pb2.FrameHeader(wire_version=WIRE_VERSION, sender=1, packets=[packet], **place), payload=payload
            )
        )
    )


@pytest.mark.parametrize("depth", [2, 99, 101, 10_000, 300_000])
def test_messages_nested_without_end_are_refused(depth: int) -> None:
    nested = b""
    for _ in range(depth):
        nested = b"\x0a" + varint(len(nested)) + nested if len(nested) < 1 << 18 else nested
    groups = b"\x0b" * depth  # groups that are opened and never closed
    for inside in (nested, groups, groups + b"\x0c" * depth):
        header = (
            pb2.FrameHeader(wire_version=WIRE_VERSION, sender=1).SerializeToString()
            + b"\x3a"
            + varint(len(inside))
            + inside
        )
        check(b"\x0a" + varint(len(header)) + header)


def test_a_hundred_thousand_tensors_without_bytes_are_bounded_by_the_frame() -> None:
    absent = pb2.Tensors(items=[pb2.TensorHeader(absent=True)] * 100_000)
    attempt = pb2.Attempt(microbatch=pb2.Microbatch(stop=3), attempt=1)
    envelope = pb2.Envelope(boundary_gradient=pb2.BoundaryGradient(attempt=attempt, gradients=absent))
    packet = pb2.Packet(sequence=1, envelope=envelope)
    frame = written(pb2.Frame(header=pb2.FrameHeader(wire_version=WIRE_VERSION, sender=1, packets=[packet])))
    with pytest.raises(MalformedMessageError, match="100000 tensors, the limit is"):
        FrameReader(BufferPool()).read(frame)


def test_every_refusal_is_a_layerwise_error() -> None:
    assert issubclass(MalformedMessageError, LayerwiseError)
    assert issubclass(WireVersionError, LayerwiseError)
