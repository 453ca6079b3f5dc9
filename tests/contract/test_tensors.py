from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import MalformedMessageError
from layerwise.tensors import ITEM_BYTES, TensorHeader, check_header, tensor_from_bytes, tensor_to_bytes

torch.set_num_threads(1)
DTYPES = [getattr(torch, name) for name in ITEM_BYTES]


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor of random bits (truth values for bool)."""
    count = int(np.prod(shape, dtype=np.int64))
    if dtype is torch.bool:
        return torch.randint(0, 2, shape).bool()
    item = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (count * item,), dtype=torch.uint8).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    """The logical elements in row-major order, as bytes."""
    if tensor.numel() == 0:
        return b""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).reshape(-1).view(torch.uint8).numpy().tobytes()


def carried(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor after a trip over the wire."""
    header, data = tensor_to_bytes(tensor)
    check_header(header)
    assert data.nbytes == header.num_bytes
    return tensor_from_bytes(header, np.frombuffer(bytearray(data), np.uint8))


def assert_same(arrived: torch.Tensor, tensor: torch.Tensor) -> None:
    assert arrived.dtype == tensor.dtype
    assert arrived.shape == tensor.shape
    assert bits(arrived) == bits(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (5,), (2, 3), (2, 3, 4, 5), (1, 7, 1)], ids=str)
def test_every_dtype_and_shape_arrives_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = filled(shape, dtype)
    arrived = carried(tensor)
    assert_same(arrived, tensor)
    assert arrived.stride() == tensor.stride()


LAYOUTS = {
    "transposed": torch.randn(4, 6).t(),
    "permuted": torch.randn(2, 3, 4, 5).permute(3, 1, 0, 2),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels last with one channel": torch.randn(2, 1, 4, 5).to(memory_format=torch.channels_last),
    "expanded": torch.randn(3, 1, 5).expand(3, 4, 5),
    "expanded scalar": torch.tensor(2.5).expand(1000, 1000),
    "expanded and transposed": torch.randn(3, 5).t().unsqueeze(1).expand(5, 7, 3),
    "unsqueezed": torch.randn(3, 4)[:, None, :, None],
    "dense part of a larger tensor": torch.randn(10, 4)[3:7],
    "a row": torch.randn(6, 4)[2],
    "one element of many": torch.randn(6, 4)[2:3, 1:2],
    "empty and transposed": torch.randn(0, 4).t(),
    "empty slice": torch.randn(6, 4)[:0, ::2],
    "a parameter": torch.nn.Parameter(torch.randn(3, 2)),
    "a result with history": torch.randn(3, 2, requires_grad=True).t() * 2,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_dense_and_expanded_layouts_keep_their_strides(name: str) -> None:
    tensor = LAYOUTS[name]
    arrived = carried(tensor)
    assert_same(arrived, tensor.detach())
    assert arrived.stride() == tensor.stride()
    assert not arrived.requires_grad


GAPS = {
    "every other column": (torch.randn(6, 8)[:, ::2], (4, 1)),
    "every other column, transposed": (torch.randn(6, 8)[:, ::2].t(), (1, 4)),
    "some channels of channels last": (
        torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)[:, :3],
        (48, 1, 12, 3),
    ),
    "overlapping windows": (torch.arange(10.0).unfold(0, 4, 1), (4, 1)),
    "a diagonal": (torch.randn(5, 5).diagonal(), (1,)),
    "expanded slice": (torch.randn(6, 8)[:, ::2].unsqueeze(1).expand(6, 3, 4), (4, 0, 1)),
}


@pytest.mark.parametrize("name", GAPS)
def test_layouts_with_gaps_become_dense_in_the_same_order(name: str) -> None:
    tensor, strides = GAPS[name]
    arrived = carried(tensor)
    assert_same(arrived, tensor)
    assert arrived.stride() == strides


@given(st.data())
def test_any_view_of_a_tensor_arrives_with_its_values(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=5), label="shape"))
    tensor = torch.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)
    tensor = tensor.permute(data.draw(st.permutations(range(len(shape))), label="order"))
    for dimension in range(len(shape)):
        step = data.draw(st.integers(1, 3), label="step")
        start = data.draw(st.integers(0, 2), label="start")
        tensor = tensor[(slice(None),) * dimension + (slice(start, None, step),)]
    if data.draw(st.booleans(), label="expand"):
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    arrived = carried(tensor)
    assert_same(arrived, tensor)
    assert carried(arrived).stride() == arrived.stride()
    wide = [one for one in range(tensor.dim()) if tensor.shape[one] > 1 and tensor.numel()]
    for one, other in itertools.permutations(wide, 2):
        if tensor.stride(one) > tensor.stride(other):
            assert arrived.stride(one) > arrived.stride(other)


def test_a_dense_tensor_is_not_copied() -> None:
    tensor = torch.zeros(4, 6).t()
    _, data = tensor_to_bytes(tensor)
    tensor[0, 0] = 1.0
    assert np.frombuffer(data, np.float32)[0] == 1.0


def test_an_expanded_tensor_sends_only_what_it_stores() -> None:
    _, data = tensor_to_bytes(torch.ones(1).expand(1 << 20))
    assert data.nbytes == 4


def test_conjugate_and_negative_views_send_their_values() -> None:
    tensor = torch.randn(3, 2, dtype=torch.complex64)
    assert_same(carried(tensor.conj()), tensor.conj().resolve_conj())
    assert_same(carried(tensor.conj().imag), tensor.conj().imag.resolve_neg().contiguous())


def test_the_tensor_keeps_its_memory_alive() -> None:
    header, data = tensor_to_bytes(torch.arange(4))
    memory = np.frombuffer(bytearray(data), np.uint8)
    arrived = tensor_from_bytes(header, memory)
    del memory, data
    assert arrived.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(2, 2).to_sparse(), "sparse"),
        (torch.empty(3, device="meta"), "meta"),
    ],
    ids=["sparse", "meta"],
)
def test_a_tensor_without_plain_memory_is_refused(tensor: torch.Tensor, words: str) -> None:
    with pytest.raises(MalformedMessageError, match=words):
        tensor_to_bytes(tensor)


GOOD = TensorHeader(dtype="float32", shape=(2, 3), strides=(3, 1), num_bytes=24)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float31"}, "float31"),
        ({"dtype": "object"}, "object"),
        ({"shape": (2, -3)}, "negative"),
        ({"strides": (3, -1)}, "negative"),
        ({"strides": (1 << 63, 1)}, "2\\^62"),
        ({"strides": (3,)}, "2 sizes and 1 strides"),
        ({"shape": (1,) * 65, "strides": (1,) * 65}, "65 sizes"),
        ({"strides": (4, 1)}, "not dense"),
        ({"strides": (1, 1)}, "not dense"),
        ({"num_bytes": 20}, "20 were announced"),
        ({"num_bytes": 1 << 40}, "were announced"),
        ({"shape": (1 << 40, 3), "strides": (3, 1)}, "the limit is"),
        ({"shape": (1 << 40,), "strides": (0,), "num_bytes": 4}, "the limit is"),
        ({"shape": (1 << 32, 1 << 32), "strides": (0, 0), "num_bytes": 4}, "the limit is"),
    ],
)
def test_a_header_that_lies_is_refused_before_memory_is_taken(changes: dict[str, object], words: str) -> None:
    fields = {"dtype": GOOD.dtype, "shape": GOOD.shape, "strides": GOOD.strides, "num_bytes": GOOD.num_bytes}
    with pytest.raises(MalformedMessageError, match=words):
        check_header(TensorHeader(**(fields | changes)))  # type: ignore[arg-type]


def test_a_truth_value_of_two_is_refused() -> None:
    header = TensorHeader(dtype="bool", shape=(2,), strides=(1,), num_bytes=2)
    with pytest.raises(MalformedMessageError, match="is 2, not 0 or 1"):
        tensor_from_bytes(header, np.array([1, 2], np.uint8))


def test_the_wire_modules_do_not_import_torch() -> None:
    code = "import sys, layerwise.transport, layerwise.proto; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
