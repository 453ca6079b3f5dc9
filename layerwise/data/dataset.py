"""What every data source gives: samples by index, as batches of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from layerwise.data.sampling import SPLIT_EPOCH, Indices, microbatch_indices, split
from layerwise.data_info import DataInfo
from layerwise.ids import Microbatch
from layerwise.randomness import SAMPLES, layer_seed, loading_randomness
from layerwise.state_hash import element_bytes

DIGEST_SAMPLES = 64
"""Samples of each part that go into `DataInfo.digest`."""

Batch = tuple[list[Tensor], list[Tensor]]
"""Inputs and targets; the first dimension of each is the sample. Contiguous, on the CPU, owned by the caller."""


class Dataset(Protocol):
    """Samples that can be had in any order. ``batch`` may be called from several threads."""

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """The samples at ``indices``, in that order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """A job's data: what is trained on, what is validated on (perhaps nothing), and what a model must know of it.

    ``imported``: code of the user's own loads the samples, and may draw random numbers for them.
    """

    train: Dataset
    validation: Dataset
    info: DataInfo
    imported: bool = False

    def training_batch(self, seed: int, microbatch: Microbatch) -> Batch:
        """The samples of ``microbatch`` in a job with this ``seed``.

        Whatever is drawn to augment them is the same in each attempt, in each process and in the plain loop.

        Raises:
            ConfigError: an imported dataset fails on one of them.
        """
        indices = microbatch_indices(seed, microbatch, len(self.train))
        return self._batch(self.train, indices, layer_seed(seed, microbatch, SAMPLES))

    def validation_batch(self, seed: int, start: int, stop: int) -> Batch:
        """The validation samples ``[start, stop)``; raises as `training_batch`."""
        name = Microbatch(SPLIT_EPOCH, start, stop)
        return self._batch(self.validation, np.arange(start, stop), layer_seed(seed, name, SAMPLES))

    def _batch(self, dataset: Dataset, indices: Indices, seed: int) -> Batch:
        if not self.imported:
            return dataset.batch(indices)
        with loading_randomness(seed):
            return dataset.batch(indices)


class TensorDataset:
    """Samples held in memory as whole tensors."""

    def __init__(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        self._inputs = list(inputs)
        self._targets = list(targets)

    def __len__(self) -> int:
        """How many samples there are."""
        return len(self._inputs[0])

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """The samples at ``indices``, copied."""
        chosen = torch.from_numpy(np.array(indices, dtype=np.int64))
        return [one.index_select(0, chosen) for one in self._inputs], [
            one.index_select(0, chosen) for one in self._targets
        ]


class Subset:
    """Some samples of another dataset, renumbered."""

    def __init__(self, whole: Dataset, indices: Indices) -> None:
        self._whole = whole
        self._indices = indices

    def __len__(self) -> int:
        """How many samples there are."""
        return len(self._indices)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """The samples at ``indices`` of this subset."""
        return self._whole.batch(self._indices[np.asarray(indices, dtype=np.int64)])


def split_dataset(whole: Dataset, validation: float, seed: int) -> tuple[Dataset, Dataset]:
    """Training and validation part of ``whole``."""
    train, kept = split(len(whole), validation, seed)
    return Subset(whole, train), Subset(whole, kept)


def describe_data(
    train: Dataset,
    validation: Dataset,
    *,
    num_classes: int | None = None,
    vocabulary: int | None = None,
    imported: bool = False,
) -> TrainingData:
    """The two parts with their `DataInfo`, shapes and dtypes taken from the first sample (of whichever has one)."""
    inputs, targets = (train if len(train) else validation).batch([0])
    return TrainingData(
        train=train,
        validation=validation,
        info=DataInfo(
            num_train=len(train),
            num_validation=len(validation),
            input_shapes=tuple(tuple(one.shape[1:]) for one in inputs),
            input_dtypes=tuple(dtype_name(one.dtype) for one in inputs),
            target_shapes=tuple(tuple(one.shape[1:]) for one in targets),
            target_dtypes=tuple(dtype_name(one.dtype) for one in targets),
            num_classes=num_classes,
            vocabulary=vocabulary,
            digest="" if imported else _digest(train, validation),
        ),
        imported=imported,
    )


def _digest(*parts: Dataset) -> str:
    """A hash of samples from all over the ``parts``: files that changed, or came in another order, show in them."""
    hasher = xxhash.xxh3_64()
    for part in parts:
        hasher.update(f"{len(part)};".encode())
        indices = np.unique(np.linspace(0, max(len(part) - 1, 0), DIGEST_SAMPLES, dtype=np.int64))[: len(part)]
        inputs, targets = part.batch(indices) if len(indices) else ([], [])
        for tensor in (*inputs, *targets):
            hasher.update(element_bytes(tensor))
    return hasher.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
