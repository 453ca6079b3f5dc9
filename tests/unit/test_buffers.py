from __future__ import annotations

import gc

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.buffers import ALIGNMENT, BufferPool, size_class


@given(st.integers(0, 1 << 40))
def test_a_class_holds_the_size_and_wastes_at_most_a_quarter(num_bytes: int) -> None:
    size = size_class(num_bytes)
    assert size >= num_bytes
    assert size <= max(num_bytes * 1.25, 1 << 14)
    assert size_class(size) == size


def test_buffers_are_aligned_and_exact() -> None:
    pool = BufferPool()
    for num_bytes in (0, 1, 100, 1 << 20):
        buffer = pool.take(num_bytes)
        assert buffer.size == num_bytes
        assert buffer.flags.writeable
        assert num_bytes == 0 or buffer.ctypes.data % ALIGNMENT == 0


def test_a_buffer_comes_back_when_its_last_tensor_dies() -> None:
    pool = BufferPool()
    buffer = pool.take(1 << 20)
    place = buffer.ctypes.data
    first, second = torch.from_numpy(buffer[:64]), torch.from_numpy(buffer[64:128]).view(torch.float32)[2:]
    del buffer, first
    gc.collect()
    assert pool.idle_bytes == 0
    del second
    gc.collect()
    assert pool.idle_bytes == 1 << 20
    assert pool.take(1_000_000).ctypes.data == place


def test_buffers_in_use_do_not_share_memory() -> None:
    pool = BufferPool()
    one, two = pool.take(1000), pool.take(1000)
    one[:], two[:] = 1, 2
    assert np.all(one == 1)
    assert np.all(two == 2)


def test_idle_memory_is_bounded() -> None:
    pool = BufferPool(max_idle_bytes=1 << 20)
    buffers = [pool.take(1 << 19) for _ in range(5)]
    assert pool.idle_bytes == 0
    buffers.clear()
    gc.collect()
    assert pool.idle_bytes == 1 << 20
