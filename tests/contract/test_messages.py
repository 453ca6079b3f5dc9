from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from enum import StrEnum
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise import messages
from layerwise.errors import MalformedMessageError
from layerwise.ids import Attempt, Microbatch
from layerwise.messages import (
    Closed,
    DetachedTask,
    Forward,
    Message,
    NamedTensors,
    Offer,
    Outcome,
    PushGradient,
    Tensors,
)
from layerwise.proto import layerwise_pb2 as pb2
from layerwise.proto import message_from_proto, message_to_proto
from layerwise.proto.generate import stale

torch.set_num_threads(1)

MESSAGES: tuple[type[Any], ...] = typing.get_args(Message)
ATTEMPT = Attempt(Microbatch(1, 8, 16), 2)

numbers = st.integers(-(1 << 63), (1 << 63) - 1)
tensors = st.one_of(
    st.none(),
    st.lists(st.integers(0, 3), max_size=3).map(lambda shape: torch.arange(math.prod(shape)).reshape(shape)),
    st.integers(1, 4).map(lambda size: torch.randn(size, 3).t()),
)


@st.composite
def microbatches(draw: st.DrawFn) -> Microbatch:
    start = draw(st.integers(0, 1 << 40))
    return Microbatch(draw(st.integers(0, 1 << 40)), start, start + draw(st.integers(1, 1 << 20)))


@st.composite
def named_tensors(draw: st.DrawFn) -> NamedTensors:
    names = draw(st.lists(st.text(max_size=8), max_size=3))
    return NamedTensors(tuple(names), tuple(draw(tensors) for _ in names))


SPECIAL: dict[Any, st.SearchStrategy[Any]] = {
    Microbatch: microbatches(),
    NamedTensors: named_tensors(),
    Tensors: tensors.map(lambda one: Tensors((one,)))
    | st.lists(tensors, max_size=3).map(lambda many: Tensors(tuple(many), single=False)),
    int: numbers,
    float: st.floats(allow_nan=False),
    str: st.text(max_size=20),
    bool: st.booleans(),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in SPECIAL:
        return SPECIAL[hint]
    if origin is types.UnionType:
        return st.one_of(*(st.none() if one is types.NoneType else values(one) for one in arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    if issubclass(hint, StrEnum):
        return st.sampled_from(list(hint))
    hints = typing.get_type_hints(hint)
    return st.builds(hint, **{field.name: values(hints[field.name]) for field in dataclasses.fields(hint)})


def equal(one: Any, other: Any) -> bool:
    """Equality that looks into tensors."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.stride() == other.stride() and torch.equal(one, other)
    if dataclasses.is_dataclass(one):
        return type(one) is type(other) and all(
            equal(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one)
        )
    if isinstance(one, tuple):
        return isinstance(other, tuple) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def carried(message: Any) -> Any:
    """The message after a trip over the wire."""
    envelope, pieces, num_bytes = message_to_proto(message)
    payload = np.frombuffer(bytearray(b"".join(pieces)), np.uint8)
    assert payload.size == num_bytes
    return message_from_proto(pb2.Envelope.FromString(envelope.SerializeToString()), payload)


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
@given(data=st.data())
def test_every_message_arrives_equal(cls: type[Any], data: st.DataObject) -> None:
    message = data.draw(values(cls))
    assert equal(carried(message), message)


def test_every_dataclass_has_a_wire_form_with_the_same_fields() -> None:
    for name, cls in inspect.getmembers(messages, lambda one: isinstance(one, type) and dataclasses.is_dataclass(one)):
        wire = {field.name for field in getattr(pb2, name).DESCRIPTOR.fields}
        assert wire == {field.name for field in dataclasses.fields(cls)}, name


def test_the_envelope_has_every_message_and_no_other() -> None:
    wire = {field.message_type.name for field in pb2.Envelope.DESCRIPTOR.fields}
    assert wire == {cls.__name__ for cls in MESSAGES}


def test_the_generated_code_follows_from_its_source() -> None:
    assert stale() == []


def test_no_gradient_is_not_a_zero_gradient() -> None:
    push = PushGradient(
        job="j",
        attempt=ATTEMPT,
        number=1,
        layer=0,
        life=1,
        revision=1,
        read=1,
        gradients=NamedTensors(("weight", "bias"), (None, torch.zeros(2))),
    )
    assert carried(push).gradients.items[0] is None
    assert carried(push).gradients.items[1] is not None


def test_nan_losses_travel() -> None:
    loss = carried(Closed(job="j", attempt=ATTEMPT, life=1, outcome=Outcome.APPLIED, loss=math.nan)).loss
    assert loss is not None
    assert math.isnan(loss)


def forward(**changes: Any) -> Forward:
    fields = {
        "job": "j",
        "attempt": ATTEMPT,
        "number": 1,
        "life": 1,
        "needed_from": 0,
        "inputs": Tensors((torch.ones(3),)),
        "targets": Tensors((torch.ones(3),)),
    }
    return Forward(**(fields | changes))


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (Offer(job=3, attempt=ATTEMPT, life=1), "Offer can't be sent"),  # type: ignore[arg-type]
        (Offer(job="j", attempt=ATTEMPT, life=1 << 70), "Offer can't be sent"),
        (Offer(job="j", attempt=None, life=1), "Offer can't be sent"),  # type: ignore[arg-type]
        (forward(inputs=Tensors((torch.ones(1), torch.ones(1)))), "a single tensor was said, 2 are there"),
        (forward(inputs=Tensors((torch.ones(2).to_sparse(),))), "sparse"),
        (forward(inputs=Tensors(("text",))), "Forward can't be sent"),
        ("text", "str is not a message"),
    ],
)
def test_what_is_no_proper_message_is_not_sent(message: Any, words: str) -> None:
    with pytest.raises(MalformedMessageError, match=words):
        message_to_proto(message)


def header(**changes: Any) -> pb2.TensorHeader:
    return pb2.TensorHeader(**({"dtype": "float32", "shape": [3], "strides": [1], "num_bytes": 12} | changes))


def wire_forward(*items: pb2.TensorHeader, single: bool = True) -> pb2.Envelope:
    envelope, _, _ = message_to_proto(forward(targets=Tensors((), single=False)))
    del envelope.forward.inputs.items[:]
    envelope.forward.inputs.items.extend(items)
    envelope.forward.inputs.single = single
    return envelope


@pytest.mark.parametrize(
    ("envelope", "payload", "words"),
    [
        (pb2.Envelope(), 0, "empty envelope"),
        (pb2.Envelope(offer=pb2.Offer(job="j", life=1)), 0, "Offer refused: its field 'attempt' is missing"),
        (
            pb2.Envelope(offer=pb2.Offer(attempt=pb2.Attempt(microbatch=pb2.Microbatch(start=3, stop=3)))),
            0,
            r"Offer.attempt.microbatch refused: no such sample range: epoch 0, \[3, 3\)",
        ),
        (
            pb2.Envelope(closed=pb2.Closed(attempt=pb2.Attempt(microbatch=pb2.Microbatch(stop=3)), outcome=9)),  # type: ignore[arg-type]
            0,
            r"Closed.outcome refused: 9 is none of 1 \(applied\)",
        ),
        (
            pb2.Envelope(closed=pb2.Closed(attempt=pb2.Attempt(microbatch=pb2.Microbatch(stop=3)))),
            0,
            "Closed.outcome refused: 0",
        ),
        (wire_forward(header(), header()), 64 + 12, "Forward.inputs refused: a single tensor was said, 2 are there"),
        (wire_forward(header(dtype="float31")), 12, r"Forward.inputs.items\[0\].*float31"),
        (wire_forward(header(strides=[2])), 12, r"Forward.inputs.items\[0\].*not dense"),
        (wire_forward(header(absent=True)), 12, "absent, yet described"),
        (wire_forward(header()), 11, "need 12 bytes more, but 11"),
        (wire_forward(header()), 13, "1 bytes more than its tensors"),
        (wire_forward(header(), header(), single=False), 24, "need 12 bytes more, but 0"),
    ],
)
def test_what_is_no_proper_message_is_not_taken(envelope: pb2.Envelope, payload: int, words: str) -> None:
    with pytest.raises(MalformedMessageError, match=words):
        message_from_proto(envelope, np.zeros(payload, np.uint8))


def test_names_and_tensors_must_pair_up() -> None:
    envelope = pb2.Envelope(
        push_gradient=pb2.PushGradient(
            attempt=pb2.Attempt(microbatch=pb2.Microbatch(stop=3)), gradients=pb2.NamedTensors(names=["a", "b"])
        )
    )
    with pytest.raises(MalformedMessageError, match=r"PushGradient.gradients refused: 2 names for 0 tensors"):
        message_from_proto(envelope)


def test_a_task_without_targets_differs_from_one_with_no_tensors() -> None:
    task = DetachedTask(
        job="j",
        attempt=ATTEMPT,
        number=1,
        life=1,
        inputs=Tensors((torch.ones(1),)),
        targets=None,
        gradients=Tensors((), single=False),
        buffers=((3, NamedTensors(("mean",), (torch.ones(2),))),),
        lacking=(3,),
        input_gradient=True,
        states=(),
    )
    assert equal(carried(task), task)
