"""Randomness that belongs to a layer and a microbatch, whoever computes them and however often.

Dropout in layer 3 for samples 64 to 72 of epoch 2 draws the same numbers in a first try, a retry, a recomputation on
another machine, and the plain loop that `layerwise verify` compares with: the seed is a hash of these names and
nothing else.
"""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import numpy as np
import torch
import xxhash

from layerwise.ids import Microbatch

SAMPLES = -1
"""In the place of a layer's index: the randomness of loading a microbatch's samples."""
_SEED_BITS = 63
_GENERATORS_LOCK = threading.Lock()


def layer_seed(seed: int, microbatch: Microbatch, layer: int) -> int:
    """The 63-bit seed of ``layer``'s randomness for ``microbatch`` in a job whose seed is ``seed`` (below 2^63)."""
    name = struct.pack("<5q", seed, microbatch.epoch, microbatch.start, microbatch.stop, layer)
    return xxhash.xxh3_64_intdigest(name) >> (64 - _SEED_BITS)


class layer_randomness:
    """Within it torch's default generators start from ``seed`` (`layer_seed`), and no other thread draws from them.

    torch has one default generator a process and device, so the context holds a lock of the whole process: keep it to
    one layer's forward pass, and never wait for anything else inside. The generators are left where the layer leaves
    them.
    """

    __slots__ = ("_device", "_seed")

    def __init__(self, seed: int, device: torch.device | None = None) -> None:
        self._seed = seed
        self._device = device

    def __enter__(self) -> None:
        _GENERATORS_LOCK.acquire()
        torch.default_generator.manual_seed(self._seed)
        device = self._device
        if device is not None and device.type != "cpu":
            module = torch.get_device_module(device)
            index = module.current_device() if device.index is None else device.index
            module.default_generators[index].manual_seed(self._seed)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _GENERATORS_LOCK.release()


@contextmanager
def loading_randomness(seed: int) -> Iterator[None]:
    """Within it the default generators of torch, numpy and Python start from ``seed``, for a dataset of the user's own.

    As `layer_randomness`, it keeps other threads from torch's generator; numpy's and Python's are left where they end.
    """
    with layer_randomness(seed):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
