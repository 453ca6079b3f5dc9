"""The bytes of a layer's file on their way between the memories of two shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash

from layerwise.errors import CorruptError
from layerwise.messages import LayerFile, Tensors
from layerwise.profile import LayerProfile

LARGEST_OVERHEAD = 2
"""The bytes of a layer's file are at most so many times those of its state, beside what is not in tensors."""
LARGEST_REST_BYTES = 8 << 20
"""What a file has beside its tensors: mostly the layer's sets of microbatches, which are short unless much is open."""
PART_BYTES = 2 << 20
"""What one message carries: a gradient that waits behind it for the same link hardly notices."""


def most_bytes(layers: Sequence[LayerProfile]) -> int:
    """The most bytes that a copy of these layers can have; an offer of more is refused."""
    return sum(LARGEST_OVERHEAD * layer.state_bytes + LARGEST_REST_BYTES for layer in layers)


class LayerBytes:
    """A layer's file in memory; it never changes."""

    def __init__(self, data: bytearray) -> None:
        self.data = data

    def part(self, offset: int) -> Tensors:
        """One tensor of the bytes from ``offset`` on: uint8, of at most `PART_BYTES`, on this object's memory.

        Raises:
            ValueError: there are none.
        """
        if not 0 <= offset < len(self.data):
            raise ValueError(f"offset {offset} is outside of the {len(self.data)} bytes of the file")
        count = min(len(self.data) - offset, PART_BYTES)
        return Tensors((torch.frombuffer(self.data, dtype=torch.uint8, count=count, offset=offset),))


class ArrivingLayer:
    """A layer's file that arrives part by part; no more memory is taken than has arrived."""

    def __init__(self, file: LayerFile) -> None:
        self._file = file
        self._data = bytearray()
        self._hash = xxhash.xxh3_128()

    @property
    def num_received(self) -> int:
        """Bytes that are here."""
        return len(self._data)

    def add(self, part: Tensors) -> None:
        """Take the next bytes over; their memory is not kept.

        Raises:
            ValueError: they are no such part, or more than the file has.
        """
        item = part.items[0] if len(part.items) == 1 else None
        if item is None or item.dtype != torch.uint8 or item.dim() != 1 or not 0 < item.numel() <= PART_BYTES:
            raise ValueError(f"a part of layer {self._file.layer} is no tensor of 1 to {PART_BYTES} bytes")
        if len(self._data) + item.numel() > self._file.num_bytes:
            raise ValueError(f"more than the {self._file.num_bytes} bytes of layer {self._file.layer} arrived")
        view = item.contiguous().numpy().data
        self._hash.update(view)
        self._data += view

    def finish(self) -> LayerBytes:
        """The file; ``CorruptError`` unless its hash is the one that was told."""
        if self._hash.hexdigest() != self._file.digest:
            raise CorruptError(f"the bytes of layer {self._file.layer} do not have the hash that they were sent with")
        return LayerBytes(self._data)
