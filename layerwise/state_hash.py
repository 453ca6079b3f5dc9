"""One hash of everything an update may change in a layer."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
import xxhash

HASH_ALGORITHM = "xxh3-128/layer-state-1"
"""Goes into the event log's header: the function, and the order below."""


def state_hash(
    parameters: Iterable[torch.Tensor], buffers: Iterable[torch.Tensor], moments: Iterable[torch.Tensor]
) -> str:
    """Hex digest of the tensors' elements: parameters, then buffers, then moments, each in the order given.

    Elements count in row-major order and little-endian bytes, whatever the strides and the machine; shapes and dtypes
    are fixed by the model and do not count.
    """
    hasher = xxhash.xxh3_128()
    for group in (parameters, buffers, moments):
        for tensor in group:
            hasher.update(element_bytes(tensor))
    return hasher.hexdigest()


def element_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements in row-major order, little-endian; a view of its memory where they lie so on the host."""
    data = tensor.detach().cpu().contiguous()
    if data.numel() == 0:
        return memoryview(b"")
    raw = data.reshape(-1).view(torch.uint8).numpy()
    if sys.byteorder == "big" and data.element_size() > 1:
        raw = raw.reshape(-1, data.element_size())[:, ::-1].copy().reshape(-1)
    return raw.data
