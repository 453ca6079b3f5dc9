"""Reused memory for what arrives: a fresh 16 MB block costs eight times its copy in page faults."""

from __future__ import annotations

import weakref
from collections import deque
from typing import TypeAlias

import numpy as np

Bytes: TypeAlias = np.ndarray[tuple[int], np.dtype[np.uint8]]

ALIGNMENT = 64
"""Bytes; the start of every buffer, and of every tensor in a payload, is a multiple of it."""

_SMALLEST = 1 << 14


def size_class(num_bytes: int) -> int:
    """The size of the block that serves ``num_bytes``: at most a quarter larger."""
    if num_bytes <= _SMALLEST:
        return _SMALLEST
    quarter = 1 << max((num_bytes - 1).bit_length() - 3, 0)
    return -(-num_bytes // quarter) * quarter


class BufferPool:
    """Hands out 64-byte aligned buffers and takes each back when the last view of it (array or tensor) is gone.

    `take` runs on one thread; views may die on any. At most ``max_idle_bytes`` are kept for reuse.
    """

    def __init__(self, *, max_idle_bytes: int = 256 << 20) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._idle: dict[int, list[Bytes]] = {}
        self._idle_bytes = 0
        # Appending to a deque is atomic: a finalizer may run on another thread, or in the middle of `take`.
        self._returned: deque[Bytes] = deque()

    @property
    def idle_bytes(self) -> int:
        """Bytes kept for reuse."""
        self._collect()
        return self._idle_bytes

    def take(self, num_bytes: int) -> Bytes:
        """A writable array of ``num_bytes`` with arbitrary content."""
        size = size_class(num_bytes)
        self._collect()
        idle = self._idle.get(size)
        if idle:
            block = idle.pop()
            self._idle_bytes -= size
        else:
            raw = np.empty(size + ALIGNMENT, np.uint8)
            start = -raw.ctypes.data % ALIGNMENT
            block = raw[start : start + size]
        # An array over a memoryview, unlike one over an array, stays the base of its own slices: it dies last of all.
        lease: Bytes = np.frombuffer(block.data, np.uint8, num_bytes)
        weakref.finalize(lease, self._returned.append, block).atexit = False
        return lease

    def _collect(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            if self._idle_bytes + block.size <= self._max_idle_bytes:
                self._idle.setdefault(block.size, []).append(block)
                self._idle_bytes += block.size
