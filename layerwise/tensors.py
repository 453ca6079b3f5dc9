"""Tensors as dtype + shape + strides + raw bytes. No pickle, and no torch until the first tensor.

Which bytes travel: a tensor whose elements lie densely in memory, in any order of dimensions, travels as exactly that
memory and arrives with the same strides (transposed, channels-last, permuted). A dimension of stride 0 (expanded) is
stored once and arrives with stride 0. Every other tensor (a slice with gaps, overlapping windows) is copied first
into the dense layout that keeps the order of its strides, outer dimension first where two are equal; that layout is
what arrives. Strides matter because sums depend on the order of elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from layerwise.buffers import Bytes
from layerwise.errors import MalformedMessageError

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "complex128": 16,
    "complex64": 8,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
}
"""The dtypes that may travel, and the bytes of one element."""

MAX_DIMENSIONS = 64
MAX_TENSOR_BYTES = 1 << 30
_MAX_STRIDE = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """Everything about a tensor but its bytes. ``strides`` count elements; ``num_bytes`` follows the module's rule."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    num_bytes: int


def stored_elements(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """How many elements a tensor stores; ``None`` if it is not dense (apart from dimensions of stride 0)."""
    if 0 in shape:
        return 0
    expected = 1
    for stride, size in sorted(
        (stride, size) for size, stride in zip(shape, strides, strict=True) if size > 1 and stride
    ):
        if stride != expected:
            return None
        expected *= size
    return expected


def dense_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of the dense layout with the same order of dimensions; dimensions of stride 0 keep it."""
    packed = [0] * len(shape)
    expected = 1
    for dimension in sorted(range(len(shape)), key=lambda one: (strides[one], -one)):
        if strides[dimension] or shape[dimension] <= 1:
            packed[dimension] = expected
            expected *= shape[dimension]
    return tuple(packed)


def check_header(header: TensorHeader, *, max_bytes: int = MAX_TENSOR_BYTES) -> None:
    """Refuse a header that can't be one that `tensor_to_bytes` made, before any memory is taken for it.

    Raises:
        MalformedMessageError: says which field, and what was received.
    """
    item_bytes = ITEM_BYTES.get(header.dtype)
    if item_bytes is None:
        raise MalformedMessageError(f"tensor refused: dtype {header.dtype[:40]!r} is none of {', '.join(ITEM_BYTES)}")
    if len(header.shape) > MAX_DIMENSIONS or len(header.shape) != len(header.strides):
        raise MalformedMessageError(
            f"tensor refused: {len(header.shape)} sizes and {len(header.strides)} strides"
            f" (equal numbers, at most {MAX_DIMENSIONS})"
        )
    if any(size < 0 for size in header.shape) or any(not 0 <= stride < _MAX_STRIDE for stride in header.strides):
        raise MalformedMessageError(
            f"tensor refused: sizes {header.shape} and strides {header.strides} must not be negative or beyond 2^62"
        )
    if math.prod(header.shape) * item_bytes > max_bytes:
        raise MalformedMessageError(
            f"tensor refused: shape {header.shape} of {header.dtype} is {math.prod(header.shape) * item_bytes} bytes,"
            f" the limit is {max_bytes}"
        )
    stored = stored_elements(header.shape, header.strides)
    if stored is None:
        raise MalformedMessageError(
            f"tensor refused: shape {header.shape} with strides {header.strides} is not dense; send a dense copy"
        )
    if stored * item_bytes != header.num_bytes:
        raise MalformedMessageError(
            f"tensor refused: shape {header.shape}, strides {header.strides} of {header.dtype}"
            f" store {stored * item_bytes} bytes, but {header.num_bytes} were announced"
        )


def tensor_to_bytes(tensor: torch.Tensor) -> tuple[TensorHeader, memoryview]:
    """The header and the bytes of ``tensor``, without a copy where its memory is dense and on the host.

    The view shares the tensor's memory: the tensor must not change while the view is used.

    Raises:
        MalformedMessageError: the tensor is sparse, quantized, without data, or of a dtype that can't travel.
    """
    dtype = _dtype_names().get(tensor.dtype)
    if dtype is None or not _has_plain_memory(tensor):
        raise MalformedMessageError(
            f"a tensor of {tensor.dtype}, layout {tensor.layout} on {tensor.device} can't travel:"
            " make it a dense one of a common dtype"
        )
    data = tensor.detach()
    if not data.is_cpu:
        data = to_host(data)
    if data.is_neg() or data.is_conj():
        data = data.resolve_conj().resolve_neg()
    shape, strides = tuple(data.shape), data.stride()
    stored = data.numel() if data.is_contiguous() else stored_elements(shape, strides)
    if stored is None:
        data = _dense(data)
        strides = data.stride()
        stored = stored_elements(shape, strides)
        assert stored is not None
    header = TensorHeader(dtype=dtype, shape=shape, strides=strides, num_bytes=stored * ITEM_BYTES[dtype])
    if stored == 0:
        return header, memoryview(b"")
    return header, data.as_strided((stored,), (1,)).view(_dtypes()["uint8"]).numpy().data


def tensor_from_bytes(header: TensorHeader, data: Bytes) -> torch.Tensor:
    """The tensor that ``header`` describes, on the memory of ``data`` (which it keeps alive).

    ``header`` has passed `check_header`; ``data`` has ``header.num_bytes`` bytes and is writable.

    Raises:
        MalformedMessageError: a truth value is neither 0 nor 1.
    """
    dtype = _dtypes()[header.dtype]
    if header.num_bytes == 0:
        import torch

        return torch.empty_strided(header.shape, header.strides, dtype=dtype)
    if header.dtype == "bool" and data.max() > 1:
        raise MalformedMessageError(f"tensor refused: a byte of a bool tensor is {int(data.max())}, not 0 or 1")
    return _from_numpy()(data).view(dtype).as_strided(header.shape, header.strides)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory: itself, or a copy in pinned memory, complete on return, with the same strides."""
    import torch

    if tensor.device.type == "cpu":
        return tensor
    if stored_elements(tuple(tensor.shape), tensor.stride()) != tensor.numel():
        tensor = _dense(tensor)
    if tensor.numel() == 0 or stored_elements(tuple(tensor.shape), tensor.stride()) != tensor.numel():
        return tensor.cpu()  # expanded: the few bytes need no pinned memory
    host = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor.as_strided((tensor.numel(),), (1,)))
    return host.as_strided(tensor.shape, tensor.stride())


def _has_plain_memory(tensor: torch.Tensor) -> bool:
    import torch

    return tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_nested


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the dense layout of the same stride order (dimensions of stride 0 stay so)."""
    import torch

    shape = tuple(tensor.shape)
    strides = dense_strides(shape, tensor.stride())
    for dimension, stride in enumerate(tensor.stride()):
        if stride == 0 and shape[dimension] > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    copy = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    copy.copy_(tensor)
    return copy.as_strided(shape, strides)


@cache
def _dtypes() -> dict[str, torch.dtype]:
    import torch

    return {name: getattr(torch, name) for name in ITEM_BYTES}


@cache
def _from_numpy() -> Callable[[Bytes], torch.Tensor]:
    import torch

    return torch.from_numpy


@cache
def _dtype_names() -> dict[torch.dtype, str]:
    return {dtype: name for name, dtype in _dtypes().items()}
