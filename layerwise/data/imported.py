"""The user's own dataset: anything with a length whose items are ``(input, target)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerwise.data.dataset import Batch, Dataset, TrainingData, describe_data, split_dataset
from layerwise.errors import ConfigError
from layerwise.imports import call_import
from layerwise.randomness import loading_randomness
from layerwise.sections import ImportData


class MapDataset:
    """Stacks the items of a map-style dataset.

    An item is a pair; each half is a tensor, an array, a number, or a tuple of these. Arrays of float64 become float32.
    """

    def __init__(self, items: Any, target: str) -> None:
        self._items = items
        self._target = target

    def __len__(self) -> int:
        """How many samples there are."""
        return len(self._items)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """The items at ``indices``, stacked.

        Raises:
            ConfigError: an item is no pair, can't be made a tensor, differs in shape from the first, or raised.
        """
        inputs: list[list[Tensor]] = []
        targets: list[list[Tensor]] = []
        for index in indices:
            first, second = self._item(int(index))
            inputs.append(first)
            targets.append(second)
        return self._stacked(inputs, indices), self._stacked(targets, indices)

    def _item(self, index: int) -> tuple[list[Tensor], list[Tensor]]:
        try:
            item = self._items[index]
        except Exception as error:  # whatever the user's dataset raises
            raise ConfigError(
                f"data.import: sample {index} of {self._target} failed: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise ConfigError(f"data.import: sample {index} of {self._target} is no pair of input and target")
        return self._tensors(item[0], index), self._tensors(item[1], index)

    def _tensors(self, half: Any, index: int) -> list[Tensor]:
        try:
            return [_tensor(one) for one in (half if isinstance(half, tuple) else (half,))]
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"data.import: sample {index} of {self._target} has a {type(half).__name__} that is no tensor: {error}"
            ) from None

    def _stacked(self, samples: list[list[Tensor]], indices: Sequence[int] | NDArray[np.int64]) -> list[Tensor]:
        for index, sample in zip(indices, samples, strict=True):
            if [(one.shape, one.dtype) for one in sample] != [(one.shape, one.dtype) for one in samples[0]]:
                raise ConfigError(
                    f"data.import: sample {int(index)} of {self._target} is {_shapes(sample)}, sample {int(indices[0])}"
                    f" is {_shapes(samples[0])}; expected the same shapes and dtypes in all"
                )
        return [torch.stack(same) for same in zip(*samples, strict=True)]


def load_imported(spec: ImportData, allowed_imports: Sequence[str]) -> TrainingData:
    """What the user's function returns: one dataset, of which ``validation`` is split off, or a pair of them.

    The number of classes is taken from a dataset's ``num_classes``, or the length of its ``classes``; a vocabulary from
    its ``vocabulary``.

    Raises:
        ConfigError: the function failed or returned something else.
        NotAllowedError: its module is not covered by ``allowed_imports``.
    """
    # Every process makes a dataset of its own: what is drawn for it must come out alike.
    with loading_randomness(spec.split_seed):
        found = call_import(spec.target, spec.arguments, allowed_imports, key="data.import")
    train: Dataset
    validation: Dataset
    if isinstance(found, tuple) and len(found) == 2 and all(_is_map_style(one) for one in found):
        source = found[0]
        if spec.validation is not None:
            raise ConfigError(
                f"data.validation: got {spec.validation}, expected null: {spec.target} returns a validation dataset too"
            )
        train, validation = MapDataset(found[0], spec.target), MapDataset(found[1], spec.target)
    elif _is_map_style(found):
        source = found
        train, validation = split_dataset(MapDataset(found, spec.target), spec.validation or 0.0, spec.split_seed)
    else:
        raise ConfigError(
            f"data.import: {spec.target} returned a {type(found).__name__}, expected a dataset with __len__ and "
            "__getitem__, or a pair of them"
        )
    if len(train) == 0:
        raise ConfigError(f"data.import: {spec.target} returned no training samples, expected at least 1")
    classes = getattr(source, "num_classes", None)
    if classes is None and hasattr(source, "classes"):
        classes = len(source.classes)
    vocabulary = getattr(source, "vocabulary", None)
    return describe_data(train, validation, num_classes=classes, vocabulary=vocabulary, imported=True)


def _is_map_style(value: object) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, (str, bytes, dict))


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype == np.float64:
        value = value.astype(np.float32)
    return torch.as_tensor(value)


def _shapes(sample: list[Tensor]) -> str:
    return ", ".join(f"{str(one.dtype).removeprefix('torch.')}{list(one.shape)}" for one in sample)
