"""Which samples a microbatch holds: the same in every process, and whatever the version of numpy."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from layerwise.ids import Microbatch

Indices = NDArray[np.int64]

SPLIT_EPOCH = 2**32 - 1
"""The split into training and validation samples draws from the stream of an epoch that no run reaches."""


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, num_samples: int) -> Indices:
    """Sample indices ``0 .. num_samples - 1`` in the order of ``epoch``; read-only.

    Sorted by raw 64-bit draws: numpy keeps a bit generator's stream for ever, but not the streams of its distributions.
    """
    draws = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(num_samples)
    order = np.argsort(draws, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def microbatch_indices(seed: int, microbatch: Microbatch, num_samples: int) -> Indices:
    """The samples that stand at the microbatch's positions.

    Raises:
        ValueError: the range ends beyond the data.
    """
    if microbatch.stop > num_samples:
        raise ValueError(f"microbatch {microbatch} ends beyond the {num_samples} samples of the data")
    return permutation(seed, microbatch.epoch, num_samples)[microbatch.start : microbatch.stop]


def split(num_samples: int, validation: float, seed: int) -> tuple[Indices, Indices]:
    """Training and validation indices, each ascending; ``validation`` is a part of the samples, rounded."""
    order = permutation(seed, SPLIT_EPOCH, num_samples)
    size = round(num_samples * validation)
    return np.sort(order[size:]), np.sort(order[:size])
