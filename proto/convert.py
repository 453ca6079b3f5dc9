"""Messages to their wire form and back: driven by the fields of the dataclasses, strict about what is received."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, TypeAlias

from google.protobuf.message import Message as ProtoMessage

from layerwise import messages
from layerwise.buffers import ALIGNMENT, Bytes
from layerwise.errors import MalformedMessageError
from layerwise.messages import Message
from layerwise.proto import layerwise_pb2 as pb2
from layerwise.tensors import MAX_TENSOR_BYTES, TensorHeader, check_header, tensor_from_bytes, tensor_to_bytes

MAX_TENSORS = 1 << 16
"""The most tensors in one place of a message; the ones that are absent take no bytes, so bytes alone don't bound them."""


class PayloadWriter:
    """Collects the bytes of a message's tensors, each at the next multiple of 64."""

    def __init__(self) -> None:
        self.pieces: list[memoryview] = []
        self.num_bytes = 0

    def add(self, data: memoryview) -> None:
        """Append one tensor's bytes."""
        padding = -self.num_bytes % ALIGNMENT
        if padding:
            self.pieces.append(_PADDING[:padding])
        self.pieces.append(data)
        self.num_bytes += padding + data.nbytes


class PayloadReader:
    """Hands out the bytes of a received payload in the same order."""

    def __init__(self, payload: Bytes | None) -> None:
        self._payload = payload
        self._left = 0 if payload is None else payload.size
        self._position = 0

    def take(self, num_bytes: int) -> Bytes:
        """The next tensor's bytes."""
        padding = -self._position % ALIGNMENT
        if self._payload is None or padding + num_bytes > self._left:
            raise MalformedMessageError(
                f"message refused: its tensors need {num_bytes} bytes more,"
                f" but {max(self._left - padding, 0)} of its payload are left"
            )
        start = self._position + padding
        self._position = start + num_bytes
        self._left -= padding + num_bytes
        return self._payload[start : self._position]

    def finish(self) -> None:
        """Refuse a payload longer than its tensors."""
        if self._left:
            raise MalformedMessageError(f"message refused: its payload has {self._left} bytes more than its tensors")


_PADDING = memoryview(bytes(ALIGNMENT))

ToProto: TypeAlias = Callable[[Any, PayloadWriter], Any]
FromProto: TypeAlias = Callable[[Any, PayloadReader, str], Any]


def message_to_proto(message: Message) -> tuple[pb2.Envelope, list[memoryview], int]:
    """The wire form of ``message``: envelope, payload in pieces (views of the tensors' memory), bytes of the payload.

    Raises:
        MalformedMessageError: a field holds what its type does not allow.
    """
    try:
        field, encode = _encoders()[type(message)]
    except KeyError:
        raise MalformedMessageError(f"{type(message).__name__} is not a message that can travel") from None
    payload = PayloadWriter()
    try:
        envelope = pb2.Envelope(**{field: encode(message, payload)})
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise MalformedMessageError(f"{type(message).__name__} can't be sent: {error}") from error
    return envelope, payload.pieces, payload.num_bytes


def message_from_proto(envelope: pb2.Envelope, payload: Bytes | None = None) -> Message:
    """The message in ``envelope``; its tensors lie on ``payload`` and keep it alive.

    Raises:
        MalformedMessageError: says which field, and what was received.
    """
    field = envelope.WhichOneof("message")
    if field is None:
        raise MalformedMessageError("message refused: an empty envelope, or a message that this version does not know")
    name, decode = _decoders()[field]
    reader = PayloadReader(payload)
    message: Message = decode(getattr(envelope, field), reader, name)
    reader.finish()
    return message


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


@cache
def _encoders() -> dict[type[Any], tuple[str, ToProto]]:
    """For each message its field in the envelope, and how it is encoded."""
    return {cls: (_snake(cls.__name__), _to_proto(cls)) for cls in typing.get_args(Message)}


@cache
def _decoders() -> dict[str, tuple[str, FromProto]]:
    """For each field of the envelope the name of its message, and how it is decoded."""
    return {_snake(cls.__name__): (cls.__name__, _from_proto(cls)) for cls in typing.get_args(Message)}


# --- encoding -------------------------------------------------------------------------------------------------------


def _to_proto(cls: Any) -> ToProto:
    """Make the encoder of a dataclass from its annotations."""
    if cls is messages.Tensors:
        return _tensors_to_proto
    if cls is messages.NamedTensors:
        return _named_tensors_to_proto
    hints = typing.get_type_hints(cls)
    plain = tuple(field.name for field in fields(cls) if _encoder(hints[field.name]) is None)
    coded = tuple((field.name, encode) for field in fields(cls) if (encode := _encoder(hints[field.name])) is not None)
    make = getattr(pb2, cls.__name__)

    def encode_dataclass(value: Any, payload: PayloadWriter) -> Any:
        values = {name: getattr(value, name) for name in plain}
        for name, encode in coded:
            values[name] = encode(getattr(value, name), payload)
        return make(**values)

    return encode_dataclass


def _encoder(hint: Any) -> ToProto | None:
    """How a field of this type is encoded; ``None``: it goes as it is."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        inner = _encoder(_without_none(hint))
        return None if inner is None else (lambda value, payload: None if value is None else inner(value, payload))
    if origin is tuple and arguments[-1] is Ellipsis:
        item = _encoder(arguments[0])
        return None if item is None else (lambda value, payload: [item(one, payload) for one in value])
    if origin is tuple:
        return _pair_encoder(arguments)
    if issubclass(hint, StrEnum):
        numbers = {member: number for number, member in _enum_members(hint).items()}
        return lambda value, payload: numbers[value]
    return _to_proto(hint) if is_dataclass(hint) else None


def _pair_encoder(arguments: tuple[Any, ...]) -> ToProto:
    make, names = _pair_message(arguments)
    encoders = [_encoder(argument) for argument in arguments]

    def encode_pair(value: Any, payload: PayloadWriter) -> Any:
        coded = zip(names, value, encoders, strict=True)
        return make(**{name: one if encode is None else encode(one, payload) for name, one, encode in coded})

    return encode_pair


def _tensor_headers(items: tuple[Any, ...], payload: PayloadWriter) -> list[pb2.TensorHeader]:
    headers = []
    for item in items:
        if item is None:
            headers.append(pb2.TensorHeader(absent=True))
            continue
        header, data = tensor_to_bytes(item)
        payload.add(data)
        headers.append(
            pb2.TensorHeader(dtype=header.dtype, shape=header.shape, strides=header.strides, num_bytes=header.num_bytes)
        )
    return headers


def _tensors_to_proto(value: Any, payload: PayloadWriter) -> pb2.Tensors:
    if value.single and len(value.items) != 1:
        raise ValueError(f"a single tensor was said, {len(value.items)} are there")
    return pb2.Tensors(items=_tensor_headers(value.items, payload), single=value.single)


def _named_tensors_to_proto(value: Any, payload: PayloadWriter) -> pb2.NamedTensors:
    if len(value.names) != len(value.items):
        raise ValueError(f"{len(value.names)} names for {len(value.items)} tensors")
    return pb2.NamedTensors(names=value.names, items=_tensor_headers(value.items, payload))


# --- decoding -------------------------------------------------------------------------------------------------------


def _from_proto(cls: Any) -> FromProto:
    """Make the decoder of a dataclass from its annotations."""
    if cls is messages.Tensors:
        return _tensors_from_proto
    if cls is messages.NamedTensors:
        return _named_tensors_from_proto
    hints = typing.get_type_hints(cls)
    decoders = tuple((field.name, _field_decoder(hints[field.name], field.name)) for field in fields(cls))

    def decode_dataclass(proto: Any, payload: PayloadReader, where: str) -> Any:
        values = {name: decode(proto, payload, where) for name, decode in decoders}
        try:
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise MalformedMessageError(f"{where} refused: {error}") from error

    return decode_dataclass


def _field_decoder(hint: Any, name: str) -> FromProto:
    """How a field is read from the message that has it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        present = _field_decoder(_without_none(hint), name)
        return lambda proto, payload, where: present(proto, payload, where) if proto.HasField(name) else None
    if origin is tuple and arguments[-1] is Ellipsis:
        item = _decoder(arguments[0])
        if item is None:
            return lambda proto, payload, where: tuple(getattr(proto, name))
        return lambda proto, payload, where: tuple(
            [item(one, payload, f"{where}.{name}[{index}]") for index, one in enumerate(getattr(proto, name))]
        )
    decode = _decoder(hint)
    if decode is None:
        return lambda proto, payload, where: getattr(proto, name)
    if not is_dataclass(hint):
        return lambda proto, payload, where: decode(getattr(proto, name), payload, f"{where}.{name}")

    def decode_present(proto: Any, payload: PayloadReader, where: str) -> Any:
        if not proto.HasField(name):
            raise MalformedMessageError(f"{where} refused: its field {name!r} is missing")
        return decode(getattr(proto, name), payload, f"{where}.{name}")

    return decode_present


def _decoder(hint: Any) -> FromProto | None:
    """How one value of this type is decoded; ``None``: it comes as it is."""
    arguments = typing.get_args(hint)
    if arguments:
        return _pair_decoder(arguments)
    if issubclass(hint, StrEnum):
        return _enum_decoder(hint)
    return _from_proto(hint) if is_dataclass(hint) else None


def _enum_decoder(hint: type[StrEnum]) -> FromProto:
    members = _enum_members(hint)

    def decode_enum(value: Any, payload: PayloadReader, where: str) -> Any:
        try:
            return members[value]
        except KeyError:
            raise MalformedMessageError(
                f"{where} refused: {value} is none of {', '.join(f'{n} ({m})' for n, m in members.items())}"
            ) from None

    return decode_enum


def _pair_decoder(arguments: tuple[Any, ...]) -> FromProto:
    _, names = _pair_message(arguments)
    decoders = [_field_decoder(argument, name) for argument, name in zip(arguments, names, strict=True)]
    return lambda proto, payload, where: tuple([decode(proto, payload, where) for decode in decoders])


def _tensor_items(headers: Any, payload: PayloadReader, where: str) -> tuple[Any, ...]:
    items: list[Any] = []
    if len(headers) > MAX_TENSORS:
        raise MalformedMessageError(f"{where} refused: {len(headers)} tensors, the limit is {MAX_TENSORS}")
    for index, proto in enumerate(headers):
        if proto.absent:
            if proto.dtype or proto.shape or proto.strides or proto.num_bytes:
                raise MalformedMessageError(f"{where}.items[{index}] refused: absent, yet described")
            items.append(None)
            continue
        header = TensorHeader(
            dtype=proto.dtype, shape=tuple(proto.shape), strides=tuple(proto.strides), num_bytes=proto.num_bytes
        )
        try:
            check_header(header, max_bytes=MAX_TENSOR_BYTES)
            items.append(tensor_from_bytes(header, payload.take(header.num_bytes)))
        except MalformedMessageError as error:
            raise MalformedMessageError(f"{where}.items[{index}]: {error}") from error
    return tuple(items)


def _tensors_from_proto(proto: Any, payload: PayloadReader, where: str) -> messages.Tensors:
    if proto.single and len(proto.items) != 1:
        raise MalformedMessageError(f"{where} refused: a single tensor was said, {len(proto.items)} are there")
    return messages.Tensors(_tensor_items(proto.items, payload, where), proto.single)


def _named_tensors_from_proto(proto: Any, payload: PayloadReader, where: str) -> messages.NamedTensors:
    if len(proto.names) != len(proto.items):
        raise MalformedMessageError(f"{where} refused: {len(proto.names)} names for {len(proto.items)} tensors")
    return messages.NamedTensors(tuple(proto.names), _tensor_items(proto.items, payload, where))


# --- types ----------------------------------------------------------------------------------------------------------


def _without_none(hint: Any) -> Any:
    inner = [one for one in typing.get_args(hint) if one is not types.NoneType]
    assert len(inner) == 1, f"only `T | None` unions travel, not {hint}"
    return inner[0]


def _enum_members(hint: type[StrEnum]) -> dict[int, StrEnum]:
    """Wire number to member; the wire has one more value, 0, for "not said"."""
    prefix = _snake(hint.__name__).upper()
    values = pb2.DESCRIPTOR.enum_types_by_name[hint.__name__].values_by_name
    return {values[f"{prefix}_{member.name}"].number: member for member in hint}


def _pair_message(arguments: tuple[Any, ...]) -> tuple[Callable[..., ProtoMessage], tuple[str, ...]]:
    """Tuples of different things travel as a message with a field for each place."""
    assert arguments == (int, messages.NamedTensors), f"no wire form for a tuple of {arguments}"
    return pb2.LayerTensors, tuple(field.name for field in pb2.LayerTensors.DESCRIPTOR.fields)
